"""The HTTP server under gateway and node: routes, request ids, and one error envelope for every refusal."""

import asyncio
import functools
import logging
import socket
import ssl
import time
import traceback
from collections.abc import Callable, Mapping

from aiohttp import HttpVersion11, web

from embedmesh.http.aiohttp_connection import AnyFastPath, ServerConnection, write_out
from embedmesh.http.connections import Connections, Origins
from embedmesh.http.cors import Cors
from embedmesh.http.failures import failure_response
from embedmesh.http.rendering import REPLY_HEADERS, REQUEST_ID, SERVER_HEADER, request_id_of
from embedmesh.http.request_notes import note_end
from embedmesh.http.routing import PATH_REMAINDER, Handler, Routes, RouteTable
from embedmesh.http.tls import Certificate, TlsListener
from embedmesh.rules import errors
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import JOB_HEADER
from embedmesh.rules.limits import REQUEST_HEAD_S, WRITE_REPLY_S
from embedmesh.rules.request_record import CURRENT, AccessLog, RequestRecord

log = logging.getLogger("embedmesh.http")

LISTEN_BACKLOG = 1_024  # connections that may wait while a gateway restarts
SINGLE_HEADERS = ("Authorization", "api-key", "x-goog-api-key", "Content-Type", "Idempotency-Key", JOB_HEADER)
"""Given twice, a proxy may read one of them and we the other."""


