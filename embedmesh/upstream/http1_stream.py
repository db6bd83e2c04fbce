"""A reply of a node whose body is read as it comes, with backpressure: what nobody reads stays with the node.

For one exchange a connection of a pool is lent to this protocol, and goes back when the reply has ended. Pieces are
handed out together, as many as there are; nobody waits for what is here already.
"""

import asyncio
from collections.abc import Callable

from embedmesh.rules.errors import NodeBroke, NodeFailure, TooLarge
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.http1_reader import NODE_HEAD_BYTES_MAX, ReplyReader

HELD_BYTES_MAX = 32 * 1024  # of a body; a reply of ordinary speed never has as much, and each reader may be slow
READ_BYTES_MAX = 16 * 1024  # at one time, beyond the above: asyncio's own 256 kB would make the bound useless
FRAMED_BYTES_MAX = 8  # on the wire for each byte of a body: a chunk for each takes six
LEFT_S, LEFT_BYTES_MAX = 1.0, 4_096  # until a reply ends of which no more is wanted: a last chunk has five bytes


class BodyStream(asyncio.BufferedProtocol):
    """One reply. `close` it, or `leave` it, unless it was read to its end. Header names are in lower case.

    `by_closing`: nothing but the connection's end has marked the end of the body, so that it may have been cut.
    """

    def __init__(self, connection: Connection, limit: int, put_back: Callable[[Connection], None]) -> None:
        """The body has at most `limit` bytes."""
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.by_closing = False
        self._loop = asyncio.get_running_loop()
        self._connection: Connection | None = connection
        self._put_back = put_back
        self._limit = limit
        self._reader = ReplyReader(limit * FRAMED_BYTES_MAX + NODE_HEAD_BYTES_MAX)
        self._buffer = memoryview(bytearray(READ_BYTES_MAX))
        self._pieces: list[bytes] = []
        self._unread = 0  # bytes
        self._paused = self._ended = self._left = False
        self._failure: NodeFailure | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._transport = connection.lend(self)

    async def begin(self, request: bytes) -> None:
        """Send the request, and wait for the head. Raises NodeBroke or WrongAnswer; then it is closed."""
        self._transport.write(request)
        try:
            while not self.status:
                if self._failure is not None:
                    raise self._failure
                self._waiter = self._loop.create_future()
                await self._waiter
        except BaseException:
            self.close()
            raise

    async def read(self) -> bytes | None:
        """More of the body, all that is here; None at its end.

        Raises NodeBroke where it was cut or closed, WrongAnswer where it is no HTTP, or has too many bytes.
        """
        while not self._pieces:
            if self._failure is not None:
                raise self._failure
            if self._ended:
                return None
            self._waiter = self._loop.create_future()
            await self._waiter
        pieces, self._pieces, self._unread = self._pieces, [], 0
        if self._paused:
            self._paused = False
            if self._connection is not None:
                self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_all(self, limit: int) -> bytes:
        """The whole body, or as much as `limit` bytes of it: then it is closed. Raises as `read`."""
        body = bytearray()
        while len(body) <= limit and (piece := await self.read()) is not None:
            body += piece
        if len(body) > limit:
            self.close()
        return bytes(body[:limit])

    def leave(self) -> None:
        """No more is wanted, and the node has no more work: its connection is kept if the reply ends now."""
        if self._connection is not None and not self._left:
            self._left, self._unread = True, 0
            self._pieces.clear()
            self._leaving = self._loop.call_later(LEFT_S, self._give_up)
            if self._paused:
                self._paused = False
                self._transport.resume_reading()

    def close(self) -> None:
        """No more is wanted: the connection is closed at once, so that the node can stop. Harmless after the end."""
        if not self._left:
            self._give_up()

    # -- asyncio.BufferedProtocol

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        connection, reader = self._connection, self._reader
        if connection is None:
            return
        connection.heard = True
        reader.feed(self._buffer[:nbytes])
        if not self.status and (head := reader.head) is not None:
            self.status, self.headers = head
        if self.status:
            self._keep(reader.take())
        if reader.failure is not None:
            self._fail(reader.failure)
        elif reader.reply is not None:
            self._ended = True
            self._release(reusable=reader.keeps_alive)
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        connection = self._connection
        if connection is None:
            return
        connection.connection_lost(exc)
        if exc is None and self._reader.by_closing() is not None:
            self.by_closing = self._ended = True
            self._release(reusable=False)
        else:
            self._fail(NodeBroke("the node closed the connection before its reply was whole"))
        self._wake()

    def _keep(self, pieces: list[bytes]) -> None:
        size = sum(map(len, pieces))
        self._limit -= size
        self._unread += size
        if self._left:
            if self._unread > LEFT_BYTES_MAX:
                self._give_up()
        elif self._limit < 0:
            self._fail(TooLarge("the node's reply is larger than any right one", check=Check.HTTP))
        else:
            self._pieces += pieces
            if self._unread > HELD_BYTES_MAX and not self._paused:
                self._paused = True
                self._transport.pause_reading()

    # -- inside

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_up(self) -> None:
        if self._connection is not None:
            self._fail(NodeBroke("its stream was closed"))
            self._pieces.clear()
            self._wake()

    def _fail(self, failure: NodeFailure) -> None:
        self._failure = self._failure or failure
        self._release(reusable=False)

    def _release(self, *, reusable: bool) -> None:
        """The exchange is over: the connection goes back."""
        connection, self._connection = self._connection, None
        if self._leaving is not None:
            self._leaving.cancel()
        if connection is not None:
            if not reusable:
                connection.abort()
            connection.take_back()
            self._put_back(connection)
