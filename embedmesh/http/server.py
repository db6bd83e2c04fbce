"""The HTTP server under gateway and node: aiohttp's strict parser, our own deadlines, one error envelope.

No Python server bounds slow heads and slow bodies by itself, and each has its own words for what its parser refuses.
This module adds what is missing: a deadline for the head, a deadline and a size for the body, a bound on connections,
and the envelope for every refusal, the parser's own included.
"""

import asyncio
import logging
import socket
import ssl
import traceback
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NoReturn, cast

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestHandler

from embedmesh.http.connections import Connections, Origins
from embedmesh.http.cors import Cors
from embedmesh.http.failures import failure_response
from embedmesh.http.fast_path import Explain, FastExchange, FastPath, begin
from embedmesh.http.refusals import FIELDS_MAX, HEAD_BYTES_MAX, URI_BYTES_MAX, refused_by_parser
from embedmesh.http.rendering import SERVER, failure_bytes, own_request_id, request_id_of
from embedmesh.http.routing import RouteTable
from embedmesh.http.sending import Sending
from embedmesh.rules import errors
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Delivery
from embedmesh.rules.limits import WRITE_REPLY_S

log = logging.getLogger("embedmesh.http")

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
Routes = Mapping[str, Mapping[str, Handler]]
"""Path -> method -> handler. A `*` in a path, at its end or between, takes what is there: slashes, but not nothing.

HEAD is answered wherever GET is.
"""

HEAD_S = 10.0  # a head is a few hundred bytes; ten seconds is a very bad line
KEEP_ALIVE_S = 75.0  # longer than common proxies keep an idle connection, so that they close first
NODE_IDLE_S = 7 * 86_400.0  # on connections of our own making: their other side closes them
LINGER_S = 2.0  # read what a refused caller still sends, so that it sees the answer and not a reset
DRAIN_MIN_S = 0.001  # aiohttp takes a timeout of zero for "as long as it may take"
HEAD_BYTES_TOTAL_MAX = 64 * 1024  # of one that comes in pieces; a whole one is as large as what is read at once
ONCE = ("Authorization", "api-key", "Content-Type", "Idempotency-Key")  # else a proxy may read another one than we
UNREAD_BYTES = 16 * 1024  # of a body, twice that is read ahead, by one read more: whose it is may not be known yet
BACKLOG = 1_024  # connections that may wait while a gateway restarts

REQUEST_ID = web.RequestKey("request_id", str)  # the caller's x-request-id where it is sane, else our own
REST = web.RequestKey("rest", str)  # of the path, in place of a route's `*`
ALWAYS = web.RequestKey("always", dict[str, str])  # headers that every reply to this request has


