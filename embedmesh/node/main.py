"""Composition root of a node: builds it, runs it, stops it."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import uvloop

from embedmesh.catalogue import Catalogue, refuse_new_meanings
from embedmesh.engine.loaded import LoadedModels
from embedmesh.engine.memory import MemoryRoom
from embedmesh.engine.served import Served
from embedmesh.http.connections import Origins
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import Routes
from embedmesh.http.server import HttpServer
from embedmesh.http.unix_socket import bind_unix, remove_unix
from embedmesh.logs.access import access_log
from embedmesh.logs.setup import start_logging, tell
from embedmesh.logs.writer import LogWriter
from embedmesh.node.app import NodeApp
from embedmesh.node.compact_path import CompactPath
from embedmesh.node.confidential import LateOpener, SealedCalls
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.traced import NodeTraces, TraceCounts
from embedmesh.otlp import tracing_of
from embedmesh.process import (
    EXIT_OK,
    EXIT_SETUP,
    bind,
    hear_hangups,
    hold_hangups,
    host_and_port,
    keep_memory_off_disk,
    quieten_gc,
    stop_event,
)
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.rules.traces import Tracing
from embedmesh.settings import NodeSettings
from embedmesh.system import raise_file_limit

if TYPE_CHECKING:
    from embedmesh.node.member import MemberNode
    from embedmesh.node.opener import Opener
    from embedmesh.node.sidecar_models import SidecarModels
    from embedmesh.rules.ports import Clock

log = logging.getLogger("embedmesh.node")

ReadCatalogue = Callable[[], Catalogue]

NODE_DRAIN_S = 8.0  # a supervisor kills after ten; calls that need longer have other nodes to go to
MONITOR_PATHS = ("/health", "/readyz", "/metrics")
BODIES_BYTES_TOTAL_MAX = 64 * 1024 * 1024  # sixteen of the largest; decoded ids take some ten times that


@dataclass(frozen=True)
class NodeProcess:
    """The parts of a node. A server is there if its setting is: a Unix socket, a port for callers, a gateway."""

    settings: NodeSettings
    chosen: list[Model]
    models: "LoadedModels | SidecarModels"
    socket_server: HttpServer | None
    public_server: HttpServer | None
    monitor_server: HttpServer | None
    member: "MemberNode | None"
    opener: LateOpener | None  # where there are gateways
    tracing: Tracing | None = None


def main(settings: NodeSettings, catalogue: Catalogue, read: ReadCatalogue | None = None) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline. `read` reads the catalogue again, at SIGHUP.

    Returns the exit code: 0, or 78 after one line on standard error that says what to fix.
    """
    hold_hangups()
    writer = start_logging("node", settings.log_format, settings.log_level)
    keep_memory_off_disk()
    raise_file_limit()
    try:
        uvloop.run(serve(settings, catalogue, writer, read))
    except SetupError as error:
        tell(f"embedmesh node: {error}", logging.CRITICAL)
        return EXIT_SETUP
    return EXIT_OK


async def serve(
    settings: NodeSettings, catalogue: Catalogue, writer: LogWriter, read: ReadCatalogue | None = None
) -> None:
    """The node's life. It listens at once, and is ready once its engines are. Raises SetupError."""
    node = (build_sidecar if settings.upstream else build)(settings, catalogue, writer)
    stopping = stop_event(settings.lifeline_fd)
    known = Catalogue(catalogue.models)
    hear_hangups(lambda: read_again(catalogue, known, read or (lambda: catalogue)), stopping)
    with contextlib.ExitStack() as cleanup:
        await listen(node, cleanup)
        try:
            await run(node, stopping)
        finally:
            await stop(node)


def read_again(catalogue: Catalogue, known: Catalogue, read: ReadCatalogue) -> None:
    """Have what its file holds now, for models that are loaded from now on; those that are loaded stay.

    No name that was `known` since the start comes to mean another model: then nothing is changed.
    """
    try:
        new = read()
        refuse_new_meanings(known, new, "the catalogue")
    except SetupError as error:
        log.error("the catalogue stays as it was: %s", error)
        return
    known.add(new)
    catalogue.become(new)
    log.info("the catalogue was read again: %d models", len(new.written))


