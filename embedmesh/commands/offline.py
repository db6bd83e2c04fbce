"""The store itself, for commands that need no gateway: which one is meant, and its books."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from embedmesh.commands.options import in_file
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.errors import Failure, SetupError
from embedmesh.settings import ENV_PREFIX, store_path
from embedmesh.storage.books import Books
from embedmesh.storage.engines import engine_of


def store_of(data_dir: Path, store: str | None = None) -> str | Path:
    """The store that is meant: the one named, that of EMBEDMESH_STORE or the settings, or that of the data directory.

    Raises SetupError where there is none, or it cannot be reached: commands make no store.
    """
    place: str | Path = store or named_store() or store_path(data_dir)
    engine = engine_of(place)
    if engine.is_new():
        raise SetupError(
            f"There is no store at {engine.shown}. Start `embedmesh serve` once, name another --data-dir, or set "
            "EMBEDMESH_STORE."
        )
    return place


def named_store() -> str:
    """The store that the environment names, else the file of settings; empty where neither does."""
    return os.environ.get(ENV_PREFIX + "STORE") or in_file("store") or ""


@contextmanager
def books_of(data_dir: Path, *, migrating: bool = False) -> Iterator[Books]:
    """The books of the store that belongs to a data directory; a failure becomes one line."""
    try:
        with open_books(data_dir, store_of(data_dir), migrating=migrating) as books:
            yield books
    except Failure as failure:
        raise click.ClickException(failure.message) from None
