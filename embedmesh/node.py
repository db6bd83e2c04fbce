"""Composition root of a node: models, their engines, HTTP on a Unix socket."""

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import uvloop

from embedmesh.edge.node_app import NodeApp
from embedmesh.edge.node_metrics import NodeMetrics
from embedmesh.edge.receive import BodyBudget
from embedmesh.edge.server import HttpServer
from embedmesh.edge.unix_socket import bind_unix, remove_unix
from embedmesh.engine.served import Served
from embedmesh.process import EXIT_OK, EXIT_SETUP, log_to_stderr, quieten_gc, raise_file_limit, stop_event
from embedmesh.rules.errors import SetupError
from embedmesh.settings import NodeSettings

DRAIN_S = 8.0  # a supervisor kills after ten; calls that need longer have other nodes to go to
BODIES_BYTES_MAX = 64 * 1024 * 1024  # sixteen of the largest; decoded ids take some ten times that


def main(settings: NodeSettings) -> int:
    """Serve until SIGTERM, SIGINT or the end of the lifeline.

    Returns the exit code: 0, or 78 after one line on standard error that says what must be mended.
    """
    log_to_stderr()
    raise_file_limit()
    try:
        uvloop.run(serve(settings))
    except SetupError as error:
        sys.stderr.write(f"embedmesh node: {error}\n")
        return EXIT_SETUP
    return EXIT_OK


async def serve(settings: NodeSettings) -> None:
    """The node's life. It listens at once and is ready when its engines are. Raises SetupError."""
    if not settings.models:
        raise SetupError("There is no model to serve: name one in the catalogue.")
    metrics = NodeMetrics()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise") as executor:
        served = [
            Served(
                model,
                threads=settings.threads,
                queue_tokens_max=settings.queue_tokens_max,
                executor=executor,
                on_batch=partial(metrics.batch, model.id),
                on_start=partial(metrics.started, model.id),
            )
            for model in settings.models
        ]
        app = NodeApp(served, metrics, BodyBudget(BODIES_BYTES_MAX))
        server = HttpServer(app.routes(), on_internal_error=metrics.internal_error)
        stop = stop_event(settings.lifeline_fd)
        await server.start(bind_unix(settings.uds))
        inode = settings.uds.lstat().st_ino
        keeping = asyncio.gather(*(one.keep() for one in served))
        loading = asyncio.gather(*(one.start() for one in served))
        try:
            await _until(stop, loading)
            quieten_gc()
            await _until(stop, keeping)
        finally:
            await server.drain(DRAIN_S)  # the engines still work: what is queued is answered
            await _cancel(loading, keeping)
            for one in served:
                await one.stop()
            remove_unix(settings.uds, inode)


async def _until(stop: asyncio.Event, work: asyncio.Future[list[None]]) -> None:
    """Wait for the work to end, and raise what it raises; or for being told to stop, and leave the work alone."""
    stopped = asyncio.create_task(stop.wait())
    work.add_done_callback(lambda _: stopped.cancel())
    await asyncio.wait([stopped])
    if work.done():
        work.result()


async def _cancel(*work: asyncio.Future[list[None]]) -> None:
    for one in work:
        one.cancel()
    await asyncio.gather(*work, return_exceptions=True)
