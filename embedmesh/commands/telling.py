"""How these commands speak: results on stdout, as JSON where asked; progress and complaints on stderr."""

from collections.abc import Collection, Sequence
from typing import IO, Any

import click
import orjson


class WrongUsage(click.ClickException):
    """What the command was given does not fit what is there. One line, exit code 2, as for a wrong option."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"embedmesh: {self.message}", file=file, err=file is None)


def print_json(value: object, *, err: bool = False) -> None:
    """One JSON value on one line."""
    click.echo(orjson.dumps(value).decode(), err=err)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Columns as wide as their widest cell, those named in `right` flush right; no blanks at a line's end."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
