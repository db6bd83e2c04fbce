"""What commands print: results on stdout, as text or JSON; progress and complaints on stderr."""

import functools
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import click
import orjson

from embedmesh.bulk.usage import WrongUsage as WrongUsage  # for all commands

TERMINAL_COLUMNS, TERMINAL_LINES = 80, 24  # where the output is no terminal
GAP = "  "


class CommandResult(NamedTuple):
    """What a command has to say: `value` with --json, otherwise `text`, and then `note` on stderr."""

    value: object
    text: str
    note: str = ""
    exit_code: int = 0

    def print(self, as_json: bool) -> None:
        """Print it. Exits where the exit code is not 0."""
        if as_json:
            print_json(self.value)
        else:
            if self.text:
                click.echo(self.text)
            if self.note:
                click.echo(self.note, err=True)
        if self.exit_code:
            sys.exit(self.exit_code)


def prints_result(command: Callable[..., CommandResult | None]) -> Callable[..., None]:
    """Gives a command the option --json, and prints what it returns."""

    @functools.wraps(command)
    def run(*, as_json: bool, **given: Any) -> None:
        result = command(**given)
        if result is not None:
            result.print(as_json)

    with_json: Callable[..., None] = click.option("--json", "as_json", is_flag=True, help="Print JSON.")(run)
    return with_json


def print_json(value: object, *, err: bool = False) -> None:
    """One JSON value on one line."""
    click.echo(orjson.dumps(value).decode(), err=err)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right: Collection[str] = ()) -> str:
    """Columns as wide as their widest cell, those named in `right` flush right; no blanks at a line's end.

    Where the terminal is narrower, each row is its first cell and, below it, the others with their names.
    """
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    columns = shutil.get_terminal_size((TERMINAL_COLUMNS, TERMINAL_LINES)).columns
    if sum(widths) + len(GAP) * (len(widths) - 1) > columns:
        return "\n".join(line for row in rows for line in _record(head, row, columns))
    return "\n".join(
        GAP.join(
            cell.rjust(width) if name in right else cell.ljust(width)
            for name, cell, width in zip(head, row, widths, strict=True)
        ).rstrip()
        for row in (head, *rows)
    )


def _record(head: Sequence[str], row: Sequence[str], columns: int) -> Iterator[str]:
    """One row over several lines. Empty cells are left out; a cell that is too long has a line of its own."""
    yield row[0]
    line = ""
    for name, cell in zip(head[1:], row[1:], strict=True):
        if cell in ("", "-"):
            continue
        entry = f"{name}: {cell}"
        if line and len(line) + len(GAP) + len(entry) > columns:
            yield line
            line = ""
        line += GAP + entry
    if line:
        yield line


def utc(unix_ms: int | None) -> str:
    """A time for humans, in UTC; a dash for none."""
    return "-" if unix_ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_ms / 1000))


def iso_time(unix_ms: int | None) -> str | None:
    """A time for programs, as ISO 8601 in UTC. None for none: internal accounts were never created (0)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_ms / 1000)) if unix_ms else None
