"""`embedmesh nodes payables` and `pay`: what nodes have earned, and noting that their operators were paid."""

import click

from embedmesh.commands.operator import ApiRefusal, Operator, operator_command
from embedmesh.commands.options import USD, reference_option
from embedmesh.commands.output import CommandResult, table
from embedmesh.rules.money import format_usd


@click.command()
@operator_command
def payables(operator: Operator) -> CommandResult:
    """List what each node has earned and was not paid out.

    \b
    Example:
      embedmesh nodes payables
    """
    earned = _earned(operator)
    rows = [(node, format_usd(amount)) for node, amount in earned.items()]
    value = [{"node": node, "payable_nanousd": amount} for node, amount in earned.items()]
    return CommandResult(value, table(("node", "to be paid"), rows, right=("to be paid",)))


@click.command()
@click.argument("node")
@click.argument("usd", type=USD)
@reference_option
@operator_command
def pay(operator: Operator, node: str, usd: int, reference: str) -> CommandResult:
    """Note that a node's operator was paid USD. No money is sent. NODE is its id.

    \b
    Example:
      embedmesh nodes pay node_5d41402abc4b2a76b9719d911017c592 12.50 --reference transfer-2026-118
    """
    body = {"node": node, "amount_nanousd": usd, "reference": reference}
    try:
        applied = operator.post("payouts", body=body)["applied"]
    except ApiRefusal as refusal:
        if refusal.code != "not_found":
            raise
        raise click.ClickException(
            f"{node[:64]} has earned nothing yet. `embedmesh nodes payables` lists the nodes that have."
        ) from None
    left = _earned(operator).get(node, 0)
    what = f"{format_usd(usd)} paid out" if applied else "Nothing done: that reference was applied before"
    value = {"applied": applied, "node": node, "payable_nanousd": left}
    return CommandResult(value, f"{what}; {node} is to be paid {format_usd(left)}.")


def _earned(operator: Operator) -> dict[str, int]:
    return {row["node_id"]: row["balance_nanousd"] for row in operator.get("payables")["data"]}
