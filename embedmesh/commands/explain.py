"""`embedmesh ledger explain` and `refund`: what became of one request, and giving back what it cost."""

from pathlib import Path

import click
import msgspec

from embedmesh.commands.books import books_of, data_dir_option, iso_time, json_option, reference_option, when
from embedmesh.commands.options import USD
from embedmesh.commands.telling import print_json
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.reports import Bought, Explained, Move

ENDS = {
    "capture": "the reply was delivered, and {captured} of it charged",
    "release": "no reply was delivered: released, nothing is charged",
    "expire": "its deadline passed and nobody had ended it: released, nothing is charged",
    "recover": "its gateway had died while it ran: released, nothing is charged",
}


@click.command()
@click.argument("request_id")
@data_dir_option
@json_option
def explain(request_id: str, data_dir: Path, as_json: bool) -> None:
    """Tell what the ledger knows of a request.

    When it was held and ended, what for, and every move of money.

    \b
    Examples:
      embedmesh ledger explain req_019aa0b4c0de…
      embedmesh ledger explain req_019aa0b4c0de… --json
    """
    with books_of(data_dir) as books:
        found = books.reports.explain(request_id)
    if as_json:
        print_json(_as_json(found))
        return
    click.echo(f"Request {found.request_id} of {found.account_id}, with {found.key_id or 'a key that is not known'}")
    for unix_ms, what in _story(found):
        click.echo(f"  {when(unix_ms)}.{unix_ms % 1000:03}  {what}")


@click.command()
@click.argument("request_id")
@click.argument("usd", type=USD, required=False)
@reference_option
@data_dir_option
@json_option
def refund(request_id: str, usd: int | None, reference: str, data_dir: Path, as_json: bool) -> None:
    """Give back what a request cost, or USD of it. Nodes keep what they have earned.

    \b
    Examples:
      embedmesh ledger refund req_019aa0b4c0de… --reference ticket-118
      embedmesh ledger refund req_019aa0b4c0de… 0.002 --reference ticket-119
    """
    with books_of(data_dir) as books:
        applied, amount = books.accounts.refund(request_id, usd, reference)
        account = books.accounts.find(books.reports.explain(request_id).account_id)
    if as_json:
        said = {"account": account.account_id, "available_nanousd": account.available_nanousd}
        print_json({"applied": applied, "amount_nanousd": amount, **said})
        return
    what = f"{format_usd(amount)} given back" if applied else "Nothing done: that reference was applied before"
    click.echo(f"{what}; {account.account_id} has {format_usd(account.available_nanousd)} available.")


def _story(found: Explained) -> list[tuple[int, str]]:
    """What happened, in its order."""
    story = [(found.created_ms, f"{format_usd(found.held)} held by gateway {found.gateway}")]
    if found.ended_ms is None or found.ended_by is None:
        return [*story, (found.deadline_ms, "its deadline: it runs, and is released then at the latest")]
    end = ENDS[found.ended_by].format(captured=format_usd(found.captured or 0))
    story.append((found.ended_ms, end))
    if found.state == "captured":
        story.append((found.ended_ms, _what_for(found.bought)))
    return [*story, *((move.created_ms, _moved(move)) for move in found.moves)]


def _what_for(bought: Bought | None) -> str:
    if bought is None:
        return "what it was for is not kept any more"
    price = "" if bought.price is None else f" at {format_usd(bought.price)} a million"
    user = "" if bought.user_hash is None else f", for user {bought.user_hash}"
    return f"for {bought.tokens:,} tokens of {bought.model}{price}, by node {bought.node_id}{user}"


def _moved(move: Move) -> str:
    reference = "" if move.reference is None else f", reference {move.reference}"
    return f"{move.kind}: {format_usd(move.amount)} from {move.source_id} to {move.target_id}{reference}"


def _as_json(found: Explained) -> dict[str, object]:
    """As the ledger has it, with the hold's times for people, too. Amounts are nano-USD."""
    times = {"created": found.created_ms, "deadline": found.deadline_ms, "ended": found.ended_ms}
    return {**msgspec.to_builtins(found), **{name: iso_time(unix_ms) for name, unix_ms in times.items()}}
