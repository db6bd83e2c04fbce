"""The straight path: an ordinary request and its reply, without a task, a future or a coroutine.

A request takes it if it is whole in one read, its head is one that the fast path takes, and its work can begin at
once. What comes out of the ordinary later goes on as an exchange of the fast path.
"""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from embedmesh.http.fast_path import PIPELINED_BYTES_MAX, Explain, FastExchange, FastHead, FastPath, read_head
from embedmesh.http.rendering import json_head, own_request_id, request_id_of
from embedmesh.http.sending import Rest, send_now
from embedmesh.rules.exchange import Reply
from embedmesh.rules.straight import GoOn, Straight

STRAIGHT_BODY_BYTES_MAX = 16 * 1024  # kept until the reply: beside the room for bodies, 16 MB of 1,024 requests
KNOWN_HEAD_BYTES_MAX = 2_048  # of a head that its connection remembers: an SDK's has 700, and 10,000 take 20 MB
LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,7})(?=\r\n)", re.IGNORECASE)
ZERO = ord("0")
NEVER = b"\0"  # begins no request


class KnownHead:
    """The last head of a connection that may go straight. The next one is likely to differ in its length only."""

    __slots__ = ("after", "before", "callers_id", "head", "known")

    def __init__(self) -> None:
        self.before = NEVER  # all up to the digits of Content-Length
        self.after = NEVER  # and all that follows them
        self.head: FastHead | None = None
        self.known: Any = None  # what `Straight.knows` made of it
        self.callers_id: str | None = None

    def learn(self, data: bytes, head: FastHead, known: Any) -> None:
        """Remember a head that the fast path takes."""
        length = LENGTH_LINE.search(data, 0, head.end)
        if length is not None and head.end <= KNOWN_HEAD_BYTES_MAX:
            self.before, self.after = data[: length.start(1)], data[length.end(1) : head.end]
            self.head, self.known, self.callers_id = head, known, head.headers.get("x-request-id")

    def body(self, data: bytes) -> bytes | None:
        """The body if `data` is one whole request with this head but for its length; None for anything else."""
        if not data.startswith(self.before):
            return None
        at = len(self.before)
        cut = data.find(b"\r\n", at, at + 7)
        digits = data[at:cut]
        end = cut + len(self.after)
        if cut < 0 or not digits.isdigit() or digits[0] == ZERO or not data.startswith(self.after, cut):
            return None
        return data[end:] if int(digits) == len(data) - end <= STRAIGHT_BODY_BYTES_MAX else None


class StraightExchange:
    """One request on one connection. It has no task, unless it goes on as a FastExchange."""

    __slots__ = (
        "_after",
        "_asked",
        "_explain",
        "_fast_path",
        "_head",
        "_on_end",
        "_slow",
        "_transport",
        "own_id",
        "request_id",
    )

    def __init__(
        self,
        fast_path: FastPath,
        transport: asyncio.Transport,
        last: KnownHead,
        explain: Explain,
        on_end: Callable[[bytes], None],
    ) -> None:
        self._fast_path = fast_path
        self._transport = transport
        self._head = last.head
        self._explain = explain
        self._on_end = on_end
        self._after = b""
        self._slow: FastExchange | None = None
        callers_id = last.callers_id
        self.request_id = own_request_id() if callers_id is None else request_id_of(callers_id)
        self.own_id = None if self.request_id == callers_id else self.request_id

    def ask(self, straight: Straight, known: Any, body: bytes) -> bool:
        """Whether the request is ordinary, and its work has begun."""
        asked = straight.ask(known, body, self)
        if asked is None:
            return False
        self._asked = asked
        return True

    # -- for the handler

    def deliver(self, reply: Reply) -> Rest | None:
        """See `send_now`. Whoever gets no rest calls `end`, and else `go_on`."""
        headers, cors = reply.headers, self._fast_path.cors
        if cors is not None:
            assert self._head is not None
            headers = headers | cors.headers(self._head.headers.get("origin"))
        return send_now(self._transport, json_head(200, self.request_id, headers, len(reply.body)), reply.body)

    def end(self) -> None:
        """The request is over."""
        self._on_end(self._after)

    def go_on(self, handle: GoOn, rest: object | None = None) -> None:
        """Let a coroutine handle the request from now on; see `ToCaller`."""
        assert self._head is not None
        assert rest is None or isinstance(rest, Rest)
        self._slow = FastExchange(
            self._fast_path,
            self._transport,
            self._head._replace(length=0),
            self._explain,
            self._on_end,
            lambda exchange: handle(exchange.deliver),
            request_id=self.request_id,
            after=self._after,
            rest=rest,
        )

    # -- for the connection

    @property
    def answered_at(self) -> float | None:
        """See `FastExchange.answered_at`."""
        return None if self._slow is None else self._slow.answered_at

    def feed(self, data: bytes) -> None:
        if self._slow is not None:
            self._slow.feed(data)
            return
        self._after += data
        if len(self._after) > PIPELINED_BYTES_MAX:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._slow is not None:
            self._slow.resume_writing()

    def lost(self) -> None:
        if self._slow is None:
            self._asked.caller_left()
            self.end()
        else:
            self._slow.lost()

    async def stopped(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for it to end; then break it off."""
        if self._slow is None:
            self.go_on(self._asked.go_on())
        assert self._slow is not None
        await self._slow.stopped(timeout_s)


def begin(
    fast_path: FastPath,
    transport: asyncio.Transport,
    data: bytes,
    explain: Explain,
    on_end: Callable[[bytes], None],
    last: KnownHead | None,
) -> StraightExchange | FastExchange | None:
    """Start an exchange if `data` begins with an ordinary request; None if the general server must take it.

    `last` is the connection's; None if nothing on it goes straight, as over TLS.
    """
    head = None
    if last is not None and (straight := fast_path.straight) is not None:
        body = last.body(data)
        if body is None and (head := read_head(data, fast_path.line)) is not None:
            known = straight.knows(head.headers) if head.end + head.length == len(data) else None
            if known is not None:
                last.learn(data, head, known)
                body = last.body(data)
        if body is not None:
            exchange = StraightExchange(fast_path, transport, last, explain, on_end)
            if exchange.ask(straight, last.known, body):
                return exchange
    head = head or read_head(data, fast_path.line)
    if head is None:
        return None
    slow = FastExchange(fast_path, transport, head, explain, on_end)
    slow.feed(data[head.end :])
    return slow
