"""`embedmesh ledger check` and `embedmesh store backup`: is the money right, and is there a copy of it?"""

import sys
from pathlib import Path

import click
import msgspec

from embedmesh.commands.books import books_of, data_dir_option, json_option, when
from embedmesh.commands.telling import WrongUsage, print_json
from embedmesh.rules.money import format_usd
from embedmesh.settings import BOOTSTRAP, secret_path, store_path
from embedmesh.storage.backup import STORE_SUFFIXES
from embedmesh.storage.check import CheckReport


@click.group()
def ledger() -> None:
    """Check that the money is right.

    The ledger is every movement of money in the store: credits to accounts, holds for running requests, charges for
    delivered ones. Each is written twice, once where it comes from and once where it goes to, so it can be checked.
    """


@ledger.command()
@data_dir_option
@json_option
def check(data_dir: Path, as_json: bool) -> None:
    """Check that all money adds up, while the server runs.

    Looks at every transfer, hold and balance, and at the file itself. The exit status is 1 if something is wrong.

    \b
    Examples:
      embedmesh ledger check
      embedmesh ledger check --json
    """
    with books_of(data_dir) as books:
        report = books.check()
    if as_json:
        print_json({"ok": report.ok, **msgspec.to_builtins(report)})
        sys.exit(0 if report.ok else 1)
    broken = {row.promise for row in report.broken}
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
    sys.exit(0 if report.ok else 1)


def _tell_verdict(report: CheckReport) -> None:
    looked_at = len(report.promises)
    if report.ok:
        click.echo(f"The money adds up: nothing is wrong in any of the {looked_at} things that were checked.")
        return
    wrong = len({row.promise for row in report.broken})
    click.echo(f"THE MONEY DOES NOT ADD UP: {wrong} of the {looked_at} things that were checked are wrong.")
    click.echo("Stop the gateway, keep embedmesh.db as it is, and go back to a backup that passes this check.")


@click.group()
def store() -> None:
    """Back up the store: accounts, keys, ledger.

    The store is the file embedmesh.db in the data directory. Copying it with cp while the server runs gives a copy
    that may be torn; `store backup` gives a whole one.
    """


@store.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace TARGET where it is there already.")
@data_dir_option
@json_option
def backup(target: Path, overwrite: bool, data_dir: Path, as_json: bool) -> None:
    """Write a whole copy of the store, while the server runs.

    To restore, stop `embedmesh serve` and put the copy in the place of embedmesh.db, without the old -wal and -shm
    files. The key secret (key.secret) is not in the copy: keep it apart.

    \b
    Example:
      embedmesh store backup ./embedmesh-2026-11-23.db
    """
    _refuse_target(target, data_dir, overwrite)
    with books_of(data_dir) as books:
        books.backup(target, overwrite=overwrite)
    size = target.stat().st_size
    if as_json:
        print_json({"file": str(target), "bytes": size})
        return
    click.echo(f"{target}: {size:,} bytes.")


def _refuse_target(target: Path, data_dir: Path, overwrite: bool) -> None:
    """Raise WrongUsage where a copy would destroy what the server lives on, or an older copy unasked."""
    for file in _files_in_use(data_dir):
        if target.resolve() == file.resolve() or (target.exists() and file.exists() and target.samefile(file)):
            raise WrongUsage(f"{target} belongs to the server itself ({file.name}). Give the copy another name.")
    if target.exists() and not overwrite:
        raise WrongUsage(f"{target} is there already. Give another name, or --overwrite it.")


def _files_in_use(data_dir: Path) -> list[Path]:
    store = store_path(data_dir)
    of_the_store = [store.with_name(store.name + suffix) for suffix in STORE_SUFFIXES]
    return [*of_the_store, secret_path(data_dir), data_dir / "serve.lock", data_dir / BOOTSTRAP]
