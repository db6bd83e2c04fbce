"""How these commands speak: results on stdout, as JSON where asked; progress and complaints on stderr."""

import difflib
import shutil
from collections.abc import Collection, Iterable, Sequence
from typing import IO, Any

import click
import orjson

COLUMNS, LINES = 80, 24  # of a terminal that nobody has asked
GAP = "  "


class WrongUsage(click.ClickException):
    """What the command was given does not fit what is there. One line, exit code 2, as for a wrong option."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"embedmesh: {self.message}", file=file, err=file is None)


def print_json(value: object, *, err: bool = False) -> None:
    """One JSON value on one line."""
    click.echo(orjson.dumps(value).decode(), err=err)


def print_table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> None:
    """Columns as wide as their widest cell, those named in `right` flush right; no blanks at a line's end.

    Where the terminal is narrower, each row is its first cell and, below it, the others with their names.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    columns = shutil.get_terminal_size((COLUMNS, LINES)).columns
    if sum(widths) + len(GAP) * (len(widths) - 1) > columns:
        for row in rows:
            click.echo("\n".join(_record(head, row, columns)))
        return
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ]
        click.echo(GAP.join(cells).rstrip())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean A?` for the nearest of what is known; nothing where none is near."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _record(head: Sequence[str], row: Sequence[str], columns: int) -> list[str]:
    """One row over several lines. A cell that says nothing is left out; one that is too long has a line of its own."""
    lines = [row[0]]
    line = ""
    for name, cell in zip(head[1:], row[1:], strict=True):
        if cell in ("", "-"):
            continue
        entry = f"{name}: {cell}"
        if line and len(line) + len(GAP) + len(entry) > columns:
            lines.append(line)
            line = ""
        line += GAP + entry
    return [*lines, line] if line else lines
