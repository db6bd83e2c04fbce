"""The straight path: an ordinary request and its reply, without a task, a future or a coroutine.

A request takes it if it is whole in one read, its head is one that the fast path takes, and its work can begin at
once. What comes out of the ordinary later goes on as an exchange of the fast path.
"""

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from embedmesh.http.fast_path import PIPELINED_BYTES_MAX, Explain, FastExchange, FastHead, FastPath, read_head
from embedmesh.http.rendering import CLOCK, SANE_REQUEST_ID, json_head
from embedmesh.http.request_notes import NOBODY_LEFT
from embedmesh.http.sending import Rest, send_now
from embedmesh.rules.exchange import REQUEST_HEADER, Deliver, Reply
from embedmesh.rules.ids import new_id
from embedmesh.rules.request_record import AccessLog, RequestRecord
from embedmesh.rules.straight import Asked, GoOn, Straight

STRAIGHT_BODY_BYTES_MAX = 16 * 1024  # kept until the reply: beside the room for bodies, 16 MB of 1,024 requests
LAST_HEAD_BYTES_MAX = 2_048  # of a head that its connection remembers: an SDK's has 700, and 10,000 take 20 MB
LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,7})(?=\r\n)", re.IGNORECASE)
HEAD_END = b"\r\n\r\n"


