"""`embedmesh prices`: what tokens, images and searches of a model cost, from when on, for whom."""

import time
from collections.abc import Sequence
from typing import Any

import click

from embedmesh.commands.operator import Operator, operator_command
from embedmesh.commands.options import MOMENT, USD, catalogue_option
from embedmesh.commands.output import CommandResult, iso_time, table, utc
from embedmesh.rules.holds import Meter
from embedmesh.rules.meters import piece_of, unit_of
from embedmesh.rules.money import format_usd

Row = dict[str, Any]

INPUT = Meter.INPUT.value

meter_option = click.option(
    "--meter",
    default=INPUT,
    show_default=True,
    help="What it is the price of: input, cached, output, searches, or images of a size, as images:1024x1024.",
)
offline_catalogue = catalogue_option("With --offline: the gateway's catalogue, a TOML file. Default: the built-in one.")


@click.group()
def prices() -> None:
    """Set what tokens, images and searches of a model cost.

    An account's own price comes before the price for all accounts, and that before the catalogue's. Each meter has its
    own: input, cached input and output of models that generate, images of each size, and searches of rerankers that the
    catalogue has paid by searches.

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
            unit_of(price["meter"]),
            format_usd(price["price"]),
            utc(price["from_ms"]),
            utc(price["to_ms"]),
            state,
        )
        for price, state in zip(found, states, strict=True)
    ]
    head = ("model", "account", "of", "price", "from", "to", "state")
    value = [_as_json(price) | {"state": state} for price, state in zip(found, states, strict=True)]
    return CommandResult(value, table(head, rows, right=("price",)))


@prices.command("set")
@click.argument("model")
@click.argument("usd", type=USD)
@click.option("--account", help="For this account alone. Default: for all.")
@click.option("--from", "from_ms", type=MOMENT, help="UTC, as 2026-12-01 or 2026-12-01T08:00:00Z. Default: now.")
@meter_option
@offline_catalogue
@operator_command
def set_(
    operator: Operator, model: str, usd: int, account: str | None, from_ms: int | None, meter: str
) -> CommandResult:
    """Set what a million tokens, an image or a search costs, in USD.

    From now or a later time on; on every gateway within a second.

    What was bought before keeps its price. Cached input never costs more than other input.

    \b
    Examples:
      embedmesh prices set all-MiniLM-L6-v2 0.02
      embedmesh prices set all-MiniLM-L6-v2 0.015 --account partner --from 2026-12-01
      embedmesh prices set acme/writer 0.60 --meter output
      embedmesh prices set acme/painter 0.04 --meter images:1024x1024
      embedmesh prices set acme/reranker 0.002 --meter searches
    """
    body = {"model": model, "price": usd, "account": account, "from_ms": from_ms, "meter": meter}
    price = operator.post("prices", body=body)
    unit, is_one = unit_of(meter), piece_of(meter) is not None
    text = (
        f"{unit[0].upper()}{unit[1:]} {'by' if is_one else 'of'} {price['model']} "
        f"{'costs' if is_one else 'cost'} {format_usd(usd)} for {account or 'all accounts'} from "
        f"{utc(price['from_ms'])} UTC on."
    )
    return CommandResult(_as_json(price), text)


@prices.command()
@click.argument("model")
@click.option("--account", help="The price of this account. Default: the one for all.")
@meter_option
@offline_catalogue
@operator_command
def end(operator: Operator, model: str, account: str | None, meter: str) -> CommandResult:
    """End a price now, and withdraw those that were to follow.

    Then the price for all accounts applies, or the catalogue's.

    \b
    Examples:
      embedmesh prices end all-MiniLM-L6-v2
      embedmesh prices end all-MiniLM-L6-v2 --account partner
    """
    whom = account or "all accounts"
    known = operator.delete("prices", model=model, account=account, meter=meter)["model"]
    what = known if meter == INPUT else f"{unit_of(meter)} of {known}"
    text = f"The price of {what} for {whom} has ended, and what was to follow it is withdrawn."
    return CommandResult({"ended": True, "model": known, "account": account, "meter": meter}, text)


def _states(found: Sequence[Row]) -> list[str]:
    """What each price is, of prices whose latest come first: of those that hold at a time the latest counts."""
    now_ms = time.time() * 1000
    counting: set[tuple[str, str, str | None]] = set()
    states = []
    for price in found:
        whom = price["model"], price["meter"], price["account"]
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
        "meter": price["meter"],
        f"price_nanousd_per_{piece_of(price['meter']) or 'million_tokens'}": price["price"],
        "from": iso_time(price["from_ms"]),
        "to": iso_time(price["to_ms"]),
    }
