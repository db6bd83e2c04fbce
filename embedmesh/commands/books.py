"""What the commands on accounts, keys and the ledger have in common: the data directory, and money in words."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from embedmesh.bootstrap import open_books
from embedmesh.rules.errors import Failure, SetupError
from embedmesh.settings import ENV_PREFIX, default_data_dir, store_path
from embedmesh.storage.books import Books

data_dir_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=default_data_dir,
    envvar=ENV_PREFIX + "DATA_DIR",
    show_default="the user data folder",
    help="Folder of the store.",
)
json_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--json", "as_json", is_flag=True, help="Print JSON."
)


@contextmanager
def books_of(data_dir: Path) -> Iterator[Books]:
    """The books that belong to a data directory: of the store in it, or of the one that EMBEDMESH_STORE names.

    A failure becomes one line for the person at the terminal.
    """
    store = os.environ.get(ENV_PREFIX + "STORE") or store_path(data_dir)
    if isinstance(store, Path) and not store.exists():
        raise SetupError(
            f"There is no store in {data_dir}. Start `embedmesh serve` once, name another --data-dir, or set "
            "EMBEDMESH_STORE."
        )
    try:
        with open_books(data_dir, store) as books:
            yield books
    except Failure as failure:
        raise click.ClickException(failure.message) from None


def when(unix_ms: int | None) -> str:
    """A time for humans, in UTC; a dash for none."""
    return "-" if unix_ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_ms / 1000))


def iso_time(unix_ms: int | None) -> str | None:
    """A time for programs, as ISO 8601 in UTC. None for none: accounts of our own were never created (0)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_ms / 1000)) if unix_ms else None
