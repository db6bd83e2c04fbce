"""`embedmesh accounts statement`: every entry of a month, for a spreadsheet or a program."""

import csv
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

import click

from embedmesh.commands.books import books_of, data_dir_option, iso_time, json_option
from embedmesh.commands.store import refuse_target
from embedmesh.files import make_draft, sync
from embedmesh.rules.money import plain_usd
from embedmesh.storage.books import Books
from embedmesh.storage.books.reports import StatementLine
from embedmesh.storage.times import month_span_ms

Row = dict[str, str | int | None]

COLUMNS = (
    "time",
    "kind",
    "amount_usd",
    "amount_nanousd",
    "balance_usd",
    "balance_nanousd",
    "request_id",
    "reference",
    "key_id",
    "model",
    "tokens",
    "price_nanousd_per_million_tokens",
)
NUMBERS = frozenset({"amount_usd", "balance_usd"})  # ours, though they are text
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # what a spreadsheet, here or in Japan, would run or compute


@click.command()
@click.argument("account")
@click.argument("month")
@click.option("--format", "form", type=click.Choice(["csv", "json"]), default="csv", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write. Default: print it.")
@click.option("--overwrite", is_flag=True, help="Replace the file where it is there already.")
@data_dir_option
@json_option
def statement(
    account: str,
    month: str,
    form: Literal["csv", "json"],
    out: Path | None,
    overwrite: bool,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Write an account's statement of a month.

    MONTH is as 2026-11 (UTC). A line an entry, with the balance after it.

    The first line has the balance at the month's beginning, the last one that at its end, or now. Amounts stand in
    USD with all nine decimals, and in nano-USD. What was bought is told as long as usage is kept.

    \b
    Examples:
      embedmesh accounts statement local 2026-11 --out local-2026-11.csv
      embedmesh accounts statement local 2026-11 --json | jq '.[-1].balance_usd'
    """
    write: Callable[[IO[str], Iterable[Row]], None] = write_csv if form == "csv" and not as_json else write_json
    if out is None:
        with books_of(data_dir) as books:
            write(sys.stdout, rows(books, account, month))
        return
    refuse_target(out, data_dir, overwrite)
    with books_of(data_dir) as books, _whole(out) as file:
        write(file, rows(books, account, month))


def rows(books: Books, account: str, month: str) -> Iterator[Row]:
    """The opening balance, the entries, and the closing balance. Raises NotFound, InvalidValue, StoreUnavailable."""
    from_ms, to_ms = month_span_ms(month)
    lines = books.reports.statement(account, month)
    return _rows(lines, books.reports.balance_at(account, from_ms), from_ms, to_ms)


def write_csv(file: IO[str], found: Iterable[Row]) -> None:
    """As spreadsheets read it; no cell can be taken for a formula."""
    writer = csv.writer(file, lineterminator="\r\n")  # both are quoted in a cell then, and none begins a row
    writer.writerow(COLUMNS)
    writer.writerows([_cell(name, row[name]) for name in COLUMNS] for row in found)


def write_json(file: IO[str], found: Iterable[Row]) -> None:
    """One array, an entry a line."""
    between = "[\n"
    for row in found:
        file.write(between + json.dumps(row, ensure_ascii=False))
        between = ",\n"
    file.write("\n]\n")


def _rows(lines: Iterable[StatementLine], balance: int, from_ms: int, to_ms: int) -> Iterator[Row]:
    yield _row(from_ms, "opening balance", balance)
    for line in lines:
        balance += line.amount
        yield _row(line.created_ms, line.kind, balance) | {
            "amount_usd": plain_usd(line.amount),
            "amount_nanousd": line.amount,
            "request_id": line.request_id,
            "reference": line.reference,
            "key_id": line.key_id,
            "model": line.model,
            "tokens": line.tokens,
            "price_nanousd_per_million_tokens": line.price,
        }
    yield _row(max(from_ms, min(to_ms, int(time.time() * 1000))), "closing balance", balance)


def _row(unix_ms: int, kind: str, balance: int) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    return row | {
        "time": iso_time(unix_ms),
        "kind": kind,
        "balance_usd": plain_usd(balance),
        "balance_nanousd": balance,
    }


def _cell(name: str, value: str | int | None) -> str | int:
    if isinstance(value, str) and name not in NUMBERS and value.startswith(FORMULA):
        return "'" + value
    return "" if value is None else value


@contextmanager
def _whole(out: Path) -> Iterator[IO[str]]:
    """A file (mode 0600) that has its name only once it is whole."""
    try:
        draft, descriptor = make_draft(out)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
                yield file
            sync(draft)
            draft.replace(out)
        except BaseException:
            with suppress(FileNotFoundError):
                draft.unlink()
            raise
    except OSError as error:
        raise click.ClickException(f"Cannot write {out}: {error.strerror}.") from None
