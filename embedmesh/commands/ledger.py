"""`embedmesh ledger`: is the money right, and what became of one request?"""

import re
import sys
from pathlib import Path

import click
import msgspec

from embedmesh.commands.books import books_of, data_dir_option, json_option, store_of, told, when
from embedmesh.commands.explain import explain, refund
from embedmesh.commands.telling import print_json
from embedmesh.rules.money import format_usd
from embedmesh.storage.books.session import translated
from embedmesh.storage.engines import engine_of
from embedmesh.storage.ledger.chain import START
from embedmesh.storage.ledger.check import CheckReport
from embedmesh.storage.sql import CHAIN_SQL
from embedmesh.storage.sqlite.database import OPEN_BUSY_S

HEAD = re.compile(r"[0-9a-f]{64}")


def _as_head(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    if text is not None and not HEAD.fullmatch(text):
        raise click.BadParameter("a head is 64 of the digits 0-9 a-f.", ctx=context, param=option)
    return text


@click.group()
def ledger() -> None:
    """Check that the money is right; explain charges, refund them.

    The ledger is every movement of money in the store: credits to accounts, holds for running requests, charges for
    delivered ones. Each is written twice, once where it comes from and once where it goes to, so it can be checked.
    """


for command in (explain, refund):
    ledger.add_command(command)


@ledger.command()
@click.option("--head", "noted", callback=_as_head, help="A head of the chain that was noted down before.")
@data_dir_option
@json_option
def check(noted: str | None, data_dir: Path, as_json: bool) -> None:
    """Check that all money adds up, while the server runs.

    Looks at every transfer, hold and balance, and at the file itself. The exit status is 1 if something is wrong.

    Running gateways cover every transfer by a chain of hashes within seconds. Note its head down where nobody who can
    write to the store can write; with --head it is looked for in the chain, and nothing before it was changed where
    it is found.

    \b
    Examples:
      embedmesh ledger check
      embedmesh ledger check --json | jq -r .head.hash >> heads.txt
      embedmesh ledger check --head "$(tail -1 heads.txt)"
    """
    with books_of(data_dir) as books:
        report = books.check()
    known = noted is None or noted in _heads(data_dir)
    ok = report.ok and known
    if as_json:
        said = {} if noted is None else {"head_known": known}
        print_json({"ok": ok, **said, **msgspec.to_builtins(report)})
        sys.exit(0 if ok else 1)
    broken = {row.promise for row in report.broken}
    if not known:
        click.echo(f"THE CHAIN HAS NO HEAD {noted}: what it covered was changed, or this is another store.")
    _tell_verdict(report)
    for promise in report.promises:
        click.echo(f"{'BROKEN' if promise in broken else 'ok':<7} {promise.replace('_', ' ')}")
    for row in report.broken:
        click.echo(f"  {row.promise.replace('_', ' ')}: {row.subject}: {row.detail}")
    for hold in report.recovered:
        click.echo(
            f"  in flight at a crash, not charged: {hold.hold_id} of {hold.account_id}, "
            f"{format_usd(hold.amount_nanousd)}, {when(hold.ended_ms)}"
        )
    click.echo("counted: " + ", ".join(f"{name.replace('_', ' ')} {count:,}" for name, count in report.tallies.items()))
    head = report.head
    click.echo(f"chain: {head.transfers:,} transfers in {head.blocks:,} blocks, head {head.hash}")
    sys.exit(0 if ok else 1)


def _heads(data_dir: Path) -> set[str]:
    """Every head that the chain ever had."""
    db = engine_of(store_of(data_dir)).connect(busy_s=OPEN_BUSY_S, read_only=True)
    try:
        with told(), translated():
            return {START.hex(), *(found.hex() for _, _, found in db.execute(CHAIN_SQL["all_blocks"]).fetchall())}
    finally:
        db.close()


def _tell_verdict(report: CheckReport) -> None:
    looked_at = len(report.promises)
    if report.ok:
        click.echo(f"The money adds up: nothing is wrong in any of the {looked_at} things that were checked.")
        return
    wrong = len({row.promise for row in report.broken})
    click.echo(f"THE MONEY DOES NOT ADD UP: {wrong} of the {looked_at} things that were checked are wrong.")
    click.echo("Stop the gateway, keep embedmesh.db as it is, and go back to a backup that passes this check.")
