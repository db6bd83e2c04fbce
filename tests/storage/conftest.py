"""Fixtures: a real store of each kind, in a folder or a database of its own."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from embedmesh.storage.store import Store
from tests.storage.shop import Shop


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be: hundreds of stores are made, and what a process leaves behind is the same."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="embedmesh-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Shop]:
    """A store of each kind."""
    url = request.getfixturevalue("database") if request.param == "postgres" else None
    shop = Shop(tmp_path, url)
    yield shop
    shop.books.close()


@pytest.fixture
def file_shop(tmp_path: Path) -> Iterator[Shop]:
    """A store in a file: for what only a file can suffer."""
    shop = Shop(tmp_path)
    yield shop
    shop.books.close()


@pytest.fixture
async def store(shop: Shop) -> AsyncIterator[Store]:
    store = await shop.open()
    yield store
    await store.close()
