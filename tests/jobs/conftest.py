"""A folder of files beside a store of each kind."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from embedmesh.jobs.files import FileBounds, FileStore
from embedmesh.storage.store import Store
from tests.storage.conftest import shop, store, tmp_path
from tests.storage.shop import SECRET, Shop

__all__ = ["shop", "store", "tmp_path"]


@pytest.fixture
def place(shop: Shop) -> Path | str:
    """Where files are kept. tests/jobs/test_objects.py has others."""
    return shop.folder / "files"


@pytest.fixture
async def files(store: Store, shop: Shop, place: Path | str) -> AsyncIterator[FileStore]:
    files = FileStore(place, store.files, store.batches, SECRET, shop.clock, FileBounds(disk_free_min=0))
    await files.open()
    yield files
    await files.close()
