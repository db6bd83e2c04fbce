"""Composition root of a node: models, their engines, HTTP on a Unix socket, a TCP port, or both."""

import asyncio
import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import uvloop

from embedmesh.catalogue import Catalogue
from embedmesh.engine.loaded import LoadedModels
from embedmesh.engine.served import Served
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.http.unix_socket import bind_unix, remove_unix
from embedmesh.node.app import NodeApp
from embedmesh.node.metrics import NodeMetrics
from embedmesh.process import EXIT_OK, EXIT_SETUP, bind, log_to_stderr, quieten_gc, raise_file_limit, stop_event
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.settings import NodeSettings

if TYPE_CHECKING:
    from embedmesh.node.member import MemberNode

DRAIN_S = 8.0  # a supervisor kills after ten; calls that need longer have other nodes to go to
BODIES_BYTES_MAX = 64 * 1024 * 1024  # sixteen of the largest; decoded ids take some ten times that


def main(settings: NodeSettings, catalogue: Catalogue) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline.

    Returns the exit code: 0, or 78 after one line on standard error that says what must be mended.
    """
    log_to_stderr()
    raise_file_limit()
    try:
        uvloop.run(serve(settings, catalogue))
    except SetupError as error:
        sys.stderr.write(f"embedmesh node: {error}\n")
        return EXIT_SETUP
    return EXIT_OK


async def serve(settings: NodeSettings, catalogue: Catalogue) -> None:
    """The node's life. It listens at once and is ready when its engines are. Raises SetupError."""
    chosen = choose_models(settings, catalogue)
    check_doors(settings)
    metrics = NodeMetrics()

    def make(model: Model) -> Served:
        return Served(
            model,
            threads=settings.threads,
            queue_tokens_max=settings.queue_tokens_max,
            on_batch=partial(metrics.batch, model.id),
            on_start=partial(metrics.started, model.id),
        )

    models = LoadedModels(make)
    bodies = BodyBudget(BODIES_BYTES_MAX)
    app = NodeApp(models, catalogue, metrics, bodies)
    stop = stop_event(settings.lifeline_fd)
    servers: list[HttpServer] = []
    member = _member(settings, models, app, bodies, metrics) if settings.gateway else None
    with contextlib.ExitStack() as doors:
        if settings.uds is not None:
            servers.append(HttpServer(app.routes(), on_internal_error=metrics.internal_error))
            sock = bind_unix(settings.uds)
            doors.callback(remove_unix, settings.uds, settings.uds.lstat().st_ino)
            await servers[-1].start(sock)
        if settings.standalone:
            servers.append(
                HttpServer(
                    app.public_routes(settings.api_key),
                    on_internal_error=metrics.internal_error,
                    other_paths=OTHER_PATHS,
                )
            )
            await servers[-1].start(bind(settings.host, settings.port))
        if member is not None:
            await member.listen()
        loading, some = asyncio.create_task(models.load_all(chosen)), asyncio.create_task(models.some.wait())
        tasks: list[asyncio.Future[Any]] = [loading, some]
        try:
            await _until(stop, loading, some)
            quieten_gc()
            if member is not None and not stop.is_set():
                tasks.append(asyncio.create_task(member.run()))
            await _until(stop, models.broken, *tasks[2:])
        finally:
            # The engines still work: what is queued is answered.
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if member is not None:
                await member.stop(DRAIN_S)
            await asyncio.gather(*(server.drain(DRAIN_S) for server in servers))
            await models.stop()


def _member(
    settings: NodeSettings, models: LoadedModels, app: NodeApp, bodies: BodyBudget, metrics: NodeMetrics
) -> "MemberNode":
    from embedmesh.node.member import MemberNode  # brings TLS and an HTTP client along

    return MemberNode(settings, models, app, bodies, metrics.internal_error)


def choose_models(settings: NodeSettings, catalogue: Catalogue) -> list[Model]:
    """What the node serves from its start: what it was told, else all that the catalogue writes down."""
    chosen = list(_find(settings.model, catalogue)) or [model for model in catalogue.written if not model.foreign]
    if not chosen:
        raise SetupError("The catalogue has no model whose files are here: only other servers run them.")
    return list({model.id: model for model in chosen}.values())


def _find(names: tuple[str, ...], catalogue: Catalogue) -> Iterator[Model]:
    for name in names:
        model = catalogue.find(name)
        if model is None:
            known = ", ".join(model.id for model in catalogue.models)
            raise SetupError(f"There is no model {name!r} in the catalogue; it has {known}. Mend --model.")
        if model.foreign:
            raise SetupError(f"The files of {name!r} are not here: only other servers run it. Mend --model.")
        yield model


def check_doors(settings: NodeSettings) -> None:
    """Somebody must be able to ask, and on a port nobody without the key."""
    if settings.uds is None and not settings.standalone and not settings.gateway:
        raise SetupError(
            "Say whom to serve: --gateway URL --join TOKEN to join a gateway, --standalone for a port of its own, or "
            "--uds PATH for a gateway on this machine."
        )
    if settings.standalone and not settings.api_key:
        raise SetupError("A node on a port of its own needs --api-key, or EMBEDMESH_API_KEY in the environment.")


async def _until(stop: asyncio.Event, *works: asyncio.Future[Any]) -> None:
    """Wait for one of the works to end, and raise what it raises; or for being told to stop, and leave them alone."""
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait([stopped, *works], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    for work in works:
        if work.done():
            work.result()
