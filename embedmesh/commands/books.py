"""What the commands on accounts, keys and the ledger have in common: which store is meant, its books, and times."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click

from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.errors import Failure, SetupError
from embedmesh.settings import ENV_PREFIX, default_data_dir, store_path
from embedmesh.storage.books import Books
from embedmesh.storage.engines import engine_of

T = TypeVar("T")

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
reference_option: Callable[[Callable[..., None]], Callable[..., None]] = click.option(
    "--reference", required=True, help="Your own id of this payment: the same reference is applied once."
)


def store_of(data_dir: Path) -> str | Path:
    """The store that belongs to a data directory: the one in it, or the one that EMBEDMESH_STORE names.

    Raises SetupError where there is none, or it cannot be asked: these commands make no store.
    """
    place: str | Path = os.environ.get(ENV_PREFIX + "STORE") or store_path(data_dir)
    engine = engine_of(place)
    if engine.is_new():
        raise SetupError(
            f"There is no store at {engine.shown}. Start `embedmesh serve` once, name another --data-dir, or set "
            "EMBEDMESH_STORE."
        )
    return place


@contextmanager
def books_of(data_dir: Path, *, migrating: bool = False) -> Iterator[Books]:
    """The books of the store that belongs to a data directory; a failure is told as one line."""
    place = store_of(data_dir)
    with told(), open_books(data_dir, place, migrating=migrating) as books:
        yield books


@contextmanager
def told() -> Iterator[None]:
    """A failure becomes one line for the person at the terminal."""
    try:
        yield
    except Failure as failure:
        raise click.ClickException(failure.message) from None
    except UnicodeEncodeError:
        raise click.ClickException("What was given is not all text in UTF-8; nothing was changed.") from None


def every(page: Callable[[T | None], Sequence[T]]) -> list[T]:
    """All rows of a list that comes in pages; `page` gives those after a row, or the first ones."""
    found: list[T] = []
    after: T | None = None
    while rows := page(after):
        found += rows
        after = rows[-1]
    return found


def when(unix_ms: int | None) -> str:
    """A time for humans, in UTC; a dash for none."""
    return "-" if unix_ms is None else time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(unix_ms / 1000))


def iso_time(unix_ms: int | None) -> str | None:
    """A time for programs, as ISO 8601 in UTC. None for none: accounts of our own were never created (0)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(unix_ms / 1000)) if unix_ms else None
