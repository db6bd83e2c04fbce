"""The connections to one server: those that we open, and those that the server opens to us."""

import asyncio
import contextvars
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol

from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeUnreachable
from embedmesh.rules.limits import CONNECT_S
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.http1_stream import BodyStream

GROWING_MAX = 8  # connections that are opened ahead at one time: enough for a burst, little work in vain
CUT_UNNOTICED = "the node's own connection was closed"
IDLE_CONNECTIONS_MAX = 256  # kept for one node, a few kB each: as many as large servers generate on at one time


class ConnectionPool(Protocol):
    """The connections to one server."""

    def take(self) -> Connection | None:
        """An idle connection for one exchange, at once, if there is one. It must come back to `put_back`."""
        ...

    def put_back(self, connection: Connection) -> None:
        """An exchange on a connection has ended, in whatever way."""
        ...

    def grow(self) -> None:
        """There was none to `take`: have one more soon, if we can open one."""
        ...

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Http1Reply:
        """Send a request, get its reply, whose body has at most `limit` bytes. Raises a NodeFailure.

        `build` makes the request's bytes. It is called again if an idle connection turns out to be closed.
        """
        ...

    async def stream(self, build: Callable[[], bytes], limit: int) -> BodyStream:
        """As `exchange`, but the reply is handed out once its head has come."""
        ...

    def close(self) -> None:
        """Drop every idle connection."""
        ...


class OutboundPool:
    """Connections that we open, and keep for the next exchange.

    They are dialled in a context of their own: what a node answers runs in it, whichever request asked first.
    """

    def __init__(self, dial: Callable[[], Coroutine[Any, Any, Connection]]) -> None:
        self._dial = dial
        self._idle: list[Connection] = []
        self._growing: set[asyncio.Task[None]] = set()
        self._closed = False

    def take(self) -> Connection | None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                return connection
        return None

    def put_back(self, connection: Connection) -> None:
        if connection.usable and len(self._idle) < IDLE_CONNECTIONS_MAX and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()

    def grow(self) -> None:
        if len(self._growing) < GROWING_MAX and not self._closed:
            task = asyncio.get_running_loop().create_task(self._grow(), context=contextvars.Context())
            self._growing.add(task)
            task.add_done_callback(self._growing.discard)

    async def _grow(self) -> None:
        with suppress(NodeUnreachable):  # an exchange that needs a connection will find out
            self.put_back(await self._dial())

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Http1Reply:
        while (connection := self.take()) is not None:
            try:
                return await connection.exchange(build(), limit)
            except NodeBroke:
                if connection.heard:
                    raise
                # The idle connection was closed: the node restarted. Embedding twice does no harm.
            finally:
                self.put_back(connection)
        connection = await self._dialled()
        try:
            return await connection.exchange(build(), limit)
        finally:
            self.put_back(connection)

    async def stream(self, build: Callable[[], bytes], limit: int) -> BodyStream:
        while (connection := self.take()) is not None:
            try:
                return await _begun(connection, build(), limit, self.put_back)
            except NodeBroke:
                if connection.heard:
                    raise
                # As in `exchange`.
        return await _begun(await self._dialled(), build(), limit, self.put_back)

    async def _dialled(self) -> Connection:
        dialling = asyncio.get_running_loop().create_task(self._dial(), context=contextvars.Context())
        try:
            return await dialling
        except asyncio.CancelledError:
            if dialling.done() and not dialling.cancelled() and dialling.exception() is None:
                dialling.result().abort()  # it came in the moment in which nobody waited any more
            raise

    def close(self) -> None:
        self._closed = True
        for connection in self._idle:
            connection.abort()
        self._idle.clear()
        for task in self._growing:
            task.cancel()


class InboundPool:
    """Connections that an unreachable node opened to us: it offers them, we use them in turns."""

    def __init__(self) -> None:
        self._idle: deque[Connection] = deque()
        self._waiting: deque[asyncio.Future[Connection]] = deque()
        self._used = 0  # connections with an exchange under way
        self._closed = False

    def offer(self, connection: Connection) -> None:
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
        if len(self._idle) > IDLE_CONNECTIONS_MAX:
            self._idle.popleft().abort()  # the oldest: it is the likeliest to have been cut unnoticed

    def take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()  # the last used one is the least likely to have been cut
            if connection.usable:
                self._used += 1
                return connection
        return None

    def grow(self) -> None:
        """The node opens them."""

    def put_back(self, connection: Connection) -> None:
        self._used -= 1
        if connection.usable:
            self.offer(connection)

    async def exchange(self, build: Callable[[], bytes], limit: int) -> Http1Reply:
        while True:
            connection = self.take() or await self._next()
            try:
                return await connection.exchange(build(), limit)
            except NodeBroke:
                if connection.heard:
                    raise
                if not self._idle:
                    raise NodeUnreachable(CUT_UNNOTICED) from None
                # The idle connection had been cut unnoticed.
            finally:
                self.put_back(connection)

    async def stream(self, build: Callable[[], bytes], limit: int) -> BodyStream:
        while True:
            connection = self.take() or await self._next()
            try:
                return await _begun(connection, build(), limit, self.put_back)
            except NodeBroke:
                if connection.heard:
                    raise
                if not self._idle:
                    raise NodeUnreachable(CUT_UNNOTICED) from None

    def close(self) -> None:
        self._closed = True
        while self._idle:
            self._idle.popleft().abort()
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_exception(NodeUnreachable("the node was removed, or is elsewhere now"))

    async def _next(self) -> Connection:
        """As `take`, once a connection is free or is offered."""
        waiter: asyncio.Future[Connection] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        connection: Connection | None = None
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await waiter
        except TimeoutError:
            if self._used:
                raise NodeBusy("all connections of the node are in use") from None  # it is slow, not gone
            raise NodeUnreachable("the node has no connection of its own to us") from None
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif connection is None and not waiter.cancelled() and waiter.exception() is None:
                self.offer(waiter.result())  # it came in the moment in which nobody waited any more
        self._used += 1
        return connection


async def _begun(
    connection: Connection, request: bytes, limit: int, put_back: Callable[[Connection], None]
) -> BodyStream:
    """A stream whose head has come. It puts the connection back, however it ends."""
    try:
        stream = BodyStream(connection, limit, put_back)
    except NodeBroke:
        put_back(connection)
        raise
    await stream.begin(request)
    return stream


def unix_pool(path: str) -> OutboundPool:
    """To a server on a Unix socket."""

    async def dial() -> Connection:
        return await _connected(lambda loop: loop.create_unix_connection(Connection, path))

    return OutboundPool(dial)


def tcp_pool(
    host: str,
    port: int,
    tls: ssl.SSLContext | None = None,
    *,
    certificate: bytes | None = None,
    name: str | None = None,
) -> OutboundPool:
    """To a server, with TLS where a context is given. For a node, `host` must be the IP that `resolve` returned.

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

    return OutboundPool(dial)


async def _connected(
    connect: Callable[[asyncio.AbstractEventLoop], Awaitable[tuple[Any, Connection]]],
) -> Connection:
    try:
        async with asyncio.timeout(CONNECT_S):
            _, connection = await connect(asyncio.get_running_loop())
    except (OSError, TimeoutError):  # ssl.SSLError is an OSError
        raise NodeUnreachable("the node does not accept connections") from None
    return connection
