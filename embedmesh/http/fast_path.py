"""The fast path: one kind of request, as clients really send it, without what a general HTTP server does for each.

A request takes the fast path if its head is whole in one read and says nothing that two parsers could read in two
ways: exact request line, each field once, well-formed ASCII, a Content-Length and no other framing: see `read_head`.
Everything else is left, byte for byte, to the general server behind it, and so is what follows on that connection. So
nothing here is lenient: what the fast path takes means the same to both, which tests/http/test_fast_path.py compares.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import NamedTuple

from embedmesh.http.cors import Cors
from embedmesh.http.receive import BODY_S, BodyBudget
from embedmesh.http.rendering import failure_bytes, json_head, request_id_of
from embedmesh.http.sending import Sending
from embedmesh.rules.errors import Failure, Overloaded, RequestTimeout
from embedmesh.rules.exchange import REQUEST_HEADER, Delivery, Reply, StreamedReply
from embedmesh.rules.limits import WRITE_REPLY_S

HEAD_BYTES_MAX = 8_190  # the general server takes as much for one line; an SDK's head has some 700 bytes
BODY_BYTES_MAX = 256 * 1024  # beside the work for larger ones the general server's part does not matter
FIELDS_MAX = 64  # an SDK sends twenty
AFTER_BYTES_MAX = 64 * 1024  # of further requests, sent before this one is answered; then we stop reading
LINGER_S = 2.0  # read what a refused caller still sends, so that it sees the answer and not a reset

FIELD = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*+((?:[!-~](?:[\t -~]*[!-~])?)?)[ \t]*"
)  # `*+`: or 8 kB of spaces take a second
SEEN_MAX, SEEN_BYTES_MAX = 2_048, 256  # lines of heads that are remembered: nearly all of a client's are the same again
LENGTH = re.compile(r"0|[1-9][0-9]{0,6}")
JSON = re.compile(r"application/json(?:; ?charset=utf-8)?", re.IGNORECASE)
FRAMING = frozenset(("transfer-encoding", "content-encoding", "expect", "upgrade", "trailer", "te"))
OTHER_WAYS = FRAMING | {"proxy-connection", "sec-websocket-key1"}
"""Fields that ask for more than the fast path does, or mean something of their own to the general server."""

Explain = Callable[[Exception, str], Failure]
"""What the caller is told of what a handler raised, and in the reply to which request id. A bug of ours is counted."""


class Head(NamedTuple):
    """Of a request. Names of fields are in lower case; the body begins at `end` and has `length` bytes."""

    fields: Mapping[str, str]
    end: int
    length: int


def read_head(data: bytes, line: bytes) -> Head | None:
    """The head of a request that begins with `line`; None for whatever is not exactly of the fast path's form."""
    if not data.startswith(line):
        return None
    end = data.find(b"\r\n\r\n", len(line) - 2, HEAD_BYTES_MAX)
    if end < 0:
        return None
    lines = data[len(line) : end].split(b"\r\n")
    try:
        fields = dict([_seen.get(each) or _read_field(each) for each in lines])
    except ValueError:
        return None
    if not len(fields) == len(lines) <= FIELDS_MAX:
        return None
    length = fields.get("content-length", "")
    right = (
        "host" in fields
        and OTHER_WAYS.isdisjoint(fields)
        and fields.get("connection", "keep-alive").lower() == "keep-alive"
        and LENGTH.fullmatch(length)
        and int(length) <= BODY_BYTES_MAX
        and JSON.fullmatch(fields.get("content-type", ""))
    )
    return Head(fields, end + 4, int(length)) if right else None


_seen: dict[bytes, tuple[str, str]] = {}


def _read_field(line: bytes) -> tuple[str, str]:
    """Name and value. Raises ValueError for a line that is not well-formed."""
    field = FIELD.fullmatch(line)
    if field is None:
        raise ValueError
    read = field[1].decode("ascii").lower(), field[2].decode("ascii")
    if len(line) <= SEEN_BYTES_MAX:
        if len(_seen) >= SEEN_MAX:
            del _seen[next(iter(_seen))]
        _seen[line] = read
    return read


class FastPath:
    """What the fast paths of all connections have in common. Requests that begin with `line` are for `handle`.

    `handle` delivers a reply, or raises. What it raises is told to the caller; `explain` says how.
    """

    def __init__(
        self,
        line: bytes,
        handle: "Callable[[FastExchange], Awaitable[None]]",
        bodies: BodyBudget,
        *,
        write_s: float = WRITE_REPLY_S,
        cors: Cors | None = None,
    ) -> None:
        """A reply has to be read within `write_s` seconds."""
        self.line = line
        self.handle = handle
        self.bodies = bodies
        self.write_s = write_s
        self.cors = cors


