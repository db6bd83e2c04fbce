"""The gateway's HTTP/1.1 towards nodes.

A general client costs five to a hundred times as much per request (docs/decisions/0004-node-client.md). This one has
what we need and no more: whole requests, replies of any framing that HTTP/1.1 allows, a cap on head and body. Deadlines
are the caller's: cancelling an exchange closes its connection, which tells the node to stop.

A reply is told to a receiver, without a future or a task. httptools reads it, unless it has come whole, and its head is
of the plainest form or is known: a connection remembers a few heads byte for byte. A reply that begins with one of them
is what was made of the one before, with another body.
"""

import asyncio
import re
from email.utils import parsedate_to_datetime
from typing import Any, Protocol, cast

import httptools
import msgspec

from embedmesh.rules.errors import NodeBroke, NodeFailure, WrongAnswer
from embedmesh.rules.nodes import Check

NODE_HEAD_BYTES_MAX = 16 * 1024  # our nodes send under 1,000
KNOWN_HEADS_MAX = 32  # of one connection: one for each size of a reply that is frequent
KNOWN_HEAD_BYTES_MAX = 512  # those of our nodes that recur are under 150
HEAD_END = b"\r\n\r\n"
PLAIN_HEAD = re.compile(rb"HTTP/1\.1 200 OK\r\n((?:[A-Za-z-]+: [!-~]+(?: [!-~]+)*\r\n)+)\r\n").match
HEAD_LINES = re.compile(rb"([A-Za-z-]+): ([!-~ ]+)\r\n").findall
FRAMING = frozenset((b"connection", b"proxy-connection", b"transfer-encoding", b"upgrade"))
"""Headers that say where a reply ends, or the connection: a reply that has any is httptools' to read."""


class Http1Reply(msgspec.Struct, frozen=True):
    """A node's whole reply, without interim ones (1xx) and trailers.

    Header names are in lower case; of a repeated one the last counts. They must not be changed.
    """

    status: int
    headers: dict[bytes, bytes]
    body: bytes
    by_closing: bool = False  # only the connection's end marks the body's end: it may have been cut