class StraightConnection:
    """The fast path of one connection, and what is asked for on it: one request at a time, as in HTTP/1.1.

    It remembers the last head: the next one is likely to differ in its length only. What it takes for a head that it
    has read before is that, to the byte. A request has no task, unless it goes on as a FastExchange.
    """

    __slots__ = (
        "_after", "_asked", "_before", "_callers_id", "_explain", "_fast_path", "_further", "_head", "_known",
        "_on_end", "_slow", "_straight", "_transport",
    )  # fmt: skip

    over: ClassVar[bool] = False

    def __init__(self, fast_path: FastPath, straight: Straight, transport: asyncio.Transport) -> None:
        self._fast_path = fast_path
        self._straight = straight
        self._transport = transport
        self._before = HEAD_END  # all of the last head up to the digits of Content-Length; as yet what is in no head
        self._after = b""  # and all that follows them
        self._head: FastHead
        self._known: Any = None  # what `Straight.knows` made of it
        self._callers_id = ""  # if it is sane
        self._explain: Explain
        self._on_end: Callable[[bytes], None]
        self._asked: Asked | None = None  # until it is over, or goes on
        self._slow: FastExchange | None = None  # that it goes on as
        self._further = b""  # what came after the request that is under way

    def on(self, transport: asyncio.Transport) -> "StraightConnection":
        return self

    def begin(
        self, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
    ) -> "StraightConnection | FastExchange | None":
        """Start an exchange; None if the general server must take the request."""
        head, _, body = data.partition(HEAD_END)
        size = len(body)
        if size <= STRAIGHT_BODY_BYTES_MAX and (
            head == b"%b%d%b" % (self._before, size, self._after) or self._learnt(data, head, explain, on_end)
        ):
            try:
                self._asked = asked = self._straight.ask(self._known, body, self)
            except Exception as error:  # noqa: BLE001 - a bug of ours: explained to the caller, and counted
                self._go_on(partial(_broken, error), RequestRecord(new_id("req", CLOCK), bytes_in=size))
                return self
            if asked is not None:
                return self
        return self._fast_path.begin(transport, data, explain, on_end)

    def _learnt(self, data: bytes, head: bytes, explain: Explain, on_end: Callable[[bytes], None]) -> bool:
        """Remember the head, if the request is whole and may go straight. Returns whether it was."""
        read = read_head(data, self._fast_path.line)
        if read is None or read.end + read.length != len(data) or read.end > LAST_HEAD_BYTES_MAX:
            return False
        known, length = self._straight.knows(read.headers), LENGTH_LINE.search(data, 0, read.end)
        if known is None or length is None:
            return False
        self._before, self._after = head[: length.start(1)], head[length.end(1) :]
        self._head, self._known = read, known
        callers_id = read.headers.get("x-request-id", "")
        self._callers_id = callers_id if SANE_REQUEST_ID.fullmatch(callers_id) else ""
        self._explain, self._on_end = explain, on_end  # the same for all requests of a connection
        return True

    # -- for the handler

    def deliver(self, reply: Reply) -> Rest | None:
        """See `send_now`. After it comes `end`, or `go_on` with the rest."""
        headers = reply.headers
        request_id = self._callers_id or headers[REQUEST_HEADER]
        if (cors := self._fast_path.cors) is not None:
            headers = headers | cors.headers(self._head.headers.get("origin"))
        return send_now(self._transport, json_head(200, request_id, headers, len(reply.body)), reply.body)

    def end(self) -> None:
        """The request is over."""
        self._asked = None  # it knows us, as we know it: nobody should have to find out that it is garbage
        further = self._further
        if further:
            self._further = b""
        self._on_end(further)

    def go_on(self, handle: GoOn, rest: object | None = None) -> None:
        """Let a coroutine handle the request from now on; see `ToCaller`."""
        assert self._asked is not None
        assert rest is None or isinstance(rest, Rest)
        self._go_on(handle, self._asked.record(), rest)

    def _go_on(self, handle: GoOn, record: RequestRecord, rest: Rest | None = None) -> None:
        record.request_id = self._callers_id or record.request_id
        further, self._further, self._asked = self._further, b"", None
        self._slow = FastExchange(
            self._fast_path,
            self._transport,
            self._head._replace(length=0),
            self._explain,
            self._slow_ended,
            lambda exchange: handle(exchange.deliver),
            record=record,
            after=further,
            rest=rest,
        )

    def _slow_ended(self, further: bytes) -> None:
        self._slow = None
        self._on_end(further)

    # -- for the connection

    @property
    def answered_at(self) -> float | None:
        """See `FastExchange.answered_at`."""
        return None if self._slow is None else self._slow.answered_at

    def feed(self, data: bytes) -> None:
        if self._slow is not None:
            self._slow.feed(data)
            return
        self._further += data
        if len(self._further) > PIPELINED_BYTES_MAX:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._slow is not None:
            self._slow.resume_writing()

    def lost(self) -> None:
        if self._slow is None:
            assert self._asked is not None
            self._asked.caller_left()
            self.end()
        else:
            self._slow.lost()

    async def stopped(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for what is under way to end; then break it off."""
        if self._slow is None:
            assert self._asked is not None
            self.go_on(self._asked.go_on())
        assert self._slow is not None
        await self._slow.stopped(timeout_s)


class LoggedConnection(StraightConnection):
    """The same where each request is noted in the access log."""

    __slots__ = ("_access", "_client", "_route", "_sent")

    def __init__(
        self, fast_path: FastPath, straight: Straight, transport: asyncio.Transport, access: AccessLog
    ) -> None:
        super().__init__(fast_path, straight, transport)
        self._access = access
        self._route = fast_path.line.decode("ascii").split()
        self._sent: Reply | None = None
        self._client = ""

    def deliver(self, reply: Reply) -> Rest | None:
        """See `StraightConnection.deliver`."""
        self._sent = reply
        return super().deliver(reply)

    def end(self) -> None:
        """See `StraightConnection.end`. What is ordinary here was delivered whole."""
        asked, sent = self._asked, self._sent
        if asked is not None:
            self._sent = None
            record = asked.record()
            record.method, record.route, _ = self._route
            record.client = self._client
            if sent is not None:
                record.status, record.outcome, record.bytes_out = 200, "ok", len(sent.body)
            else:
                record.outcome = NOBODY_LEFT
            if self._callers_id:
                record.own_id, record.request_id = record.request_id, self._callers_id
            self._access.ended(record)
        super().end()

    def _learnt(self, data: bytes, head: bytes, explain: Explain, on_end: Callable[[bytes], None]) -> bool:
        learnt = super()._learnt(data, head, explain, on_end)
        if learnt:
            forwarded = self._head.headers.get("x-forwarded-for")
            self._client = self._access.client_of(self._transport.get_extra_info("peername"), forwarded)
        return learnt

    def _go_on(self, handle: GoOn, record: RequestRecord, rest: Rest | None = None) -> None:
        self._sent = None
        super()._go_on(handle, record, rest)


async def _broken(error: Exception, deliver: Deliver) -> None:
    raise error


@dataclass(frozen=True, slots=True)
class StraightPath:
    """What `straight` can ask for at once; all else goes to the `fast_path`, as all does over TLS."""

    fast_path: FastPath
    straight: Straight

    def on(self, transport: asyncio.Transport) -> FastPath | StraightConnection:
        """The fast path of a connection."""
        if transport.get_extra_info("ssl_object") is not None:
            return self.fast_path
        access = self.fast_path.access
        if access is not None:
            return LoggedConnection(self.fast_path, self.straight, transport, access)
        return StraightConnection(self.fast_path, self.straight, transport)

    def begin(
        self, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
    ) -> StraightConnection | FastExchange | None:
        """See `StraightConnection`."""
        return self.on(transport).begin(transport, data, explain, on_end)
