"""`embedmesh store`: a copy of accounts, keys and ledger, and bringing them to this program's version."""

import asyncio
from pathlib import Path

import click
from rich.progress import BarColumn, MofNCompleteColumn

from embedmesh.commands.offline import books_of, named_store, store_of
from embedmesh.commands.options import data_dir_option
from embedmesh.commands.output import CommandResult, WrongUsage, prints_result
from embedmesh.commands.progress import ProgressBar
from embedmesh.credentials import BOOTSTRAP
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.errors import Failure
from embedmesh.settings import secret_path, store_path
from embedmesh.storage.copy import copy as copy_store
from embedmesh.storage.engines import engine_of
from embedmesh.storage.migrate import newest
from embedmesh.storage.postgres.database import PostgresEngine
from embedmesh.storage.sqlite.backup import STORE_SUFFIXES
from embedmesh.storage.sqlite.database import OPEN_BUSY_S, SqliteEngine


@click.group()
def store() -> None:
    """Make, back up, migrate and move the store: accounts, keys, ledger.

    The store is the file embedmesh.db in the data directory, or what EMBEDMESH_STORE names. These commands open it
    themselves, on its own machine. Copying the file with cp while the server runs gives a copy that may be torn;
    `store backup` gives a whole one. A PostgreSQL store is backed up with PostgreSQL's own tools.

    \b
    Example:
      embedmesh store backup ./embedmesh-2026-11-23.db
    """


@store.command()
@click.option(
    "--base-url", default="http://127.0.0.1:8080/v1", show_default=True, help="The endpoint that bootstrap.json names."
)
@data_dir_option
@prints_result
def init(base_url: str, data_dir: Path) -> CommandResult:
    """Make the store, a first account and its keys.

    As the first start of `embedmesh serve` does, for gateways that run without it, as in containers. The keys are in
    bootstrap.json in the data directory. Where that file is there already nothing is made but the endpoint noted.

    \b
    Example:
      EMBEDMESH_STORE=postgresql://embedmesh@db.internal/embedmesh embedmesh store init
    """
    place = named_store() or store_path(data_dir)
    try:
        made = bootstrap(data_dir, base_url, place)
    except Failure as failure:
        raise click.ClickException(failure.message) from None
    path = data_dir.absolute() / BOOTSTRAP
    text = f"The keys of the account {made.account} are in {path} (readable by you only)."
    return CommandResult({"bootstrap": str(path), "account": made.account, "base_url": made.base_url}, text)


@store.command()
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace TARGET if it exists.")
@data_dir_option
@prints_result
def backup(target: Path, overwrite: bool, data_dir: Path) -> CommandResult:
    """Write a whole copy of the store, while the server runs.

    To restore, stop `embedmesh serve` and put the copy in the place of embedmesh.db, without the old -wal and -shm
    files. The key secret (key.secret) is not in the copy: keep it apart.

    \b
    Example:
      embedmesh store backup ./embedmesh-2026-11-23.db
    """
    refuse_target(target, data_dir, overwrite)
    with books_of(data_dir) as books:
        books.backup(target, overwrite=overwrite)
    size = target.stat().st_size
    return CommandResult({"file": str(target), "bytes": size}, f"{target}: {size:,} bytes.")


@store.command()
@data_dir_option
@prints_result
def migrate(data_dir: Path) -> CommandResult:
    """Bring the store to this program's version.

    Stop all gateways of the store first: those of the older version cannot use it any more. Back it up before; there is
    no way back. A store that has this version already is not changed.

    \b
    Example:
      embedmesh store migrate
    """
    engine = engine_of(store_of(data_dir))
    db = engine.connect(busy_s=OPEN_BUSY_S)
    try:
        before = engine.version(db)
    finally:
        db.close()
    with books_of(data_dir, migrating=True):
        after = newest(engine)
    text = f"{engine.shown} was migrated from version {before} to {after}."
    if before == after:
        text = f"Nothing was to be done: {engine.shown} has version {after}."
    return CommandResult({"store": engine.shown, "from_version": before, "to_version": after}, text)


@store.command()
@click.argument("target")
@data_dir_option
@prints_result
def copy(target: str, data_dir: Path) -> CommandResult:
    """Move the store from its file to a PostgreSQL server.

    All of it, or nothing. TARGET is the postgresql:// address of a new database. Stop the server first. The copy is
    kept only if every promise of the ledger holds in the new store, and the totals of each table are those of the old
    one. The file stays as it was; from then on start with EMBEDMESH_STORE set to TARGET, and with the same key.secret.

    \b
    Example:
      embedmesh store copy postgresql://embedmesh@db.internal/embedmesh
    """
    new = engine_of(target)
    if not isinstance(new, PostgresEngine):
        raise WrongUsage("TARGET is the address of a PostgreSQL database: postgresql://USER@HOST/DATABASE.")
    old = SqliteEngine(store_path(data_dir))
    with ProgressBar("{task.description}", BarColumn(), MofNCompleteColumn()) as bar:
        try:
            copied = asyncio.run(copy_store(old, new, bar.show))
        except Failure as failure:
            raise click.ClickException(failure.message) from None
    total = sum(copied.rows.values())
    return CommandResult(
        {"store": new.shown, "rows": copied.rows, "head": copied.head},
        f"{total:,} rows of {len(copied.rows)} tables are in {new.shown}; totals and ledger are the same.\n"
        "Start the server with EMBEDMESH_STORE set to the address that you gave, and with the same key.secret.",
    )


def refuse_target(target: Path, data_dir: Path, overwrite: bool) -> None:
    """Raise WrongUsage where a new file would destroy what the server lives on, or an older file unasked."""
    for file in _files_in_use(data_dir):
        if target.resolve() == file.resolve() or (target.exists() and file.exists() and target.samefile(file)):
            raise WrongUsage(f"{target} belongs to the server itself ({file.name}). Give another name.")
    if target.exists() and not overwrite:
        raise WrongUsage(f"{target} is there already. Give another name, or --overwrite it.")


def _files_in_use(data_dir: Path) -> list[Path]:
    store = store_path(data_dir)
    of_the_store = [store.with_name(store.name + suffix) for suffix in STORE_SUFFIXES]
    return [*of_the_store, secret_path(data_dir), data_dir / "serve.lock", data_dir / BOOTSTRAP]
