"""A gateway for all tests of a module, and an applicant for each."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from bench.rig.postgres import PostgresServer
from tests.gateway.mesh import Applicant, Gateway, gateway, memory_folder


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with memory_folder() as made:
        yield made


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """In memory where that can be: each node makes files, and syncs them."""
    with memory_folder() as made:
        yield made


@pytest.fixture(scope="module")
def database_of_module(postgres: PostgresServer, made_database: str) -> Iterator[str]:
    """The address of a database with a store that nothing has happened in."""
    url = postgres.new(made_database)
    yield url
    postgres.drop(url)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gw(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Gateway]:
    """For tests with `pytest.mark.asyncio(loop_scope="module")`: each brings nodes of its own.

    Its store is a file, or what a module says by ON_EACH_STORE.
    """
    on_postgres = getattr(request, "param", "sqlite") == "postgres"
    url = request.getfixturevalue("database_of_module") if on_postgres else None
    async with gateway(folder, store_url=url) as made:
        yield made


@pytest.fixture
def applicant(gw: Gateway, tmp_path: Path) -> Iterator[Applicant]:
    """A node that nobody knows yet."""
    one = Applicant(gw, tmp_path)
    yield one
    one.receipts.close()
