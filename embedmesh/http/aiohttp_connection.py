"""One connection of the general server: aiohttp's, with our deadlines, our bounds and our envelope for its refusals.

This is the only module that uses what aiohttp does not document. tests/http/test_aiohttp_private.py names all of it,
and pyproject.toml pins aiohttp's minor version.
"""

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn, Protocol, cast

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage, BadHttpMethod, HttpProcessingError, LineTooLong

from embedmesh.http.connections import Connections, Origins
from embedmesh.http.failures import failure_response, status_and_type
from embedmesh.http.fast_path import Explain
from embedmesh.http.rendering import REPLY_HEADERS, SERVER_HEADER, failure_bytes, own_request_id
from embedmesh.http.request_notes import note_end
from embedmesh.http.sending import Sending
from embedmesh.rules import limits
from embedmesh.rules.errors import BodyTooLarge, Failure, HeadTooLarge, MalformedHttp, RequestTimeout, UriTooLong
from embedmesh.rules.exchange import Delivery
from embedmesh.rules.request_record import AccessLog, RequestRecord

AIOHTTP_IDLE_S = 7 * 86_400.0  # aiohttp's own idle timeout; ours, which knows the fast path, comes long before
DRAIN_MIN_S = 0.001  # aiohttp takes a timeout of zero for "no timeout"
BAD_HEAD = HttpProcessingError  # what a part's head raises that cannot be read
READ_AHEAD_BYTES = 16 * 1024  # of a body. aiohttp reads up to twice that before we know whose body it is


class AnyFastExchange(Protocol):
    """One request on a fast path, as its connection sees it: see FastExchange."""

    @property
    def answered_at(self) -> float | None: ...

    @property
    def over(self) -> bool: ...

    def feed(self, data: bytes) -> None: ...

    def resume_writing(self) -> None: ...

    def lost(self) -> None: ...

    async def stopped(self, timeout_s: float) -> None: ...


class AnyFastPath(Protocol):
    """What answers the requests that it knows to the byte; a gateway and a node have one each."""

    def on(self, transport: asyncio.Transport) -> "AnyFastPath":
        """The fast path of one connection, which may remember what came on it."""

    def begin(
        self, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
    ) -> AnyFastExchange | None:
        """Take a request; None if the general server must."""


