"""`embedmesh prices`: what tokens of a model cost, from when on, for whom."""

import time
from collections.abc import Sequence
from pathlib import Path

import click

from embedmesh.commands.books import books_of, data_dir_option, iso_time, json_option, when
from embedmesh.commands.catalogued import model_id, model_ids
from embedmesh.commands.models import catalogue_option
from embedmesh.commands.options import MOMENT, USD
from embedmesh.commands.telling import print_json, print_table
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.prices import Price

ROWS_MAX = 100_000  # shown at one time


@click.group()
def prices() -> None:
    """Set what tokens of a model cost.

    The price of an account comes before that for all accounts, and that before the catalogue's.
    """


@prices.command("list")
@click.argument("model", required=False)
@catalogue_option
@data_dir_option
@json_option
def list_(model: str | None, catalogue: Path | None, data_dir: Path, as_json: bool) -> None:
    """List the prices that were set.

    Of a model or of all; past and coming ones too.

    \b
    Example:
      embedmesh prices list all-MiniLM-L6-v2
    """
    with books_of(data_dir) as books:
        found = books.prices.list(model_id(model, catalogue) if model else None, rows_max=ROWS_MAX)
    states = _states(found)
    if as_json:
        print_json([_as_json(price) | {"state": state} for price, state in zip(found, states, strict=True)])
        return
    rows = [
        (
            price.model,
            price.account_id or "all",
            format_usd(price.price),
            when(price.from_ms),
            when(price.to_ms),
            state,
        )
        for price, state in zip(found, states, strict=True)
    ]
    head = ("model", "account", "a million tokens", "from", "to", "state")
    print_table(head, rows, right=("a million tokens",))


@prices.command("set")
@click.argument("model")
@click.argument("usd", type=USD)
@click.option("--account", help="For this account alone. Default: for all.")
@click.option("--from", "from_ms", type=MOMENT, help="UTC, as 2026-12-01 or 2026-12-01T08:00:00Z. Default: now.")
@catalogue_option
@data_dir_option
@json_option
def set_(
    model: str,
    usd: int,
    account: str | None,
    from_ms: int | None,
    catalogue: Path | None,
    data_dir: Path,
    as_json: bool,
) -> None:
    """Set what a million tokens of a model cost, in USD.

    From now or a later time on; on every gateway within a second.

    What was bought before keeps its price.

    \b
    Examples:
      embedmesh prices set all-MiniLM-L6-v2 0.02
      embedmesh prices set all-MiniLM-L6-v2 0.015 --account partner --from 2026-12-01
    """
    (known,) = model_ids([model], catalogue)
    with books_of(data_dir) as books:
        price = books.prices.set(known, usd, account_id=account, from_ms=from_ms)
    if as_json:
        print_json(_as_json(price))
        return
    click.echo(
        f"A million tokens of {known} cost {format_usd(usd)} for {account or 'all accounts'} from "
        f"{when(price.from_ms)} UTC on."
    )


@prices.command()
@click.argument("model")
@click.option("--account", help="The price of this account. Default: the one for all.")
@catalogue_option
@data_dir_option
@json_option
def end(model: str, account: str | None, catalogue: Path | None, data_dir: Path, as_json: bool) -> None:
    """Let the price that was set end now, what was to follow it too.

    Then the price for all accounts counts, or the catalogue's.

    \b
    Examples:
      embedmesh prices end all-MiniLM-L6-v2
      embedmesh prices end all-MiniLM-L6-v2 --account partner
    """
    known = model_id(model, catalogue)
    with books_of(data_dir) as books:
        ended = books.prices.end(known, account_id=account)
    whom = account or "all accounts"
    if not ended:
        raise click.ClickException(f"No price of {known} is set for {whom}. `embedmesh prices list` shows them.")
    if as_json:
        print_json({"ended": True, "model": known, "account": account})
        return
    click.echo(f"The price of {known} for {whom} has ended, and what was to follow it is withdrawn.")


def _states(found: Sequence[Price]) -> list[str]:
    """What each price is, of prices whose latest come first: of those that hold at a time the latest counts."""
    now_ms = time.time() * 1000
    counting: set[tuple[str, str | None]] = set()
    states = []
    for price in found:
        whom = price.model, price.account_id
        if price.to_ms is not None and price.to_ms <= max(now_ms, price.from_ms):
            states.append("withdrawn" if price.to_ms <= price.from_ms else "over")
        elif price.from_ms > now_ms:
            states.append("to come")
        else:
            states.append("replaced" if whom in counting else "in force")
            counting.add(whom)
    return states


def _in_force(found: Sequence[Price]) -> list[Price]:
    return [price for price, state in zip(found, _states(found), strict=True) if state == "in force"]


def _as_json(price: Price) -> dict[str, object]:
    return {
        "model": price.model,
        "account": price.account_id,
        "price_nanousd_per_million_tokens": price.price,
        "from": iso_time(price.from_ms),
        "to": iso_time(price.to_ms),
    }
