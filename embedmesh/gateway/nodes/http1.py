"""The gateway's HTTP/1.1 towards nodes, on httptools.

A general client costs five to a hundred times as much per request (docs/decisions/0004-node-client.md). This one has
what we need and no more: whole requests, replies of any framing that HTTP/1.1 allows, a cap on head and body. Deadlines
are the caller's: cancelling an exchange closes its connection, which tells the node to stop.
"""

import asyncio
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple, cast

import httptools

from embedmesh.rules.errors import NodeBroke, WrongAnswer
from embedmesh.rules.nodes import Check

NODE_HEAD_BYTES_MAX = 16 * 1024  # our nodes send under 1,000


class Http1Reply(NamedTuple):
    """A node's whole reply, without interim ones (1xx) and trailers.

    Header names are in lower case; of a repeated one the last counts.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    by_closing: bool = False  # only the connection's end marks the body's end: it may have been cut


def retry_after_s(headers: dict[bytes, bytes]) -> float:
    """A refusal's Retry-After in seconds: a number, or a date relative to its `Date`. 0.0 if absent or unreadable."""
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
    return max(0.0, seconds)  # 0.0 of NaN, too


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self) -> None:
        self.usable = True
        self.heard = False  # whether a byte of the current reply has come
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Http1Reply] | None = None
        self._parser: Any = None
        self._limit = 0
        self._size = 0
        self._chunks: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._in_head = True
        self._complete = False

    async def exchange(self, request: bytes, limit: int) -> Http1Reply:
        """Send a request; its reply. Raises NodeBroke or WrongAnswer.

        Any failure closes the connection, also a cancellation: then the node drops the work.
        """
        if self._transport is None:
            raise NodeBroke("the node closed the connection")
        self._parser = httptools.HttpResponseParser(self)
        self._limit, self._size, self._chunks, self._headers = limit, 0, [], {}
        self._head_size, self._in_head, self._complete, self.heard = 0, True, False, False
        self._waiter = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            return await self._waiter
        except BaseException:
            self.abort()
            raise
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
            self.abort()  # a node must not send unasked
            return
        self.heard = True
        self._size += len(data)
        if self._size > self._limit + NODE_HEAD_BYTES_MAX:
            self._fail(WrongAnswer("the node's reply is larger than any right one", check=Check.HTTP))
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._fail(WrongAnswer("the node's reply is not HTTP", check=Check.HTTP))
        if self._in_head and self._size > NODE_HEAD_BYTES_MAX:  # only now: one read may bring the head and a large body
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
            self.usable = False  # a second reply: it must not become the next answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._in_head:  # else a trailer: it must not overrule the head
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_size > NODE_HEAD_BYTES_MAX:
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
        """Whether the connection's end is the reply's, since its head gives no other."""
        coding = self._headers.get(b"transfer-encoding", b"").lower()
        return not self._in_head and b"content-length" not in self._headers and not coding.endswith(b"chunked")

    def _answer(self, *, by_closing: bool = False) -> None:
        if self._waiter is not None and not self._waiter.done():
            status = self._parser.get_status_code()
            self._waiter.set_result(Http1Reply(status, self._headers, b"".join(self._chunks), by_closing))


def _large_head() -> WrongAnswer:
    return WrongAnswer("the head of the node's reply is larger than any right one", check=Check.HTTP)
