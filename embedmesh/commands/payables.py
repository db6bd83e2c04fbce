"""`embedmesh nodes payables` and `pay`: what nodes have earned, and noting that their operators were paid."""

from pathlib import Path

import click

from embedmesh.commands.books import books_of, data_dir_option, json_option, reference_option
from embedmesh.commands.options import USD
from embedmesh.commands.telling import print_json, print_table
from embedmesh.rules.errors import NotFound
from embedmesh.rules.money import format_usd


@click.command()
@data_dir_option
@json_option
def payables(data_dir: Path, as_json: bool) -> None:
    """List what each node has earned and was not paid out.

    \b
    Example:
      embedmesh nodes payables
    """
    with books_of(data_dir) as books:
        found = books.accounts.payables()
    if as_json:
        print_json([{"node": each.node_id, "payable_nanousd": each.balance_nanousd} for each in found])
        return
    rows = [(each.node_id, format_usd(each.balance_nanousd)) for each in found]
    print_table(("node", "to be paid"), rows, right=("to be paid",))


@click.command()
@click.argument("node")
@click.argument("usd", type=USD)
@reference_option
@data_dir_option
@json_option
def pay(node: str, usd: int, reference: str, data_dir: Path, as_json: bool) -> None:
    """Note that a node's operator was paid USD. No money is sent. NODE is its id.

    \b
    Example:
      embedmesh nodes pay node_5d41402abc4b2a76b9719d911017c592 12.50 --reference transfer-2026-118
    """
    with books_of(data_dir) as books:
        try:
            applied = books.accounts.pay_out(node, usd, reference)
        except NotFound:
            raise click.ClickException(
                f"{node[:64]} has earned nothing yet. `embedmesh nodes payables` lists the nodes that have."
            ) from None
        left = next((each.balance_nanousd for each in books.accounts.payables() if each.node_id == node), 0)
    if as_json:
        print_json({"applied": applied, "node": node, "payable_nanousd": left})
        return
    what = f"{format_usd(usd)} paid out" if applied else "Nothing done: that reference was applied before"
    click.echo(f"{what}; {node} is to be paid {format_usd(left)}.")