class FastExchange:
    """One request on one connection. Implements `Exchange`."""

    def __init__(
        self,
        fast_path: FastPath,
        transport: asyncio.Transport,
        head: Head,
        explain: Explain,
        on_end: Callable[[bytes], None],
    ) -> None:
        """`on_end` is told, once this is over, of the bytes that came after it."""
        self._lane = fast_path
        self._transport = transport
        self._explain = explain
        self._on_end = on_end
        self._fields = head.fields
        self._missing = head.length
        self._account_id: str | None = None  # once it is known who asks: no room is spent before
        self._taken = 0  # of the room for bodies, of that account's share
        self._chunks: list[bytes] = []
        self._no_room: Overloaded | None = None
        self._after = b""
        self._whole: asyncio.Future[None] | None = None  # `body` waits for it
        self._sending: Sending | None = None  # the reply, or what is told in its place
        self._replied = False  # or has begun to
        self._answered = False
        self.answered_at: float | None = None  # on the loop's clock, where what still comes is read for nobody
        self._last = False  # on this connection
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._asked_id = head.fields.get("x-request-id")
        self.request_id = request_id_of(self._asked_id)
        self._task = self._loop.create_task(self._run())

    # -- for the handler

    @property
    def own_id(self) -> str | None:
        return None if self.request_id == self._asked_id else self.request_id

    def header(self, name: str) -> str | None:
        return self._fields.get(name)

    async def body(self, account_id: str) -> bytes:
        self._account_id = account_id
        self._take(sum(map(len, self._chunks)))
        if self._missing and self._no_room is None:
            await self._rest_of_body(account_id)
        if self._no_room is not None:
            raise self._no_room
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    async def _rest_of_body(self, account_id: str) -> None:
        self._lane.bodies.awaited.take(account_id)
        self._transport.resume_reading()
        self._whole = self._loop.create_future()
        self._timer = self._loop.call_later(BODY_S, self._body_is_late)
        try:
            await self._whole
        finally:
            self._timer.cancel()
            self._lane.bodies.awaited.give_back(account_id)

    async def deliver(self, reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        self._replied = True
        request_id = self.request_id if self.own_id is None else reply.headers.get(REQUEST_HEADER, self.request_id)
        head = json_head(200, request_id, reply.headers | self._also(), len(reply.body))
        return await self._send(head, reply.body)

    # -- for the connection

    def feed(self, data: bytes) -> None:
        """More bytes have come."""
        part, after = (data, b"") if len(data) <= self._missing else (data[: self._missing], data[self._missing :])
        if after:
            self._after += after
            if len(self._after) > AFTER_BYTES_MAX:
                self._transport.pause_reading()
        if part:
            self._missing -= len(part)
            if not self._answered and self._no_room is None:
                self._keep(part)
            if not self._missing:
                self._all_is_here()

    def resume_writing(self) -> None:
        """What was written is in the kernel."""
        if self._sending is not None:
            self._sending.resume_writing()

    def lost(self) -> None:
        """The connection is gone, and whoever asked. What is being sent ends by itself: it may have to be paid."""
        self._last = True
        if self._sending is not None:
            self._sending.lost()
        else:
            self._task.cancel()
        if self._task.done():  # it was waiting for the rest of a body that nobody needs
            self._end()

    async def stopped(self, timeout_s: float) -> None:
        """Wait for it to end, for at most so long; then break it off."""
        self._last = True
        await asyncio.wait([self._task], timeout=timeout_s)
        self._task.cancel()

    # -- its life

    async def _run(self) -> None:
        try:
            await self._lane.handle(self)
        except (asyncio.CancelledError, ConnectionError):
            self._break_off()
            return
        except Exception as error:  # noqa: BLE001 - explained to the caller, and counted where it is a bug of ours
            failure = self._explain(error, self.request_id)
            if self._replied:  # a second answer would be taken for that to the next request
                self._break_off()
                return
            self._last = self._last or isinstance(failure, RequestTimeout)
            try:
                refusal = failure_bytes(failure, self.request_id, close=self._last, more=self._also())
                await self._send(b"", refusal)
            except (asyncio.CancelledError, ConnectionError):
                self._break_off()
                return
        self._answered = True
        self._chunks.clear()
        if self._missing and not self._transport.is_closing():
            self._give_back()
            self._transport.resume_reading()
            self.answered_at = self._loop.time()
            self._timer = self._loop.call_later(LINGER_S, self._break_off)
        else:
            self._end()

    def _also(self) -> dict[str, str]:
        return {} if self._lane.cors is None else self._lane.cors.headers(self._fields.get("origin"))

    async def _send(self, head: bytes, body: bytes) -> Delivery:
        self._sending = Sending(self._transport, self._lane.write_s)
        return await self._sending.send(head, body)

    def _keep(self, part: bytes) -> None:
        if self._account_id is not None:
            self._take(len(part))
        elif self._chunks and self._missing:  # enough of what may be nobody's: the rest waits in the kernel
            self._transport.pause_reading()
        if self._no_room is None:
            self._chunks.append(part)

    def _take(self, size: int) -> None:
        assert self._account_id is not None
        try:
            self._lane.bodies.take(self._account_id, size)
        except Overloaded as refused:
            self._no_room = refused
            self._wake()
        else:
            self._taken += size

    def _all_is_here(self) -> None:
        self._wake()
        if self._answered:
            self._end()

    def _wake(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def _body_is_late(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(RequestTimeout(f"The request's body did not arrive within {BODY_S:.0f} s."))

    def _break_off(self) -> None:
        self._transport.abort()
        self._end()

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._give_back()
        if self._last:
            self._transport.close()
        self._on_end(self._after)

    def _give_back(self) -> None:
        if self._account_id is not None:
            self._lane.bodies.give_back(self._account_id, self._taken)
        self._taken = 0


def begin(
    fast_path: FastPath, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
) -> FastExchange | None:
    """A request on the fast path, where the data begins one; None where the general server is to have it."""
    head = read_head(data, fast_path.line)
    if head is None:
        return None
    exchange = FastExchange(fast_path, transport, head, explain, on_end)
    exchange.feed(data[head.end :])
    return exchange
