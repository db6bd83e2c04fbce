"""`embedmesh store`: a copy of accounts, keys and ledger, and bringing them to this program's version."""

import asyncio
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from embedmesh.commands.books import books_of, data_dir_option, json_option, store_of
from embedmesh.commands.telling import WrongUsage, print_json
from embedmesh.rules.errors import Failure
from embedmesh.settings import BOOTSTRAP, secret_path, store_path
from embedmesh.storage.copy import copy as copy_store
from embedmesh.storage.engines import engine_of
from embedmesh.storage.migrate import newest
from embedmesh.storage.postgres.database import PostgresEngine
from embedmesh.storage.sqlite.backup import STORE_SUFFIXES
from embedmesh.storage.sqlite.database import OPEN_BUSY_S, SqliteEngine

STDERR = Console(stderr=True)


@click.group()
def store() -> None:
    """Look after the store: accounts, keys, ledger.

    The store is the file embedmesh.db in the data directory, or what EMBEDMESH_STORE names. Copying the file with cp
    while the server runs gives a copy that may be torn; `store backup` gives a whole one. A PostgreSQL store is backed
    up with PostgreSQL's own tools.
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
    refuse_target(target, data_dir, overwrite)
    with books_of(data_dir) as books:
        books.backup(target, overwrite=overwrite)
    size = target.stat().st_size
    if as_json:
        print_json({"file": str(target), "bytes": size})
        return
    click.echo(f"{target}: {size:,} bytes.")


@store.command()
@data_dir_option
@json_option
def migrate(data_dir: Path, as_json: bool) -> None:
    """Bring the store to this program's version.

    Stop all gateways of the store first: those of the older version cannot go on with it. Back it up before; there is
    no way back. Nothing is done where the store has this version already.

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
    if as_json:
        print_json({"store": engine.shown, "from_version": before, "to_version": after})
    elif before == after:
        click.echo(f"Nothing was to be done: {engine.shown} has version {after}.")
    else:
        click.echo(f"{engine.shown} was brought from version {before} to {after}.")


@store.command()
@click.argument("target")
@data_dir_option
@json_option
def copy(target: str, data_dir: Path, as_json: bool) -> None:
    """Move the store from its file to a PostgreSQL server.

    All of it, or nothing. TARGET is the postgresql:// address of a new database. Stop the server first. Before
    anything is kept, every promise of the ledger is looked at in the new store, and the totals of each table are held
    against the old one's. The file stays as it was; from then on start with EMBEDMESH_STORE set to TARGET, and with
    the same key.secret.

    \b
    Example:
      embedmesh store copy postgresql://embedmesh@db.internal/embedmesh
    """
    new = engine_of(target)
    if not isinstance(new, PostgresEngine):
        raise WrongUsage("TARGET is the address of a PostgreSQL database: postgresql://USER@HOST/DATABASE.")
    old = SqliteEngine(store_path(data_dir))
    with Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=STDERR) as bar:
        tasks: dict[str, TaskID] = {}

        def say(table: str, copied: int, total: int) -> None:
            if table not in tasks:
                tasks[table] = bar.add_task(table, total=total)
            bar.update(tasks[table], completed=copied, total=max(total, copied))

        try:
            copied = asyncio.run(copy_store(old, new, say))
        except Failure as failure:
            raise click.ClickException(failure.message) from None
    if as_json:
        print_json({"store": new.shown, "rows": copied.rows, "head": copied.head})
        return
    total = sum(copied.rows.values())
    click.echo(f"{total:,} rows of {len(copied.rows)} tables are in {new.shown}; totals and ledger are the same.")
    click.echo("Start the server with EMBEDMESH_STORE set to that address, and with the same key.secret.")


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
