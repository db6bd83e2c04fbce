"""`embedmesh accounts statement`: every entry of a month, for a spreadsheet or a program."""

import csv
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

import click

from embedmesh.commands.operator import Operator, operator_command
from embedmesh.commands.output import iso_time
from embedmesh.commands.store import refuse_target
from embedmesh.files import make_draft, sync
from embedmesh.rules.money import plain_usd

Row = dict[str, str | int | None]
Page = dict[str, Any]

STATEMENT_COLUMNS = (
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
    "requests",
    "tab_id",
)
OWN_TEXTS = frozenset({"amount_usd", "balance_usd"})  # texts that are numbers of ours
SAME_NAMES = (
    "amount_nanousd",
    "request_id",
    "reference",
    "key_id",
    "model",
    "tokens",
    "requests",
    "tab_id",
)  # in the admin API
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # what a spreadsheet, here or in Japan, would run or compute


@click.command()
@click.argument("account")
@click.argument("month")
@click.option("--format", "form", type=click.Choice(["csv", "json"]), default="csv", show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write. Default: print it.")
@click.option("--overwrite", is_flag=True, help="Replace the file if it exists.")
@operator_command
def statement(
    operator: Operator, account: str, month: str, form: Literal["csv", "json"], out: Path | None, overwrite: bool
) -> None:
    """Write an account's statement of a month.

    MONTH is as 2026-11 (UTC). Each entry has a line, with the balance after it.

    The first line has the balance at the month's beginning, the last one that at its end, or now. Amounts are in USD
    with all nine decimals, and in nano-USD. What was bought is listed as long as usage is kept. A charge of a tab is
    for several requests: their tokens together, and the model and price that all have in common.

    \b
    Examples:
      embedmesh accounts statement local 2026-11 --out local-2026-11.csv
      embedmesh accounts statement local 2026-11 --json | jq '.[-1].balance_usd'
    """
    given = click.get_current_context().params
    write = write_csv if form == "csv" and not given["as_json"] else write_json
    pages = operator.pages("accounts", account, "statement", cursor="entry_id", month=month)
    if out is not None:
        refuse_target(out, given["data_dir"], overwrite)
    first = next(pages)  # a refusal leaves no file
    with _whole(out) if out is not None else nullcontext(sys.stdout) as file:
        write(file, _rows(first, pages))


def _rows(first: Page, others: Iterable[Page]) -> Iterator[Row]:
    """The opening balance, the entries, and the closing balance: a page at a time is in memory."""
    from_ms, to_ms, balance = first["from_ms"], first["to_ms"], first["opening_nanousd"]
    yield _row(from_ms, "opening balance", balance)
    for page in chain([first], others):
        for line in page["data"]:
            balance += line["amount_nanousd"]
            yield _row(line["created_ms"], line["kind"], balance) | {
                "amount_usd": plain_usd(line["amount_nanousd"]),
                "price_nanousd_per_million_tokens": line["price"],
                **{name: line[name] for name in SAME_NAMES},
            }
    yield _row(max(from_ms, min(to_ms, int(time.time() * 1000))), "closing balance", balance)


def write_csv(file: IO[str], found: Iterable[Row]) -> None:
    """As spreadsheets read it; no cell can be taken for a formula."""
    writer = csv.writer(file, lineterminator="\r\n")  # both are quoted in a cell then, and none begins a row
    writer.writerow(STATEMENT_COLUMNS)
    writer.writerows([_cell(name, row[name]) for name in STATEMENT_COLUMNS] for row in found)


def write_json(file: IO[str], found: Iterable[Row]) -> None:
    """One array, an entry a line."""
    between = "[\n"
    for row in found:
        file.write(between + json.dumps(row, ensure_ascii=False))
        between = ",\n"
    file.write("\n]\n")


def _row(unix_ms: int, kind: str, balance: int) -> Row:
    row: Row = dict.fromkeys(STATEMENT_COLUMNS)
    return row | {
        "time": iso_time(unix_ms),
        "kind": kind,
        "balance_usd": plain_usd(balance),
        "balance_nanousd": balance,
    }


def _cell(name: str, value: str | int | None) -> str | int:
    if isinstance(value, str) and name not in OWN_TEXTS and value.startswith(FORMULA):
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
