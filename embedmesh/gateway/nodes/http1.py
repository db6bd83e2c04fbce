"""The gateway's HTTP/1.1 towards nodes: a small keep-alive pool on httptools.

A general client costs five to a hundred times as much per request (docs/decisions/0004-node-client.md). This one
speaks what we need and no more: whole requests, replies of any framing that HTTP/1.1 allows, a cap on head and body.
Deadlines are the caller's: cancelling an exchange closes its connection, which tells the node to stop.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, Protocol, cast

import httptools

from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeUnreachable, WrongAnswer
from embedmesh.rules.limits import CONNECT_S
from embedmesh.rules.nodes import Check

IDLE_MAX = 64  # kept connections a node; as many as it is sent parts at one time
HEAD_BYTES_MAX = 16 * 1024  # our nodes send under 1,000


class Reply(NamedTuple):
    """A node's whole answer; interim ones (1xx) and trailers are left out.

    Header names are in lower case; of one that comes twice the last counts.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    by_closing: bool = False  # only the connection's end told where it ends: it may have been cut


class Wires(Protocol):
    """The connections to one server."""

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Reply:
        """Send a request, get its reply, whose body has at most `limit` bytes. Raises a NodeFailure.

        `build` makes the request's bytes; it is called again where a connection had been closed while it lay idle.
        """
        ...

    def close(self) -> None:
        """Drop every idle connection."""
        ...


class Dialler:
    """Connections that we open, and keep for the next exchange."""

    def __init__(self, dial: Callable[[], Awaitable["Connection"]]) -> None:
        self._dial = dial
        self._idle: list[Connection] = []
        self._closed = False

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Reply:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                try:
                    return await self._on(connection, build(), limit)
                except NodeBroke:
                    if connection.heard:
                        raise
                    # It was closed while it lay idle: the node restarted. Embedding twice does no harm.
        return await self._on(await self._dial(), build(), limit)

    def close(self) -> None:
        self._closed = True
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _on(self, connection: "Connection", request: bytes, limit: int) -> Reply:
        reply = await exchange_on(connection, request, limit)
        if connection.usable and len(self._idle) < IDLE_MAX and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()
        return reply


class Inbound:
    """Connections that the other side opened, because nobody can reach it: it offers them, we use them in turns."""

    def __init__(self) -> None:
        self._idle: deque[Connection] = deque()
        self._waiting: deque[asyncio.Future[Connection]] = deque()
        self._used = 0  # those on which an answer is awaited
        self._closed = False

    def offer(self, connection: "Connection") -> None:
        """A connection is free to be used."""
        if self._closed:
            connection.abort()
            return
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)
        if len(self._idle) > IDLE_MAX:
            self._idle.popleft().abort()  # not the newest: others have been cut while they lay idle, some unnoticed

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Reply:
        while True:
            connection = await self._free()
            self._used += 1
            try:
                reply = await exchange_on(connection, build(), limit)
            except NodeBroke:
                if connection.heard:
                    raise
                if not self._idle:
                    raise NodeUnreachable("the node's own connection was closed") from None
                continue  # it had been cut while it lay idle, which nobody told us
            finally:
                self._used -= 1
            if connection.usable:
                self.offer(connection)
            return reply

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.popleft().abort()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(NodeUnreachable("the node was removed, or is elsewhere now"))

    async def _free(self) -> "Connection":
        while self._idle:
            connection = self._idle.pop()  # the one that was used last is the least likely to have been cut
            if connection.usable:
                return connection
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(CONNECT_S):
                return await waiter
        except TimeoutError:
            if self._used:
                raise NodeBusy("all connections of the node are in use") from None  # it is slow, not gone
            raise NodeUnreachable("the node has no connection of its own to us") from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)


async def exchange_on(connection: "Connection", request: bytes, limit: int) -> Reply:
    """One exchange on one connection, which is closed if anything goes wrong: also when the caller has gone, so that
    the node sees it and drops the work.
    """
    try:
        return await connection.exchange(request, limit)
    except BaseException:
        connection.abort()
        raise


def unix_dialler(path: str) -> Dialler:
    """To a server on a Unix socket."""

    async def dial() -> Connection:
        return await _connected(lambda loop: loop.create_unix_connection(Connection, path))

    return Dialler(dial)


def tcp_dialler(
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    *,
    certificate: bytes | None = None,
    name: str | None = None,
) -> Dialler:
    """To a server, with TLS where a context is given. For a node `host` is the IP that was judged, and nothing else.

    `certificate` is the one that the server must show, in DER; `name` is the host that its certificate must be for.
    """

    async def dial() -> Connection:
        connection = await _connected(
            lambda loop: loop.create_connection(
                Connection, host, port, ssl=tls, server_hostname=(name or "") if tls is not None else None
            )
        )
        if certificate is not None and connection.certificate() != certificate:
            connection.abort()
            raise NodeUnreachable("the node shows another certificate than it registered")
        return connection

    return Dialler(dial)