def build(settings: NodeSettings, catalogue: Catalogue, writer: LogWriter | None = None) -> NodeProcess:
    """The node, with nothing opened or started yet. Raises SetupError."""
    chosen = choose_models(settings, catalogue)
    check_servers(settings)
    metrics, tracing = NodeMetrics(), tracing_of(settings.traces, settings.traces_a_second, "embedmesh-node")
    memory = MemoryRoom(insist=settings.memory_check == "ignore")

    def make(model: Model) -> Served:
        return Served(
            model,
            threads=settings.threads,
            queue_tokens_max=settings.queue_tokens_max,
            on_batch=partial(metrics.batch, model.id),
            on_start=partial(metrics.started, model.id),
            memory=memory,
        )

    models = LoadedModels(make)
    bodies = BodyBudget(BODIES_BYTES_TOTAL_MAX)
    clock = SystemClock()
    opener = LateOpener(partial(_make_opener, settings, clock))
    traces = None
    if tracing is not None:
        traces = NodeTraces(tracing)
        metrics.add(TraceCounts(tracing))
    app = NodeApp(models, catalogue, metrics, bodies, opener.signed_keys, traces)
    begin_traced = None if traces is None else app.begin_compact
    sealed = SealedCalls(app, opener, metrics, bodies, clock)
    access = access_log(settings.access_log, writer, Origins().of)
    server = partial(HttpServer, on_internal_error=metrics.internal_error, access=access)
    member = None
    if settings.gateway:
        from embedmesh.node.member import MemberNode  # brings TLS and an HTTP client along

        more: dict[str, Any] = {"begin_traced": begin_traced, "access": access}
        member = MemberNode(settings, models, app, bodies, metrics.internal_error, sealed, **more)
    return NodeProcess(
        settings,
        chosen,
        models,
        socket_server=(
            server(
                {**app.routes(), **sealed.routes()},
                fast_path=CompactPath(app, bodies, sealed=sealed, begin_traced=begin_traced, access=access),
            )
            if settings.uds is not None
            else None
        ),
        public_server=(
            server(app.public_routes(settings.api_key), other_paths=OTHER_PATHS) if settings.standalone else None
        ),
        monitor_server=server(_monitored(app.routes())) if settings.monitor else None,
        member=member,
        opener=opener if settings.uds is not None or settings.gateway else None,
        tracing=tracing,
    )


def build_sidecar(settings: NodeSettings, catalogue: Catalogue, writer: LogWriter | None = None) -> NodeProcess:
    """A node without an engine, beside a server of another make. Raises SetupError."""
    from embedmesh.node.sidecar import SidecarParts  # brings the dialects, and TLS

    if settings.standalone:
        raise SetupError("A node with --upstream takes sealed requests only, from gateways. Leave --standalone out.")
    check_servers(settings)
    opener = LateOpener(partial(_make_opener, settings, SystemClock()))
    bodies = BodyBudget(BODIES_BYTES_TOTAL_MAX)
    parts = SidecarParts(settings, catalogue, opener, bodies)
    access = access_log(settings.access_log, writer, Origins().of)
    member = None
    if settings.gateway:
        from embedmesh.node.member import MemberNode

        internal, door = parts.on_internal_error, parts.door
        member = MemberNode(settings, parts.models, parts.app, bodies, internal, door=door, access=access)
    socket_server = parts.socket_server(access) if settings.uds is not None else None
    monitor = None
    if settings.monitor:
        monitor = HttpServer(_monitored(parts.app.routes()), on_internal_error=parts.on_internal_error)
    return NodeProcess(settings, parts.chosen, parts.models, socket_server, None, monitor, member, opener)


