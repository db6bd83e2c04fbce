"""For every test: no setting of the person who runs them leaks in."""

import ast
import faulthandler
import functools
import gc
import os
import ssl
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from _pytest.faulthandler import fault_handler_stderr_fd_key

if TYPE_CHECKING:
    from bench.rig.object_storage import S3Server
    from bench.rig.postgres import PostgresServer

TO_FAIL_S = 30.0  # as pyproject.toml has it: `faulthandler_timeout` over `timeout`
KEPT = {"EMBEDMESH_ASSETS_DIR", "EMBEDMESH_TEST_DATA"}  # where files are, not how we behave

for name in [name for name in os.environ if name.startswith("EMBEDMESH_") and name not in KEPT]:
    del os.environ[name]


_parse = ast.parse


@functools.wraps(_parse)
def _parse_uncollected(*given: Any, **named: Any) -> Any:
    """`ast.parse`, without a collection of garbage meanwhile.

    A finalizer that fails is told with a traceback, which parses, too, and CPython 3.11 counts both together:
    "AST constructor recursion depth mismatch" (python/cpython issue 106905). pytest parses what it imports in a test.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        return _parse(*given, **named)
    finally:
        if was_on:
            gc.enable()


ast.parse = _parse_uncollected


_context = ssl.create_default_context
_contexts: dict[str, ssl.SSLContext] = {}


@functools.wraps(_context)
def _context_once(*given: Any, **named: Any) -> ssl.SSLContext:
    """`ssl.create_default_context`, once for the authorities that httpx brings: it reads them for each of its clients,
    also where none speaks TLS, and that takes 24 ms of CPU. Nobody changes such a context."""
    authorities = str(named.get("cafile"))
    if given or len(named) != 1 or not authorities.endswith("certifi/cacert.pem"):
        return _context(*given, **named)
    if authorities not in _contexts:
        _contexts[authorities] = _context(**named)
    return _contexts[authorities]


ssl.create_default_context = _context_once


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test with a longer time of its own has it, too, where a test that cannot be failed ends its process."""
    own = item.get_closest_marker("timeout")
    if own is not None and own.args:
        tells = item.config.stash[fault_handler_stderr_fd_key]
        faulthandler.dump_traceback_later(own.args[0] + TO_FAIL_S, exit=True, file=tells)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Stories come first: they wait a lot, while others work; and at the end nobody waits for one that is long."""
    items.sort(key=lambda item: "story" not in item.path.parts)


def pytest_collection_finish() -> None:
    """What was imported stays to the end: no collection of garbage during a test need look at it."""
    gc.freeze()


@pytest.fixture(scope="session")
def postgres() -> Iterator["PostgresServer"]:
    """A real server."""
    from bench.rig.postgres import serving

    with serving() as server:
        yield server


@pytest.fixture(scope="session")
def s3() -> Iterator["S3Server"]:
    """A real server that speaks S3, where there is one."""
    from bench.rig.object_storage import S3Server, cannot_serve

    if why := cannot_serve():
        pytest.skip(why)
    with S3Server.started() as server:
        yield server


@pytest.fixture(scope="session")
def made_database(postgres: "PostgresServer") -> str:
    """The name of a database with a store in it, to be copied."""
    from bench.rig.postgres import TEMPLATE
    from embedmesh.storage.books import Books
    from tests.storage.shop import HandClock, secret

    postgres.run(f"CREATE DATABASE {TEMPLATE}")
    Books.open(postgres.url(TEMPLATE), clock=HandClock(), secret=secret).close()
    return TEMPLATE


@pytest.fixture
def database(postgres: "PostgresServer", made_database: str) -> Iterator[str]:
    """The address of a database with a store that nothing has happened in."""
    url = postgres.new(made_database)
    yield url
    postgres.drop(url)