class Receiver(Protocol):
    """Who waits for a reply. It is told once, never from inside of `begin`. The calls must not wait."""

    def replied(self, reply: Http1Reply) -> None:
        """The reply is whole."""
        ...

    def broke(self, failure: NodeFailure) -> None:
        """There is none: NodeBroke or WrongAnswer. The connection is closed."""
        ...


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
        self._receiver: Receiver | None = None
        self._reader: _ReplyReader | None = None  # while a reply comes whose head is not known
        self._size_max = 0  # of the current reply, head and body
        self._known: dict[bytes, _KnownHead] = {}

    def begin(self, request: bytes, limit: int, receiver: Receiver) -> None:
        """Send a request. Its reply, whose body has at most `limit` bytes, is told to the receiver.

        Raises NodeBroke if the connection is closed already.
        """
        transport = self._transport
        if transport is None:
            raise NodeBroke("the node closed the connection")
        self.heard = False
        self._size_max = limit + NODE_HEAD_BYTES_MAX
        self._receiver = receiver
        transport.write(request)

    async def exchange(self, request: bytes, limit: int) -> Http1Reply:
        """Send a request; its reply. Raises NodeBroke or WrongAnswer.

        Any failure closes the connection, also a cancellation: then the node drops the work.
        """
        waiter = _Waiter(asyncio.get_running_loop().create_future())
        self.begin(request, limit, waiter)
        try:
            return await waiter.future
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Break the exchange off, and close. Its receiver is told nothing more."""
        self._receiver = self._reader = None
        self.abort()

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
        receiver = self._receiver
        if receiver is None:
            self.abort()  # a node must not send unasked
            return
        if not self.heard:
            self.heard = True
            head, _, body = data.partition(HEAD_END)
            known = self._known.get(head)
            if known is not None and len(body) == known.body_bytes and len(data) <= self._size_max:
                self._receiver = None
                receiver.replied(Http1Reply(known.status, known.headers, body))
                return
            if (reply := _plain_reply(data, self._size_max)) is not None:
                self._receiver = None
                self._remember(data, reply)
                receiver.replied(reply)
                return
            self._reader = _ReplyReader(self._size_max)
        self._read(data, receiver)

    def connection_lost(self, exc: Exception | None) -> None:
        self.usable = False
        self._transport = None
        receiver, reader = self._receiver, self._reader
        self._receiver = self._reader = None
        if receiver is None:
            return
        reply = reader.by_closing() if exc is None and reader is not None else None
        if reply is not None:
            receiver.replied(reply)
        else:
            receiver.broke(NodeBroke("the node closed the connection"))

    def _read(self, data: bytes, receiver: Receiver) -> None:
        """Some of a reply whose head is not known."""
        reader = self._reader
        assert reader is not None
        reader.feed(data)
        reply, failure = reader.reply, reader.failure
        if failure is not None:
            self.cancel()
            receiver.broke(failure)
        elif reply is not None:
            self._receiver = self._reader = None
            if not reader.keeps_alive:
                self.usable = False
            elif reader.size == len(data):  # it came in this one read
                self._remember(data, reply)
            receiver.replied(reply)

    def _remember(self, data: bytes, reply: Http1Reply) -> None:
        """Know the head of a reply that came in one read from now on, if it can come again."""
        if b"signature" in reply.headers:
            return
        head, _, body = data.partition(HEAD_END)
        if (
            len(head) <= KNOWN_HEAD_BYTES_MAX
            and body == reply.body
            and reply.headers.get(b"content-length") == b"%d" % len(body)  # nothing else says how long it is
            and b"transfer-encoding" not in reply.headers
        ):
            if len(self._known) >= KNOWN_HEADS_MAX:
                del self._known[next(iter(self._known))]  # the oldest
            self._known[head] = _KnownHead(reply.status, reply.headers, len(body))


class _Waiter:
    """A receiver for a coroutine."""

    def __init__(self, future: "asyncio.Future[Http1Reply]") -> None:
        self.future = future

    def replied(self, reply: Http1Reply) -> None:
        if not self.future.done():  # else the coroutine was cancelled a moment ago
            self.future.set_result(reply)

    def broke(self, failure: NodeFailure) -> None:
        if not self.future.done():
            self.future.set_exception(failure)


class _ReplyReader:
    """One reply, read by httptools as it comes. What is there first counts: the `reply`, or a `failure`."""

    def __init__(self, size_max: int) -> None:
        self.reply: Http1Reply | None = None
        self.failure: WrongAnswer | None = None
        self.keeps_alive = True
        self._parser: Any = httptools.HttpResponseParser(self)  # until the end: each refers to the other
        self._size_max = size_max
        self.size = 0
        self._chunks: list[bytes] = []
        self._headers: dict[bytes, bytes] = {}
        self._head_size = 0
        self._in_head = True

    def feed(self, data: bytes) -> None:
        """Read on, until there is a reply or a failure."""
        self.size += len(data)
        if self.size > self._size_max:
            self._fail("the node's reply is larger than any right one")
        else:
            try:
                self._parser.feed_data(data)
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                self.keeps_alive = False
                self._fail("the node's reply is not HTTP")
            if self._in_head and self.size > NODE_HEAD_BYTES_MAX:  # only now: a large body may have come with the head
                self._fail_by_head()
        if self.reply is not None or self.failure is not None:
            self._parser = None

    def by_closing(self) -> Http1Reply | None:
        """The reply if the connection's end is its own, since its head gives no other."""
        coding = self._headers.get(b"transfer-encoding", b"").lower()
        if self._in_head or b"content-length" in self._headers or coding.endswith(b"chunked"):
            return None
        return self._whole(by_closing=True)

    def _whole(self, *, by_closing: bool = False) -> Http1Reply:
        return Http1Reply(self._parser.get_status_code(), self._headers, b"".join(self._chunks), by_closing)

    def _fail(self, words: str) -> None:
        if self.reply is None and self.failure is None:
            self.failure = WrongAnswer(words, check=Check.HTTP)

    def _fail_by_head(self) -> None:
        self._fail("the head of the node's reply is larger than any right one")

    # -- httptools callbacks

    def on_message_begin(self) -> None:
        if self.reply is not None:
            self.keeps_alive = False  # a second reply: it must not become the next answer

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_size += len(name) + len(value)
        if self._in_head:  # else a trailer: it must not overrule the head
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._head_size > NODE_HEAD_BYTES_MAX:
            self._fail_by_head()

    def on_body(self, body: bytes) -> None:
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        if 100 <= self._parser.get_status_code() < 200:  # the reply itself is still to come
            self._headers, self._in_head = {}, True
            return
        if not self._parser.should_keep_alive():
            self.keeps_alive = False
        if self.reply is None and self.failure is None:
            self.reply = self._whole()


class _KnownHead(msgspec.Struct, frozen=True):
    """A reply's head that was read before: what it says, and how long the body is."""

    status: int
    headers: dict[bytes, bytes]
    body_bytes: int


def _plain_reply(data: bytes, size_max: int) -> Http1Reply | None:
    """A reply of status 200 that came whole in one read, with a head that nobody could read in two ways; else None."""
    head = PLAIN_HEAD(data)
    if head is None or head.end() > NODE_HEAD_BYTES_MAX or len(data) > size_max:
        return None
    names, values = zip(*HEAD_LINES(head[1]), strict=True)
    headers = dict(zip(map(bytes.lower, names), values, strict=True))
    body = data[head.end() :]
    if (
        len(headers) != len(names)
        or headers.get(b"content-length") != b"%d" % len(body)
        or not FRAMING.isdisjoint(headers)
    ):
        return None
    return Http1Reply(200, headers, body)
