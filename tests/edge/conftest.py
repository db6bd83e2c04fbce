"""A gateway for all tests of a module, and an applicant for each."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.edge.mesh import Applicant, Gateway, gateway, memory_folder


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be: each node makes files, and syncs them."""
    with memory_folder() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw(folder: Path) -> AsyncIterator[Gateway]:
    """For tests with `pytest.mark.asyncio(loop_scope="module")`: each brings nodes of its own."""
    async with gateway(folder) as made:
        yield made


@pytest.fixture
def applicant(gw: Gateway, tmp_path: Path) -> Iterator[Applicant]:
    """A node that nobody knows yet."""
    one = Applicant(gw, tmp_path)
    yield one
    one.receipts.close()