def _monitored(routes: Routes) -> Routes:
    """Those that tell how the node is, and nothing of what it is asked."""
    return {path: routes[path] for path in MONITOR_PATHS}


async def listen(node: NodeProcess, cleanup: contextlib.ExitStack) -> None:
    """Open the node's sockets; `cleanup` removes the Unix socket. Raises SetupError."""
    uds = node.settings.uds
    if node.socket_server is not None and uds is not None:
        sock = bind_unix(uds)
        cleanup.callback(remove_unix, uds, uds.lstat().st_ino)
        await node.socket_server.start(sock)
    if node.public_server is not None:
        await node.public_server.start(bind(node.settings.host, node.settings.port))
    if node.monitor_server is not None:
        await node.monitor_server.start(bind(*host_and_port(node.settings.monitor, "--monitor")))
    if node.member is not None:
        await node.member.listen()


async def run(node: NodeProcess, stopping: asyncio.Event) -> None:
    """Load the models, then be a member of the gateway, until `stopping` is set. Raises SetupError."""
    load, some = asyncio.create_task(node.models.load_all(node.chosen)), asyncio.create_task(node.models.some.wait())
    tasks: list[asyncio.Future[Any]] = [load, some]
    try:
        if node.opener is not None:
            await node.opener.make()  # while the engines start, which takes longer
            tasks.append(asyncio.create_task(node.opener.keep()))
        await _until(stopping, load, some)
        quieten_gc()
        if node.member is not None and not stopping.is_set():
            tasks.append(asyncio.create_task(node.member.run()))
        await _until(stopping, node.models.broken, *tasks[2:])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def stop(node: NodeProcess) -> None:
    """Answer what is queued while the engines still work, then end them."""
    if node.member is not None:
        await node.member.stop(NODE_DRAIN_S)
    every = (node.socket_server, node.public_server, node.monitor_server)
    servers = [server for server in every if server is not None]
    await asyncio.gather(*(server.drain(NODE_DRAIN_S) for server in servers))
    await node.models.stop()
    if node.tracing is not None:
        await asyncio.to_thread(node.tracing.sink.close)


def choose_models(settings: NodeSettings, catalogue: Catalogue) -> list[Model]:
    """The models to serve from the start: those of --model, or all of the catalogue. Raises SetupError."""
    chosen: dict[str, Model] = {}
    for name in settings.model:
        model = catalogue.find(name)
        if model is None:
            known = ", ".join(model.id for model in catalogue.models)
            raise SetupError(f"There is no model {name!r} in the catalogue; it has {known}. Mend --model.")
        if model.foreign:
            raise SetupError(f"The files of {name!r} are not here: only other servers run it. Mend --model.")
        chosen[model.id] = model
    if not settings.model:
        chosen = {model.id: model for model in catalogue.written if not model.foreign}
    if not chosen:
        raise SetupError("The catalogue has no model whose files are here: only other servers run them.")
    return list(chosen.values())


def check_servers(settings: NodeSettings) -> None:
    """Raises SetupError if nobody could reach the node, or anybody could without a key."""
    if settings.uds is None and not settings.standalone and not settings.gateway:
        raise SetupError(
            "Say whom to serve: --gateway URL --join TOKEN to join a gateway, --standalone for a port of its own, or "
            "--uds PATH for a gateway on this machine."
        )
    if settings.standalone and not settings.api_key:
        raise SetupError("A node on a port of its own needs --api-key, or EMBEDMESH_API_KEY in the environment.")


async def _until(stopping: asyncio.Event, *works: asyncio.Future[Any]) -> None:
    """Wait until one of the works ends, and raise what it raises; or until `stopping` is set."""
    stopped = asyncio.create_task(stopping.wait())
    await asyncio.wait([stopped, *works], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    for work in works:
        if work.done():
            work.result()


def _make_opener(settings: NodeSettings, clock: "Clock") -> "Opener":
    from embedmesh.node.opener import make_opener  # brings TLS along

    return make_opener(settings, clock)