async def _connected(
    connect: Callable[[asyncio.AbstractEventLoop], Awaitable[tuple[Any, "Connection"]]],
) -> "Connection":
    try:
        async with asyncio.timeout(CONNECT_S):
            _, connection = await connect(asyncio.get_running_loop())
    except (OSError, TimeoutError):  # ssl.SSLError is an OSError
        raise NodeUnreachable("the node does not accept connections") from None
    return connection


def retry_after_s(headers: dict[bytes, bytes]) -> float:
    """What a refusal says of when to come again, in seconds: as a number, or as a date beside its own `Date`.

    0.0 where it does not say, or not so that it can be read.
    """
    said = headers.get(b"retry-after", b"").decode("latin-1")
    try:
        if b"retry-after-ms" in headers:
            seconds = float(headers[b"retry-after-ms"]) / 1000
        elif ":" in said:
            now = parsedate_to_datetime(headers.get(b"date", b"").decode("latin-1"))
            seconds = (parsedate_to_datetime(said) - now).total_seconds()
        else:
            seconds = float(said or 0)
    except (ValueError, TypeError, OverflowError):  # TypeError: one of two dates without its zone
        return 0.0
    return max(0.0, seconds)  # which is 0.0 of what is not a number


def busy(reply: Reply) -> NodeBusy:
    """A refusal of load as what it is."""
    return NodeBusy(f"the node answered {reply.status}", retry_after_s=retry_after_s(reply.headers))


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.usable = True
        self.heard = False  # whether a byte of the current reply has come
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Reply] | None = None
        self._parser: Any = None
        self._limit = 0
        self._size = 0
        self._chunks: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._in_head = True
        self._complete = False

    async def exchange(self, request: bytes, limit: int) -> Reply:
        """Send a request; its reply. Raises NodeBroke or WrongAnswer."""
        if self._transport is None:
            raise NodeBroke("the node closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._limit, self._size, self._chunks, self._headers = limit, 0, [], {}
        self._head_size, self._in_head, self._complete, self.heard = 0, True, False, False
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        finally:
            self._waiter = None

    def abort(self) -> None:
        """Close at once."""
        self.usable = False
        if self._transport is not None:
            self._transport.abort()

    def certificate(self) -> bytes | None:
        """What the other side showed, in DER; None without TLS."""
        ssl_object = self._transport.get_extra_info("ssl_object") if self._transport is not None else None
        return ssl_object.getpeercert(binary_form=True) if ssl_object is not None else None

    # -- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # by how we connect

    def data_received(self, data: bytes) -> None:
        if self._waiter is None or self._waiter.done():
            self.abort()  # a node speaks only when asked
            return
        self.heard = True
        self._size += len(data)
        if self._size > self._limit + HEAD_BYTES_MAX:
            self._fail(WrongAnswer("the node's reply is larger than any right one", check=Check.HTTP))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(WrongAnswer("the node's reply is not HTTP", check=Check.HTTP))
        if self._in_head and self._size > HEAD_BYTES_MAX:  # only now: one read may bring the head and a large body
            self._fail(_large_head())

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._transport = None
        if exc is None and self._ends_by_closing():
            self._answer(by_closing=True)
        self._fail(NodeBroke("the node closed the connection"))

    def _fail(self, failure: Exception) -> None:
        self.usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(failure)

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            self.usable = False  # more than was asked for: it must not become the next answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._in_head:  # else a trailer: it must not overrule what the head has said
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_size > HEAD_BYTES_MAX:
            self._fail(_large_head())

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._parser.get_status_code() < 200:  # the reply itself is still to come
            self._headers, self._in_head = {}, True
            return
        self._complete = True
        if not self._parser.should_keep_alive():
            self.usable = False
        self._answer()

    def _ends_by_closing(self) -> bool:
        """Whether the connection's end is the reply's: its head has said of no other."""
        coding = self._headers.get(b"transfer-encoding", b"").lower()
        return not self._in_head and b"content-length" not in self._headers and not coding.endswith(b"chunked")

    def _answer(self, *, by_closing: bool = False) -> None:
        if self._waiter is not None and not self._waiter.done():
            status = self._parser.get_status_code()
            self._waiter.set_result(Reply(status, self._headers, b"".join(self._chunks), by_closing))


def _large_head() -> WrongAnswer:
    return WrongAnswer("the head of the node's reply is larger than any right one", check=Check.HTTP)
