"""`embedmesh prices`: what tokens of a model cost, from when on, for whom."""

import time
from collections.abc import Sequence
from typing import Any

import click

from embedmesh.commands.operator import Operator, operator_command
from embedmesh.commands.options import MOMENT, USD, catalogue_option
from embedmesh.commands.output import CommandResult, iso_time, table, utc
from embedmesh.rules.money import format_usd

Row = dict[str, Any]

offline_catalogue = catalogue_option("With --offline: the gateway's catalogue, a TOML file. Default: the built-in one.")


@click.group()
def prices() -> None:
    """Set what tokens of a model cost.

    An account's own price comes before the price for all accounts, and that before the catalogue's.

    \b
    Example:
      embedmesh prices set all-MiniLM-L6-v2 0.02
    """


@prices.command("list")
@click.argument("model", required=False)
@offline_catalogue
@operator_command
def list_(operator: Operator, model: str | None) -> CommandResult:
    """List the prices that were set, past and coming ones too.

    \b
    Example:
      embedmesh prices list all-MiniLM-L6-v2
    """
    found = operator.rows("prices", cursor="price_id", model=model)
    states = _states(found)
    rows = [
        (
            price["model"],
            price["account"] or "all",
            format_usd(price["price"]),
            utc(price["from_ms"]),
            utc(price["to_ms"]),
            state,
        )
        for price, state in zip(found, states, strict=True)
    ]
    head = ("model", "account", "a million tokens", "from", "to", "state")
    value = [_as_json(price) | {"state": state} for price, state in zip(found, states, strict=True)]
    return CommandResult(value, table(head, rows, right=("a million tokens",)))


@prices.command("set")
@click.argument("model")
@click.argument("usd", type=USD)
@click.option("--account", help="For this account alone. Default: for all.")
@click.option("--from", "from_ms", type=MOMENT, help="UTC, as 2026-12-01 or 2026-12-01T08:00:00Z. Default: now.")
@offline_catalogue
@operator_command
def set_(operator: Operator, model: str, usd: int, account: str | None, from_ms: int | None) -> CommandResult:
    """Set what a million tokens of a model cost, in USD.

    From now or a later time on; on every gateway within a second.

    What was bought before keeps its price.

    \b
    Examples:
      embedmesh prices set all-MiniLM-L6-v2 0.02
      embedmesh prices set all-MiniLM-L6-v2 0.015 --account partner --from 2026-12-01
    """
    price = operator.post("prices", body={"model": model, "price": usd, "account": account, "from_ms": from_ms})
    text = (
        f"A million tokens of {price['model']} cost {format_usd(usd)} for {account or 'all accounts'} from "
        f"{utc(price['from_ms'])} UTC on."
    )
    return CommandResult(_as_json(price), text)


@prices.command()
@click.argument("model")
@click.option("--account", help="The price of this account. Default: the one for all.")
@offline_catalogue
@operator_command
def end(operator: Operator, model: str, account: str | None) -> CommandResult:
    """End a price now, and withdraw those that were to follow.

    Then the price for all accounts applies, or the catalogue's.

    \b
    Examples:
      embedmesh prices end all-MiniLM-L6-v2
      embedmesh prices end all-MiniLM-L6-v2 --account partner
    """
    whom = account or "all accounts"
    known = operator.delete("prices", model=model, account=account)["model"]
    text = f"The price of {known} for {whom} has ended, and what was to follow it is withdrawn."
    return CommandResult({"ended": True, "model": known, "account": account}, text)


def _states(found: Sequence[Row]) -> list[str]:
    """What each price is, of prices whose latest come first: of those that hold at a time the latest counts."""
    now_ms = time.time() * 1000
    counting: set[tuple[str, str | None]] = set()
    states = []
    for price in found:
        whom = price["model"], price["account"]
        if price["to_ms"] is not None and price["to_ms"] <= max(now_ms, price["from_ms"]):
            states.append("withdrawn" if price["to_ms"] <= price["from_ms"] else "over")
        elif price["from_ms"] > now_ms:
            states.append("to come")
        else:
            states.append("replaced" if whom in counting else "in force")
            counting.add(whom)
    return states


def _as_json(price: Row) -> Row:
    return {
        "model": price["model"],
        "account": price["account"],
        "price_nanousd_per_million_tokens": price["price"],
        "from": iso_time(price["from_ms"]),
        "to": iso_time(price["to_ms"]),
    }