class Protocol(RequestHandler):
    """One connection: aiohttp's, with a deadline for each head and our envelope for what the parser refuses.

    With a `fast_path`, its requests never reach aiohttp, as long as nothing else has come on this connection.
    """

    def __init__(
        self,
        manager: web.Server,
        *,
        head_s: float,
        on_internal_error: Callable[[], None],
        patient: bool = False,
        fast_path: FastPath | None = None,
        explain: Explain,
        **options: Any,
    ) -> None:
        """A `patient` one may lie idle before its first request, and between two, for as long as it is open."""
        super().__init__(manager, **options)
        self._on_internal_error = on_internal_error
        self._head_s = head_s
        self.patient = patient
        self._lane = fast_path
        self._explain = explain
        self._exchange: FastExchange | None = None  # on the fast path, now
        self.sending: Sending | None = None  # a reply that `deliver` writes, now
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of one that is not whole yet
        self._made_at = self._loop.time()
        self._answered_at = 0.0  # by the general server; 0 from when the next request is there
        self.lost: asyncio.Future[None] = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # "Delivered" means: in the kernel. With no room in the buffer, drain() waits for just that. Over TLS a limit of
        # 0 would pause us when the buffer is empty, too, and nobody would wake us again.
        high = 0 if transport.get_extra_info("ssl_object") is None else 1
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=high, low=0)
        if not self.patient:
            self._start_head_timer()

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)
            return
        if self._lane is not None and not self._close and self.transport is not None:
            self._exchange = begin(self._lane, self.transport, data, self._explain, self._lane_ended)
            if self._exchange is not None:
                self._stop_head_timer()
                return
            self._lane = None  # the parser has bytes now; where its next request begins only it knows
        super().data_received(data)
        if self._messages:
            self._answered_at = 0.0
        if self._awaits_head():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_TOTAL_MAX:
                self._refuse_head(
                    errors.HeadTooLarge(f"The request's head has more than {HEAD_BYTES_TOTAL_MAX:,} bytes.")
                )
            elif self._head_timer is None:  # the first bytes of a head that is not whole yet
                self._start_head_timer()
        else:
            self._head_bytes = 0
            self._stop_head_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume_writing()
        elif self.sending is not None:
            self.sending.resume_writing()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        if self._exchange is not None:
            await self._exchange.stopped(timeout or DRAIN_MIN_S)
        await super().shutdown(timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._stop_head_timer()
        if self._exchange is not None:
            self._exchange.lost()
        if not self.lost.done():
            self.lost.set_result(None)
        if self.sending is not None:
            self.sending.lost()
            self._task_handler = None  # or it would be cancelled now, as if the caller had gone before its reply
        super().connection_lost(exc)

    def idle_since(self) -> float | None:
        """When its last request ended, or it was made, on the loop's clock; None in the middle of a request."""
        if self._exchange is not None:
            return self._exchange.answered_at
        if self._messages or not (self._answered_at or self._awaits_head()):
            return None
        return max(self._made_at, self._answered_at, self._next_keepalive_close_time - self._keepalive_timeout)

    def _awaits_head(self) -> bool:
        nothing_yet = self._request_count == 0  # true even before aiohttp's own task has begun to wait
        return not self._messages and (nothing_yet or self._waiter is not None)

    def _lane_ended(self, after: bytes) -> None:
        """The connection is idle again, or begins with what came `after`."""
        self._exchange = None
        if self.transport is None or self.transport.is_closing():
            return
        if self._close:
            self.transport.close()
            return
        self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        if after:
            self.transport.resume_reading()
            self.data_received(after)

    def _process_keepalive(self) -> None:
        if self._exchange is not None:  # busy: it is looked at again when it may have been idle for that long
            self._next_keepalive_close_time = self._loop.time() + self._keepalive_timeout
        super()._process_keepalive()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_head_timer(self) -> None:
        self._head_timer = self._loop.call_later(self._head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.transport is None or not self._awaits_head():
            return
        self._refuse_head(errors.RequestTimeout(f"The request's head did not arrive within {self._head_s:.0f} s."))

    def _refuse_head(self, failure: Failure) -> None:
        """One that is not whole, and will not be read."""
        if self.transport is not None:
            self.transport.write(failure_bytes(failure, own_request_id(), close=True))
            self.force_close()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if not self._messages:
            self._answered_at = self._loop.time()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The parser refused. Its own words may quote the request, so they are not repeated."""
        if request.writer.output_size > 0:
            raise ConnectionError("part of an answer is already sent")
        if isinstance(exc, ConnectionError):
            raise exc  # the caller went; nobody is to blame
        if status >= 500:
            self._on_internal_error()
            log.error("internal error: %s at %s", type(exc).__name__, _place(exc))
            failure: Failure = errors.InternalError("Something went wrong on our side. Trying again may help.")
        else:
            failure = refused_by_parser(exc)
        response = failure_response(failure)
        response.headers.update({"x-request-id": own_request_id(), **SERVER})
        response.force_close()
        return response


class HttpServer:
    """Serves `routes` on listening sockets.

    `on_internal_error` is told of each request that ended in a bug of ours, for a metric that should stay at 0.
    """

    def __init__(
        self,
        routes: Routes,
        *,
        on_internal_error: Callable[[], None] = lambda: None,
        head_s: float = HEAD_S,
        fast_path: FastPath | None = None,
        other_paths: Mapping[str, str] | None = None,
        cors: Cors | None = None,
        origins: Origins | None = None,
        connections: Connections | None = None,
        write_s: float = WRITE_REPLY_S,
    ) -> None:
        """`other_paths` lead to some of the routes, too. A reply has to be read within `write_s` seconds."""
        self._table = RouteTable(routes, other_paths or {})
        self._cors = cors
        self._write_s = write_s
        self._head_s = head_s
        self._on_internal_error = on_internal_error
        self._server = _Server(
            self._handle,
            handler_cancellation=True,
            lingering_time=LINGER_S,
            head_s=head_s,
            on_internal_error=on_internal_error,
            fast_path=fast_path,
            explain=self.explain,
        )
        self._server.origins = origins or Origins()
        self._server.open = connections or Connections()
        self._listeners: list[asyncio.Server] = []

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None = None) -> None:
        """Serve on a bound socket, TCP or Unix, with TLS where a context is given. May be called for several."""
        loop = asyncio.get_running_loop()
        create = loop.create_unix_server if sock.family == socket.AF_UNIX else loop.create_server
        shake_s = self._head_s if tls is not None else None
        self._listeners.append(
            await create(self._server, sock=sock, backlog=BACKLOG, ssl=tls, ssl_handshake_timeout=shake_s)
        )

    def adopt(self, transport: asyncio.Transport, data: bytes = b"") -> asyncio.Future[None]:
        """Serve on a connection that we have opened ourselves, where `data` has come already.

        The future ends when the connection does.
        """
        protocol = self._server.patient()
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        if data:
            protocol.data_received(data)
        return protocol.lost

    async def drain(self, timeout_s: float) -> None:
        """Take no more connections, let running requests end for at most `timeout_s` seconds, close the rest."""
        for listener in self._listeners:
            listener.close()
        self._server.pre_shutdown()
        await self._server.shutdown(max(timeout_s, DRAIN_MIN_S))

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        request[REQUEST_ID] = request_id_of(request.headers.get("x-request-id"))
        request[ALWAYS] = {"x-request-id": request[REQUEST_ID], **SERVER}
        if self._cors is not None and self._cors.covers(request.rel_url.raw_path):
            request[ALWAYS] |= self._cors.headers(request.headers.get("Origin"))
        last = False
        try:
            response = await self._route(request)(request)
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:  # noqa: BLE001 - the last resort: told briefly, logged by type and place
            failure = self.explain(error, request[REQUEST_ID])
            last = isinstance(failure, errors.MalformedHttp)
            response = failure_response(failure)
        if not response.prepared:
            if last or response.status in (408, 413):
                response.force_close()
            await write_out(request, response, self._write_s)
        return response

    def explain(self, error: Exception, request_id: str) -> Failure:
        """What the caller is told of what a handler raised; a bug of ours is logged and counted."""
        if isinstance(error, Failure):
            return error.with_traceback(None)  # it holds every frame on the way, they the body, and our caller's it
        log.error("internal error: %s at %s [%s]", type(error).__name__, _place(error), request_id)
        self._on_internal_error()
        return errors.InternalError("Something went wrong on our side. Trying again may help; quote the x-request-id.")

    def _route(self, request: web.BaseRequest) -> Handler:
        if request.headers.get("Transfer-Encoding", "chunked").lower() != "chunked":
            raise errors.MalformedHttp("The only transfer coding that is read here is `chunked`.")
        if request.version < HttpVersion11 and "Transfer-Encoding" in request.headers:
            raise errors.MalformedHttp("HTTP/1.0 has no Transfer-Encoding. Send HTTP/1.1, or a Content-Length.")
        for name in ONCE:
            if len(request.headers.getall(name, ())) > 1:
                raise errors.MalformedHttp(f"The header {name} is given more than once. Send it once.")
        path = request.rel_url.raw_path
        found = self._table.find(path)
        if found is None:
            meant = self._table.meant(path, request.method)
            more = f"Did you mean {meant}?" if meant else "The API is described at /docs and /openapi.json."
            raise errors.NotFound(f"There is nothing at this path. {more}")
        methods, rest = found
        if rest is not None:
            request[REST] = rest
        handler = methods.get(request.method)
        if handler is None:
            if self._cors is not None and self._cors.covers(path):
                preflight = self._cors.preflight(request, methods)
                if preflight is not None:
                    return _already(preflight)
            allowed = tuple(sorted(methods))
            raise errors.MethodNotAllowed(f"This path takes {' and '.join(allowed)} only.", allowed=allowed)
        return handler


def _already(response: web.Response) -> Handler:
    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        return response

    return answer


class _Server(web.Server):
    origins: Origins
    open: Connections

    def __call__(self) -> RequestHandler:
        return self._protocol(keepalive_timeout=KEEP_ALIVE_S)

    def patient(self) -> Protocol:
        """For a connection that waits for its next request as long as it lives."""
        return self._protocol(keepalive_timeout=NODE_IDLE_S, patient=True)

    def _protocol(self, **more: Any) -> Protocol:
        return Protocol(
            self,
            loop=self._loop,
            max_line_size=URI_BYTES_MAX,
            max_field_size=HEAD_BYTES_MAX,
            max_headers=FIELDS_MAX,
            read_bufsize=UNREAD_BYTES,
            auto_decompress=False,
            access_log=None,
            **more,
            **self._kwargs,
        )

    def connection_made(self, handler: RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        assert isinstance(handler, Protocol)
        if not handler.patient:
            origin = self.origins.of_peer(transport.get_extra_info("peername"))
            if not self.open.made(handler, origin, self._loop.time()):
                transport.abort()

    def connection_lost(self, handler: RequestHandler, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        assert isinstance(handler, Protocol)
        self.open.lost(handler)


async def write_out(request: web.BaseRequest, response: web.StreamResponse, within_s: float) -> None:
    """Write a reply that nobody pays for. A caller that does not read it within so many seconds is cut off."""
    response.headers.update(request[ALWAYS])
    try:
        async with asyncio.timeout(within_s):
            await response.prepare(request)
            await response.write_eof()
            await request.writer.drain()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("the caller did not read the reply in time") from None


async def deliver(request: web.BaseRequest, response: web.Response, within_s: float) -> Delivery:
    """Write a whole response, with a body and a length; see `Sending.send`. Raises ConnectionResetError likewise."""
    response.headers.update(request[ALWAYS])
    protocol, body = cast(Protocol, request.protocol), response.body
    transport = protocol.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the caller went before any of the reply was sent")
    assert isinstance(body, bytes)
    await response.prepare(request)
    request.writer.send_headers()
    protocol.sending = Sending(transport, within_s)
    try:
        delivery = await protocol.sending.send(b"", body)
    finally:
        protocol.sending = None
    await request.writer.write_eof()  # nothing more to write
    await response.write_eof()
    return delivery


async def hand_over(request: web.BaseRequest, protocol: asyncio.Protocol, answer: bytes) -> NoReturn:
    """Write `answer` and give the connection to another protocol; this server forgets it. Ends by being cancelled."""
    handler, transport = request.protocol, request.transport
    if transport is None or handler.transport is None:
        raise ConnectionResetError("the caller went")
    transport.set_write_buffer_limits()
    transport.write(answer)
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
    handler.transport = None  # or it would close it now
    handler.connection_lost(None)
    await asyncio.Event().wait()
    raise AssertionError("a connection that was given away is answered no more")


def _place(error: BaseException | None) -> str:
    """`module.py:line` where an exception began: enough to find it, and no values."""
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "?"