class HttpServer:
    """Serves `routes` on listening sockets.

    `on_internal_error` is called for each request that ended in a bug of ours, for a metric that should stay at 0;
    `on_unrouted` with the code of each that no handler was found for.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        on_internal_error: Callable[[], None] = lambda: None,
        on_unrouted: Callable[[str], None] = lambda _code: None,
        head_s: float = REQUEST_HEAD_S,
        fast_path: AnyFastPath | None = None,
        other_paths: Mapping[str, str] | None = None,
        cors: Cors | None = None,
        origins: Origins | None = None,
        connections: Connections | None = None,
        write_s: float = WRITE_REPLY_S,
        access: AccessLog | None = None,
    ) -> None:
        """`other_paths` are aliases of routes. A caller has `write_s` seconds to read a reply. `access`: its log."""
        self._access = access
        self._table = RouteTable(routes, other_paths or {})
        self._cors = cors
        self._write_s = write_s
        self._head_s = head_s
        self._on_internal_error = on_internal_error
        self._on_unrouted = on_unrouted
        self._aiohttp = web.Server(self._handle, handler_cancellation=True)
        self._origins, self._connections = origins or Origins(), connections or Connections()
        self._connection = functools.partial(
            ServerConnection,
            self._aiohttp,
            head_s=head_s,
            explain=self._explain,
            origins=self._origins,
            connections=self._connections,
            access=access,
        )
        self._fast_path = fast_path
        self._listeners: list[asyncio.Server | TlsListener] = []

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | Certificate | None = None) -> None:
        """Serve on a bound socket, TCP or Unix, with TLS where a context is given. May be called for several.

        A certificate's context may change.
        """
        accept = functools.partial(self._connection, fast_path=self._fast_path)
        if tls is not None:
            sock.listen(LISTEN_BACKLOG)
            context = (lambda: tls.context) if isinstance(tls, Certificate) else (lambda: tls)
            shared = (self._origins, self._connections)
            self._listeners.append(TlsListener(sock, context, accept, self._head_s, *shared))
            return
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        self._listeners.append(await create(accept, sock=sock, backlog=LISTEN_BACKLOG))

    def adopt(self, transport: asyncio.Transport, data: bytes = b"") -> asyncio.Future[None]:
        """Serve on a connection that we opened ourselves and on which `data` has come. The future ends with it."""
        connection = self._connection(fast_path=self._fast_path, dialled=True)
        transport.set_protocol(connection)
        connection.connection_made(transport)
        if data:
            connection.data_received(data)
        return connection.lost

    def use_cors(self, cors: Cors | None) -> None:
        """For replies from now on."""
        self._cors = cors

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, let running requests end for at most `timeout_s` seconds, close the rest."""
        for listener in self._listeners:
            listener.close()
        self._aiohttp.pre_shutdown()
        await self._aiohttp.shutdown(timeout_s)

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        record, began = RequestRecord(request_id_of(request.headers.get("x-request-id"))), time.monotonic()
        CURRENT.set(record)
        try:
            return await self._respond(request, record)
        finally:
            record.over = True
            if self._access is not None:
                self._note_end(self._access, request, record, began)

    async def _respond(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = record.request_id
        request[REPLY_HEADERS] = {"x-request-id": request_id, **SERVER_HEADER}
        if self._cors is not None and self._cors.covers(request.rel_url.raw_path):
            request[REPLY_HEADERS] |= self._cors.headers(request.headers.get("Origin"))
        close = False
        try:
            response = await self._answer(request, record)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: told briefly, logged by type and place
            failure = self._explain(error, request_id)
            record.outcome = failure.code
            close = isinstance(failure, errors.MalformedHttp)
            response = failure_response(failure)
        if not response.prepared:
            if close or response.status in (408, 413):
                response.force_close()
            await write_out(request, response, self._write_s)
        record.status = response.status
        if isinstance(response, web.Response) and isinstance(response.body, bytes):
            record.bytes_out = len(response.body)
        return response

    def _note_end(self, access: AccessLog, request: web.BaseRequest, record: RequestRecord, began: float) -> None:
        record.method, record.bytes_in = request.method, request.content_length or 0
        peer = request.transport.get_extra_info("peername") if request.transport is not None else None
        note_end(access, record, began, peer, request.headers.get("X-Forwarded-For"))

    def _explain(self, error: Exception, request_id: str) -> Failure:
        """The failure that the caller gets for what a handler raised. A bug of ours is logged and counted."""
        if isinstance(error, Failure):
            return error.with_traceback(None)  # it holds every frame on the way, they the body, and our caller's it
        last = (traceback.extract_tb(error.__traceback__) or [None])[-1]
        place = f"{last.filename.rpartition('/')[2]}:{last.lineno}" if last is not None else "?"  # and no values
        words = "internal error: %s at %s [%s]"
        log.error(words, type(error).__name__, place, request_id, extra={"request_id": request_id})
        self._on_internal_error()
        return errors.InternalError("Something went wrong on our side. Trying again may help; quote the x-request-id.")

    async def _answer(self, request: web.BaseRequest, record: RequestRecord) -> web.StreamResponse:
        try:
            found = self._find(request, record)
        except Failure as failure:
            self._on_unrouted(failure.code)
            raise
        return found if isinstance(found, web.StreamResponse) else await found(request)

    def _find(self, request: web.BaseRequest, record: RequestRecord) -> Handler | web.StreamResponse:
        """What handles a request, or the reply to a preflight. Raises MalformedHttp, NotFound or MethodNotAllowed."""
        _check_head(request)
        path = request.rel_url.raw_path
        found = self._table.find(path)
        if found is None:
            meant = self._table.meant(path, request.method)
            more = f"Did you mean {meant}?" if meant else "The API is described at /docs and /openapi.json."
            raise errors.NotFound(f"There is nothing at this path. {more}")
        methods, remainder = found
        record.route = self._table.route_of(methods)
        if remainder is not None:
            request[PATH_REMAINDER] = remainder
        handler = methods.get(request.method)
        if handler is not None:
            return handler
        if self._cors is not None and self._cors.covers(path):
            preflight = self._cors.preflight(request, methods)
            if preflight is not None:
                return preflight
        allowed = tuple(sorted(methods))
        raise errors.MethodNotAllowed(f"This path takes {' and '.join(allowed)} only.", allowed=allowed)


def _check_head(request: web.BaseRequest) -> None:
    """Refuse what a proxy may read in another way than we do. Raises MalformedHttp."""
    headers = request.headers
    if headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
        raise errors.MalformedHttp("The only supported Transfer-Encoding is `chunked`.")
    if request.version < HttpVersion11 and "Transfer-Encoding" in headers:
        raise errors.MalformedHttp("HTTP/1.0 has no Transfer-Encoding. Send HTTP/1.1, or a Content-Length.")
    for name in SINGLE_HEADERS:
        if len(headers.getall(name, ())) > 1:
            raise errors.MalformedHttp(f"The header {name} is given more than once. Send it once.")
