"""The gateway's HTTP client to nodes: a small keep-alive pool on httptools.

A general client costs five to a hundred times as much per request (docs/decisions/0004-node-client.md). This one speaks
what we need and no more: POST and GET over a Unix socket, replies with a Content-Length or chunked, a cap on head and
body. Deadlines are the caller's: cancelling an exchange closes its connection, which tells the node to stop.
"""

import asyncio
from typing import Any, cast

import httptools
import msgspec

from embedmesh.rules.deadlines import CONNECT_S
from embedmesh.rules.embeddings import COMPACT, EmbedVectors, ServedModels, pack_ids
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeRefused, NodeUnreachable, WrongAnswer
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Candidate

IDLE_MAX = 64  # kept connections a node; more than a node works on at one time
HEAD_BYTES_MAX = 16 * 1024  # our nodes send under 300
SMALL_REPLY_BYTES_MAX = 1024 * 1024  # a list of models
BYTES_PER_COMPONENT = 4
BYTES_PER_REPLY = 4_096  # around the vectors, or of a refusal

UNIX = "unix:"


class NodePool:
    """Connections to nodes, by address. Implements the port `NodeClient`."""

    def __init__(self) -> None:
        self._idle: dict[str, list[_Connection]] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_reply = msgspec.msgpack.Decoder(EmbedVectors).decode
        self._decode_models = msgspec.json.Decoder(ServedModels).decode

    async def embed(self, candidate: Candidate, model: Model, ids: list[list[int]]) -> EmbedVectors:
        """One call for vectors. Raises a NodeFailure; the answer is not yet checked against the question."""
        body = self._encode(pack_ids(model.id, ids))
        limit = len(ids) * model.width * BYTES_PER_COMPONENT + BYTES_PER_REPLY
        status, reply = await self._exchange(candidate.address, "POST", "/v1/embeddings", body, limit)
        _check_status(status)
        try:
            return self._decode_reply(reply)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's reply is not of the protocol's form") from None

    async def served(self, address: str) -> ServedModels:
        """What a node offers. Raises a NodeFailure."""
        status, reply = await self._exchange(address, "GET", "/v1/models", b"", SMALL_REPLY_BYTES_MAX)
        _check_status(status)
        try:
            return self._decode_models(reply)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's list of models is not of the protocol's form") from None

    def close(self) -> None:
        """Drop every idle connection."""
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()

    async def _exchange(self, address: str, method: str, path: str, body: bytes, limit: int) -> tuple[int, bytes]:
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\nContent-Length: {len(body)}\r\n\r\n"
        ).encode("ascii")
        idle = self._idle.setdefault(address, [])
        while idle:
            connection = idle.pop()
            if connection.usable:
                try:
                    return await self._on(connection, head + body, limit, idle)
                except NodeBroke:
                    if connection.heard:
                        raise
                    # It was closed while it lay idle: the node restarted. Embedding twice does no harm.
        return await self._on(await _connect(address), head + body, limit, idle)

    async def _on(
        self, connection: "_Connection", request: bytes, limit: int, idle: list["_Connection"]
    ) -> tuple[int, bytes]:
        try:
            result = await connection.exchange(request, limit)
        except BaseException:
            connection.abort()  # also when the caller has gone: the node sees it and drops the work
            raise
        if connection.usable and len(idle) < IDLE_MAX:
            idle.append(connection)
        else:
            connection.abort()
        return result


async def _connect(address: str) -> "_Connection":
    if not address.startswith(UNIX):
        raise NodeUnreachable("only nodes on Unix sockets are known so far")
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(CONNECT_S):
            _, connection = await loop.create_unix_connection(_Connection, address.removeprefix(UNIX))
    except (OSError, TimeoutError):
        raise NodeUnreachable("the node does not accept connections") from None
    return connection


def _check_status(status: int) -> None:
    if status == 200:
        return
    if status in (404, 408, 429, 503):  # 404: it has unloaded the model, and we have not heard of it yet
        raise NodeBusy(f"the node answered {status}")
    if 400 <= status < 500:
        raise NodeRefused(f"the node answered {status}")
    raise NodeBroke(f"the node answered {status}")


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.usable = True
        self.heard = False  # whether a byte of the current reply has come
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[tuple[int, bytes]] | None = None
        self._parser: Any = None
        self._limit = 0
        self._size = 0
        self._chunks: list[bytes] = []
        self._in_head = True
        self._complete = False

    async def exchange(self, request: bytes, limit: int) -> tuple[int, bytes]:
        """Send a request; the reply's status and body. Raises NodeBroke or WrongAnswer."""
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._limit, self._size, self._chunks = limit, 0, []
        self._in_head, self._complete, self.heard = True, False, False
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
            self._fail(WrongAnswer("the node's reply is larger than any right one"))
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail(WrongAnswer("the node's reply is not HTTP"))
        if self._in_head and self._size > HEAD_BYTES_MAX:  # only now: one read may bring the head and a large body
            self._fail(WrongAnswer("the head of the node's reply is larger than any right one"))

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._fail(NodeBroke("the node closed the connection"))

    def _fail(self, failure: Exception) -> None:
        self.usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(failure)

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self._complete:
            self.usable = False  # more than was asked for: it must not become the next answer

    def on_headers_complete(self) -> None:
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        self._complete = True
        if not self._parser.should_keep_alive():
            self.usable = False
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result((self._parser.get_status_code(), b"".join(self._chunks)))
