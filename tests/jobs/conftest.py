"""A folder of files beside a store of each kind."""

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from embedmesh.jobs.files import FileBounds, FileStore
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, Shop


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be."""
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
async def store(shop: Shop) -> AsyncIterator[Store]:
    store = await shop.open()
    yield store
    await store.close()


@pytest.fixture
async def files(store: Store, shop: Shop) -> AsyncIterator[FileStore]:
    files = FileStore(
        shop.folder / "files", store.files, store.batches, SECRET, shop.clock, FileBounds(disk_free_min=0)
    )
    await files.open()
    yield files
    await files.close()
