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
from typing import Protocol, cast

import msgspec

from embedmesh.rules.errors import NodeBroke, NodeFailure
from embedmesh.upstream.http1_reader import NODE_HEAD_BYTES_MAX, Http1Reply, ReplyReader

NODE_CLOSED = "the node closed the connection"
KNOWN_HEADS_MAX = 32  # of one connection: one for each size of a reply that is frequent
KNOWN_HEAD_BYTES_MAX = 512  # those of our nodes that recur are under 150
HEAD_END = b"\r\n\r\n"
PLAIN_HEAD = re.compile(rb"HTTP/1\.1 200 OK\r\n((?:[A-Za-z-]+: [!-~]+(?: [!-~]+)*\r\n)+)\r\n").match
HEAD_LINES = re.compile(rb"([A-Za-z-]+): ([!-~ ]+)\r\n").findall
FRAMING = frozenset((b"connection", b"proxy-connection", b"transfer-encoding", b"upgrade"))
"""Headers that say where a reply ends, or the connection: a reply that has any is httptools' to read."""


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
        self._reader: ReplyReader | None = None  # while a reply comes whose head is not known
        self._size_max = 0  # of the current reply, head and body
        self._known: dict[bytes, _KnownHead] = {}

    def begin(self, request: bytes, limit: int, receiver: Receiver) -> None:
        """Send a request. Its reply, whose body has at most `limit` bytes, is told to the receiver.

        Raises NodeBroke if the connection is closed already.
        """
        transport = self._transport
        if transport is None:
            raise NodeBroke(NODE_CLOSED)
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

    def lend(self, protocol: asyncio.BaseProtocol) -> asyncio.Transport:
        """Let another protocol have what comes from now on, for one exchange. Raises NodeBroke if the node has closed.

        The borrower ends that by `take_back`, and passes on `connection_lost` if that comes meanwhile.
        """
        self.heard = False
        if self._transport is None:
            raise NodeBroke(NODE_CLOSED)
        _hand_over(self._transport, protocol)
        return self._transport

    def take_back(self) -> None:
        """The borrower's exchange has ended."""
        if self._transport is not None:
            _hand_over(self._transport, self)

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
            self._reader = ReplyReader(self._size_max)
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
            receiver.broke(NodeBroke(NODE_CLOSED))

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


def _hand_over(transport: asyncio.Transport, protocol: asyncio.BaseProtocol) -> None:
    """uvloop asks how a protocol is to be read for only when it begins to read."""
    transport.pause_reading()
    transport.set_protocol(protocol)
    transport.resume_reading()


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