class ServerConnection(web.RequestHandler):
    """A connection whose requests go to the fast path until one comes that is not ordinary, then to aiohttp."""

    def __init__(
        self,
        server: web.Server,
        *,
        head_s: float,
        explain: Explain,
        origins: Origins,
        connections: Connections,
        fast_path: AnyFastPath | None = None,
        dialled: bool = False,
        access: AccessLog | None = None,
    ) -> None:
        """`dialled`: we opened the connection ourselves. It may idle for as long as the other side likes."""
        self._event_loop = asyncio.get_running_loop()
        super().__init__(
            server,
            loop=self._event_loop,
            keepalive_timeout=AIOHTTP_IDLE_S,
            lingering_time=limits.REFUSED_BODY_S,
            max_line_size=limits.URI_BYTES_MAX,
            max_field_size=limits.REQUEST_HEADER_BYTES_MAX,
            max_headers=limits.REQUEST_HEADERS_MAX,
            read_bufsize=READ_AHEAD_BYTES,
            auto_decompress=False,
            access_log=None,  # type: ignore[arg-type]  # None means no log
        )
        self._head_s = head_s
        self._explain = explain
        self._origins = origins
        self._connections = connections
        self._fast_path = fast_path  # None once another request has come, or the connection is to close
        self._dialled = dialled
        self._access = access
        self._exchange: AnyFastExchange | None = None  # on the fast path, now
        self.sending: Sending | None = None  # a reply that `deliver` writes, now
        self._head_timer: asyncio.TimerHandle | None = None
        self._idle_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0  # of a head that is not whole yet
        self._idle_from = self._event_loop.time()  # when its last request ended
        self._answered = False  # by the general server; until the next request is there
        self.lost: asyncio.Future[None] = self._event_loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport = cast(asyncio.Transport, transport)
        # "Delivered" means: in the kernel. With no room in the buffer, drain() waits for just that. Over TLS a limit of
        # 0 would also pause us when the buffer is empty, and nothing would wake us again.
        high = 0 if transport.get_extra_info("ssl_object") is None else 1
        if self._fast_path is not None:
            self._fast_path = self._fast_path.on(transport)
        transport.set_write_buffer_limits(high=high, low=0)
        if self._dialled:
            return
        self._start_head_timer()
        self._idle_timer = self._event_loop.call_later(limits.KEEP_ALIVE_S, self._close_if_idle)
        origin = self._origins.of_peer(transport.get_extra_info("peername"))
        if not self._connections.made(self, origin, self._event_loop.time()):
            transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)
            return
        if self._fast_path is not None and self.transport is not None:
            exchange = self._fast_path.begin(self.transport, data, self._explain, self._fast_exchange_ended)
            if exchange is not None:
                if self._head_timer is not None:
                    self._stop_head_timer()
                if not exchange.over:
                    self._exchange = exchange
                return
            self._fast_path = None  # aiohttp's parser has bytes now; where its next request begins only it knows
        super().data_received(data)
        if self._messages:
            self._answered = False
        if not self._awaits_head():
            self._head_bytes = 0
            self._stop_head_timer()
            return
        self._head_bytes += len(data)
        if self._head_bytes > limits.REQUEST_HEAD_BYTES_MAX:
            self._refuse_head(
                HeadTooLarge(f"The request's head has more than {limits.REQUEST_HEAD_BYTES_MAX:,} bytes.")
            )
        elif self._head_timer is None:  # the first bytes of a head that is not whole yet
            self._start_head_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._exchange is not None:
            self._exchange.resume_writing()
        elif self.sending is not None:
            self.sending.resume_writing()

    def close(self) -> None:
        """Take no further request."""
        self._fast_path = None
        super().close()

    async def shutdown(self, timeout: float | None = 15.0) -> None:
        """Let the request that is running end within `timeout` seconds, then close."""
        timeout = timeout or DRAIN_MIN_S
        if self._exchange is not None:
            await self._exchange.stopped(timeout)
        await super().shutdown(timeout)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._connections.lost(self)
        self._stop_head_timer()
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        if self._exchange is not None:
            self._exchange.lost()
        if not self.lost.done():
            self.lost.set_result(None)
        if self.sending is not None:
            self.sending.lost()
            self._task_handler = None  # or aiohttp would cancel it, as if the caller had gone before its reply
        super().connection_lost(exc)

    def idle_since(self) -> float | None:
        """When its last request ended, or it was made, on the loop's clock; None in the middle of a request."""
        if self._exchange is not None:
            return self._exchange.answered_at
        busy = self._messages or not (self._answered or self._awaits_head())
        return None if busy else self._idle_from

    def _close_if_idle(self) -> None:
        now, idle_since = self._event_loop.time(), self.idle_since()
        close_at = (now if idle_since is None else idle_since) + limits.KEEP_ALIVE_S
        if close_at <= now:
            self.force_close()
        else:
            self._idle_timer = self._event_loop.call_at(close_at, self._close_if_idle)

    def _awaits_head(self) -> bool:
        nothing_yet = self._request_count == 0  # true even before aiohttp's own task has begun to wait
        return not self._messages and (nothing_yet or self._waiter is not None)

    def _fast_exchange_ended(self, after: bytes) -> None:
        """The connection is idle, or its next request begins with the bytes that came `after` the last one."""
        self._exchange = None
        if self.transport is None or self.transport.is_closing():
            return
        if self._fast_path is None:
            self.transport.close()
            return
        self._idle_from = self._event_loop.time()
        if after:
            self.transport.resume_reading()
            self.data_received(after)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _start_head_timer(self) -> None:
        self._head_timer = self._event_loop.call_later(self._head_s, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._awaits_head():
            self._refuse_head(RequestTimeout(f"The request's head did not arrive within {self._head_s:.0f} s."))

    def _refuse_head(self, failure: Failure) -> None:
        """Answer a head that is not whole, and read no more."""
        if self.transport is not None:
            request_id = own_request_id()
            self._note_refused(failure, request_id)
            self.transport.write(failure_bytes(failure, request_id, close=True))
            self.force_close()

    def _note_refused(self, failure: Failure, request_id: str) -> None:
        """No handler sees what cannot be parsed."""
        if self._access is not None and self.transport is not None:
            record = RequestRecord(request_id, outcome=failure.code, status=status_and_type(failure)[0])
            note_end(self._access, record, time.monotonic(), self.transport.get_extra_info("peername"), None)

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        finished = await super().finish_response(request, resp, start_time)
        if not self._messages:
            self._answered, self._idle_from = True, self._event_loop.time()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The parser refused, or writing a reply failed. aiohttp's own words may quote the request; ours do not."""
        if request.writer.output_size > 0:
            raise ConnectionError("part of a reply is already sent")
        if isinstance(exc, ConnectionError):
            raise exc  # the caller went; nobody is to blame
        request_id = own_request_id()
        if status < 500:
            failure = refused_by_parser(exc)
            self._note_refused(failure, request_id)
        else:
            failure = self._explain(exc if isinstance(exc, Exception) else TimeoutError(), request_id)
        response = failure_response(failure)
        response.headers.update({"x-request-id": request_id, **SERVER_HEADER})
        response.force_close()
        return response


def refused_by_parser(exc: BaseException | None) -> Failure:
    """The failure that the caller gets for what the parser refused."""
    if isinstance(exc, LineTooLong):
        if exc.args[1] == limits.URI_BYTES_MAX:
            return UriTooLong(f"The address in the request is longer than {limits.URI_BYTES_MAX:,} bytes.")
        return HeadTooLarge(f"A header of the request is longer than {limits.REQUEST_HEADER_BYTES_MAX:,} bytes.")
    reason = exc.message if isinstance(exc, BadHttpMessage) else ""
    if isinstance(exc, BadHttpMethod) or reason.startswith("Pause on PRI"):
        return MalformedHttp("This is not an HTTP/1.1 request. Is the client speaking TLS or HTTP/2?")
    if reason.startswith("Content-Length overflow"):
        return BodyTooLarge(f"The body is larger than the limit of {limits.REQUEST_BODY_BYTES_MAX:,} bytes.")
    if reason.startswith("Too many headers"):
        return HeadTooLarge(f"The request has more than {limits.REQUEST_HEADERS_MAX} headers.")
    if reason.startswith("Duplicate"):
        return MalformedHttp("A header that may be given once is given more than once.")
    return MalformedHttp("The HTTP request could not be parsed: wrong request line, headers or framing.")


async def write_out(request: web.BaseRequest, response: web.StreamResponse, within_s: float) -> None:
    """Write a reply that is not charged. A caller that does not read it within `within_s` is cut off."""
    response.headers.update(request[REPLY_HEADERS])
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
    response.headers.update(request[REPLY_HEADERS])
    connection, body = request.protocol, response.body
    assert isinstance(connection, ServerConnection)
    assert isinstance(body, bytes)
    transport = connection.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the caller went before any of the reply was sent")
    await send_head(request, response)
    connection.sending = Sending(transport, within_s)
    try:
        delivery = await connection.sending.send(b"", body)
    finally:
        connection.sending = None
    await request.writer.write_eof()  # nothing more to write
    await response.write_eof()
    return delivery


async def send_head(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Write the head of a response now: aiohttp would wait for the first bytes of its body."""
    await response.prepare(request)
    request.writer.send_headers()


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
