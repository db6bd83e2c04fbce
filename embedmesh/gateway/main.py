"""A gateway's life: build its parts, run, stop."""

import asyncio
import contextlib
import functools
import logging
import socket
from collections.abc import Awaitable, Sequence
from typing import Any

import uvloop

from embedmesh.fleet.registry import Registry
from embedmesh.gateway.build import build
from embedmesh.gateway.models import load_models
from embedmesh.gateway.network import listening_socket
from embedmesh.gateway.parts import Gateway
from embedmesh.gateway.reload import ReadSettings, Reloader
from embedmesh.http.tls import Certificate
from embedmesh.jobs.files import CLOSE_S
from embedmesh.logs.setup import start_logging, tell
from embedmesh.logs.writer import LogWriter
from embedmesh.process import (
    EXIT_AGAIN,
    EXIT_OK,
    EXIT_SETUP,
    beyond_loopback,
    give_memory_back,
    hear_hangups,
    hold_hangups,
    keep_memory_off_disk,
    quieten_gc,
    stop_event,
)
from embedmesh.provision.bootstrap import key_defaults
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError, StoreAway, StoreUnavailable
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Clock
from embedmesh.settings import GatewaySettings, secret_path, store_dsn
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.storage.secrets.secret import load_secret
from embedmesh.storage.store import Store
from embedmesh.storage.upkeep import Retention
from embedmesh.system import raise_file_limit, this_user

log = logging.getLogger("embedmesh.gateway")

FIRST_NODE_S, FIRST_NODE_LOOK_S = 1.0, 0.01  # a running node answers its first probe within milliseconds
GATEWAY_DRAIN_S = 30.0  # as long as an ordinary request may take
EXIT_SOFTWARE = 70  # EX_SOFTWARE: an fsync failed, or a bug of ours: start anew and verify


class Ending:
    """Why the gateway ends: the exit code is set before the event."""

    def __init__(self, settings: GatewaySettings) -> None:
        self.exit_code = EXIT_OK
        self.stop_event = stop_event(settings.lifeline_fd)

    def must_restart(self) -> None:
        """Something is broken: the supervisor is to start the gateway anew."""
        self.exit_code = EXIT_SOFTWARE

    def store_lost(self, reason: str) -> None:
        """The disk can no longer be trusted."""
        log.critical("the store is lost (%s): nothing more is acknowledged; starting anew", reason)
        self.must_restart()
        self.stop_event.set()


def main(settings: GatewaySettings, read: ReadSettings | None = None) -> int:
    """Run a gateway until it is told to stop. Returns the exit code. `read` reads the settings again: see `reload`."""
    hold_hangups()
    writer = start_logging("gateway", settings.log_format, settings.log_level)
    keep_memory_off_disk()
    raise_file_limit()
    give_memory_back()
    try:
        return uvloop.run(_live(settings, read or (lambda: settings), writer))
    except SetupError as error:
        tell(f"embedmesh gateway: {error}", logging.CRITICAL)
        return EXIT_AGAIN if isinstance(error, StoreAway) else EXIT_SETUP


async def _live(settings: GatewaySettings, read: ReadSettings, writer: LogWriter) -> int:
    clock = SystemClock()
    ending = Ending(settings)
    listener = listening_socket(settings)
    new_keys = NewKeys(key_defaults(settings), beyond_loopback(listener.getsockname()[0]))
    certificate = Certificate.given(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
    models = load_models(settings.catalogue)
    store = await open_store(settings, clock, ending)
    if store is None:
        return EXIT_OK
    gateway = build(settings, models, store, clock, certificate, writer)
    reloader = Reloader(gateway, settings, read, certificate, new_keys.open_to_others)
    hear_hangups(gateway.adjustable.requests.knock, ending.stop_event)
    watches: list[Awaitable[None]] = [reloader.run(), *([certificate.watch()] if certificate is not None else [])]
    tasks = await run(gateway, listener, new_keys, ending, watches, local_nodes=bool(settings.nodes), tls=certificate)
    await stop(gateway, tasks, drain_s=GATEWAY_DRAIN_S if ending.exit_code == EXIT_OK else 0.0)
    return ending.exit_code


async def open_store(settings: GatewaySettings, clock: Clock, ending: Ending) -> Store | None:
    """The store; None if told to stop while another gateway holds it. Raises SetupError."""
    opening = asyncio.create_task(
        Store.open(
            store_dsn(settings),
            folder=settings.data_dir,
            clock=clock,
            secret=functools.partial(load_secret, secret_path(settings.data_dir)),
            retention=Retention(usage_days=settings.keep_usage_days),
            on_fatal=ending.store_lost,
        )
    )
    stopped = asyncio.create_task(ending.stop_event.wait())
    await asyncio.wait([opening, stopped], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if opening.done():
        return opening.result()
    opening.cancel()
    await asyncio.gather(opening, stopped, return_exceptions=True)
    return None


async def run(
    gateway: Gateway,
    listener: socket.socket,
    new_keys: NewKeys,
    ending: Ending,
    watches: Sequence[Awaitable[None]] = (),
    *,
    local_nodes: bool,
    tls: Certificate | None = None,
) -> list[asyncio.Future[Any]]:
    """Serve until told to stop, or until a background task ends. Returns all background tasks. Raises StoreAway."""
    await gateway.files.open()
    stopped = asyncio.create_task(ending.stop_event.wait())
    background = [asyncio.ensure_future(each) for each in (*gateway.background, *watches)]
    try:
        await gateway.books.operators.ask(lambda books: books.new_keys.write(new_keys), by=this_user())
        await gateway.fleet.roster.reload()
    except StoreUnavailable as error:
        raise StoreAway(error.message) from None
    if local_nodes:
        await until_ready(gateway.fleet.registry)
    await gateway.app.server.start(listener, tls)
    quieten_gc()
    log.info("gateway listens on port %d", listener.getsockname()[1])
    await asyncio.wait([stopped, *background], return_when=asyncio.FIRST_COMPLETED)
    if not stopped.done():
        broken = next(task for task in background if task.done())
        log.critical("a background task ended (%s); starting anew", type(broken.exception()).__name__)
        ending.must_restart()
    return [stopped, *background]


async def until_ready(registry: Registry) -> None:
    """Wait a moment for a node: callers' connections wait, too, instead of getting a 503."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(FIRST_NODE_S):
            while not any(node.state is NodeState.READY for node in registry):  # noqa: ASYNC110 - no event tells it
                await asyncio.sleep(FIRST_NODE_LOOK_S)


async def stop(gateway: Gateway, tasks: list[asyncio.Future[Any]], *, drain_s: float) -> None:
    """Drain the server, end the background tasks, and close all parts. Files give up with a late drain."""
    log.info("gateway drains")
    late = asyncio.get_running_loop().call_later(max(0.0, drain_s - CLOSE_S), gateway.files.end_soon)
    await gateway.app.server.drain(drain_s)
    late.cancel()
    gateway.files.end_soon()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await gateway.world.single_flight.stop()
    await gateway.fleet.canaries.stop()
    await gateway.fleet.connected.stop()
    await gateway.fleet.roster.stop()
    await gateway.files.close()
    books = gateway.books
    await asyncio.gather(books.operators.close(), books.accounts.close(), books.checks.close())
    sent = () if gateway.tracing is None else (asyncio.to_thread(gateway.tracing.sink.close),)
    await asyncio.gather(gateway.store.close(), *sent)
    gateway.fleet.clients.close()
