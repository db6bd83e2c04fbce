"""Fixtures: a real store in a folder of its own."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from embedmesh.storage.sqlite import SqliteStore
from tests.storage.shop import Shop


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be: hundreds of stores are made, and what a process leaves behind is the same."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="embedmesh-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Shop]:
    shop = Shop(tmp_path)
    yield shop
    shop.books.close()


@pytest.fixture
async def store(shop: Shop) -> AsyncIterator[SqliteStore]:
    store = await shop.open()
    yield store
    await store.close()
