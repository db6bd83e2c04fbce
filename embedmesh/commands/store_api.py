"""The admin API of a store, served inside this process for `--offline`.

The handlers are the gateway's own; connections are socket pairs, which nobody outside this process can reach.
"""

import asyncio
import functools
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import click

from embedmesh.catalogue import load_catalogue
from embedmesh.commands.offline import store_of
from embedmesh.gateway.api.accounts_api import AccountsApi
from embedmesh.gateway.api.audit_api import AuditApi
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.gateway.api.keys_api import KeysApi
from embedmesh.gateway.api.ledger_api import LedgerApi
from embedmesh.gateway.api.prices_api import PricesApi
from embedmesh.gateway.api.routes import ADMIN_SCOPE, router
from embedmesh.http.bodies import SMALL_BODIES_BYTES_TOTAL_MAX
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import open_books
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import Failure
from embedmesh.rules.ports import Caller, Catalogue
from embedmesh.storage.books import Books
from embedmesh.system import this_user

STORE_REPLY_S = 3_600.0  # a check of a large ledger takes minutes; after an hour the store hangs
STOP_S = 1.0  # nothing is under way when a command ends; one that was interrupted does not wait for the store

OpenSocket = Callable[[], socket.socket]


@contextmanager
def store_api(data_dir: Path, store: str | None, catalogue: Path | None) -> Iterator[OpenSocket]:
    """Serves while the context lasts. Yields what opens a connection. Raises SetupError, ClickException."""
    opening = functools.partial(open_books, data_dir, store_of(data_dir, store), for_others=True)
    try:
        opening().close()  # the API would hide why a store cannot be opened: its callers are strangers
    except Failure as failure:
        raise click.ClickException(failure.message) from None
    models = load_catalogue(catalogue, assets=assets_dir())
    ready: Future[tuple[OpenSocket, Callable[[], object]]] = Future()
    thread = threading.Thread(target=lambda: asyncio.run(_serve(opening, models, ready)), daemon=True)
    thread.start()
    open_socket, stop = ready.result()
    try:
        yield open_socket
    finally:
        stop()
        thread.join(STOP_S)


class _Owner:
    """Stands in for keys: who can open the store's file needs none."""

    async def find(self, token: str) -> Caller | None:
        return Caller("operator", this_user().name, frozenset({ADMIN_SCOPE}))


async def _serve(
    opening: Callable[[], Books], catalogue: Catalogue, ready: "Future[tuple[OpenSocket, Callable[[], object]]]"
) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    books, bodies = BooksThread(opening, answer_s=STORE_REPLY_S), BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX)
    apis = (
        AccountsApi(books, bodies),
        KeysApi(books, bodies, SystemClock(), catalogue),
        PricesApi(books, bodies, catalogue),
        LedgerApi(books, books, bodies),
        AuditApi(books),
    )
    server = HttpServer(router(apis, _Owner(), None, origin_of=lambda request: this_user().origin))

    async def accept(sock: socket.socket) -> None:
        transport, _ = await loop.connect_accepted_socket(asyncio.Protocol, sock)
        server.adopt(transport)

    def open_socket() -> socket.socket:
        ours, theirs = socket.socketpair()
        asyncio.run_coroutine_threadsafe(accept(theirs), loop).result()
        return ours

    ready.set_result((open_socket, lambda: loop.call_soon_threadsafe(stopped.set)))
    await stopped.wait()
    await server.drain(0)
    await books.close()
