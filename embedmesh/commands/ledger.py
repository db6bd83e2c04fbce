"""`embedmesh ledger`: is the money right, and what became of one request?"""

import re
from collections.abc import Iterator
from typing import Any

import click

from embedmesh.commands.explain import explain, refund
from embedmesh.commands.operator import ApiRefusal, Operator, operator_command
from embedmesh.commands.output import CommandResult, utc
from embedmesh.rules.money import format_usd

CHAIN_HEAD = re.compile(r"[0-9a-f]{64}")


def _chain_head(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None and not CHAIN_HEAD.fullmatch(text):
        raise click.BadParameter("a head is 64 of the digits 0-9 a-f.", ctx=context, param=option)
    return text


@click.group()
def ledger() -> None:
    """Check that the money is right; explain charges, refund them.

    The ledger is every movement of money in the store: credits to accounts, holds for running requests, charges for
    delivered ones. Each is written twice, once where it comes from and once where it goes to, so it can be checked.

    \b
    Example:
      embedmesh ledger check
    """


for command in (explain, refund):
    ledger.add_command(command)


@ledger.command()
@click.option("--head", callback=_chain_head, help="A head of the chain, or of the audit, that was noted down before.")
@operator_command
def check(operator: Operator, head: str | None) -> CommandResult:
    """Check that all money adds up, while the server runs.

    Checks every transfer, hold and balance, and the file itself. The exit status is 1 if something is wrong. A gateway
    gives up after a minute; for a large store use --offline, which also works while gateways run.

    Running gateways cover every transfer by a chain of hashes within seconds, and with it the audit until then (see
    `embedmesh audit`), whose acts are a chain, too. Note the heads down where nobody who can write to the store can
    write; --head looks for one, and if it is found, nothing before it was changed.

    \b
    Examples:
      embedmesh ledger check
      embedmesh ledger check --json | jq -r .head.hash >> heads.txt
      embedmesh ledger check --head "$(tail -1 heads.txt)"
    """
    try:
        report = operator.get("ledger", head=head)
    except ApiRefusal as refusal:
        if refusal.code != "store_unavailable":
            raise
        raise click.ClickException(f"{refusal.message} With --offline a check may take as long as it needs.") from None
    lines = list(_lines(report))
    if head is None:
        del report["head_known"]
    elif not report["head_known"]:
        lines.insert(0, f"THE CHAIN HAS NO HEAD {head}: what it covered was changed, or this is another store.")
    return CommandResult(report, "\n".join(lines), exit_code=0 if report["ok"] else 1)


def _lines(report: dict[str, Any]) -> Iterator[str]:
    checked, broken = len(report["promises"]), {row["promise"] for row in report["broken"]}
    if broken == {"audit_holds"}:
        yield "THE AUDIT WAS CHANGED, by somebody who can write to the store. The money adds up."
    elif broken:
        yield f"THE MONEY DOES NOT ADD UP: {len(broken)} of the {checked} things that were checked are wrong."
        yield "Stop the gateway, keep embedmesh.db as it is, and go back to a backup that passes this check."
    else:
        yield f"The money adds up: nothing is wrong in any of the {checked} things that were checked."
    for promise in report["promises"]:
        yield f"{'BROKEN' if promise in broken else 'ok':<7} {promise.replace('_', ' ')}"
    for row in report["broken"]:
        yield f"  {row['promise'].replace('_', ' ')}: {row['subject']}: {row['detail']}"
    for hold in report["recovered"]:
        yield (
            f"  in flight at a crash, not charged: {hold['hold_id']} of {hold['account_id']}, "
            f"{format_usd(hold['amount_nanousd'])}, {utc(hold['ended_ms'])}"
        )
    yield "counted: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report["tallies"].items())
    head, audit = report["head"], report["audit"]
    yield f"audit: {audit['acts']:,} acts, head {audit['hash']}"
    yield f"chain: {head['transfers']:,} transfers in {head['blocks']:,} blocks, head {head['hash']}"
