"""The fast path: serves a few kinds of request, as clients really send them, without the cost of a general HTTP server.

A request takes the fast path if its head is whole in one read and cannot be read in two ways: exact request line, each
header once, well-formed ASCII, a Content-Length and no other framing (see `read_head`). Any other request goes, byte
for byte, to the general server behind it, as does everything after it on that connection. So nothing here is lenient:
what the fast path takes means the same to both, which tests/http/test_fast_path.py compares.
"""

import asyncio
import contextvars
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from embedmesh.http.cors import Cors
from embedmesh.http.failures import status_and_type
from embedmesh.http.receive import BodyBudget
from embedmesh.http.rendering import failure_bytes, json_head, request_id_of
from embedmesh.http.request_notes import note_end, note_reply
from embedmesh.http.sending import Rest, Sending
from embedmesh.rules.errors import Failure, Overloaded, RequestTimeout
from embedmesh.rules.exchange import JOB_HEADER, REQUEST_HEADER, Delivery, Reply, StreamedReply
from embedmesh.rules.limits import REFUSED_BODY_S, REQUEST_BODY_S, WRITE_REPLY_S
from embedmesh.rules.request_record import CURRENT, AccessLog, RequestRecord

FAST_HEAD_BYTES_MAX = 8_190  # the general server takes as much for one line; an SDK's head has some 700 bytes
FAST_BODY_BYTES_MAX = 256 * 1024  # beside the work for larger bodies the general server's part does not matter
FAST_HEADERS_MAX = 64  # an SDK sends twenty
PIPELINED_BYTES_MAX = 64 * 1024  # of further requests, sent before this one is answered; then we stop reading

HEADER_LINE = re.compile(
    rb"([!#$%&'*+\-.^_`|~0-9A-Za-z]+):[ \t]*+((?:[!-~](?:[\t -~]*[!-~])?)?)[ \t]*"
)  # `*+`: or 8 kB of spaces take a second
CACHED_LINES_MAX, CACHED_LINE_BYTES_MAX = 2_048, 256  # parsed header lines: a client sends nearly the same ones again
CONTENT_LENGTH = re.compile(r"0|[1-9][0-9]{0,6}")
JSON_CONTENT_TYPE = re.compile(r"application/json(?:; ?charset=utf-8)?", re.IGNORECASE)
LINE_END = b"\r\n"
FRAMING = frozenset(("transfer-encoding", "content-encoding", "expect", "upgrade", "trailer", "te"))
UNSUPPORTED_HEADERS = FRAMING | {"proxy-connection", "sec-websocket-key1", JOB_HEADER}
"""They ask for more than the fast path does, or mean something special to the general server."""

Explain = Callable[[Exception, str], Failure]
"""The failure that the caller gets for what a handler raised, under this request id. Counts bugs of ours."""


class FastHead(NamedTuple):
    """Names of headers are in lower case; the body begins at `end` and has `length` bytes."""

    headers: Mapping[str, str]
    end: int
    length: int


def read_head(data: bytes, line: bytes) -> FastHead | None:
    """The head of a request that begins with `line`; None if it is not exactly of the fast path's form."""
    if not data.startswith(line):
        return None
    end = data.find(b"\r\n\r\n", len(line) - 2, FAST_HEAD_BYTES_MAX)
    if end < 0:
        return None
    lines = data[len(line) : end].split(b"\r\n")
    try:
        headers = dict([_cached_lines.get(each) or _read_line(each) for each in lines])
    except ValueError:
        return None
    if not len(headers) == len(lines) <= FAST_HEADERS_MAX:
        return None
    length = headers.get("content-length", "")
    ordinary = (
        "host" in headers
        and UNSUPPORTED_HEADERS.isdisjoint(headers)
        and headers.get("connection", "keep-alive").lower() == "keep-alive"
        and CONTENT_LENGTH.fullmatch(length)
        and int(length) <= FAST_BODY_BYTES_MAX
        and JSON_CONTENT_TYPE.fullmatch(headers.get("content-type", ""))
    )
    return FastHead(headers, end + 4, int(length)) if ordinary else None


_cached_lines: dict[bytes, tuple[str, str]] = {}


def _read_line(line: bytes) -> tuple[str, str]:
    """The header's name and value. Raises ValueError for a line that is not well-formed."""
    header = HEADER_LINE.fullmatch(line)
    if header is None:
        raise ValueError
    parsed = header[1].decode("ascii").lower(), header[2].decode("ascii")
    if len(line) <= CACHED_LINE_BYTES_MAX:
        if len(_cached_lines) >= CACHED_LINES_MAX:
            del _cached_lines[next(iter(_cached_lines))]
        _cached_lines[line] = parsed
    return parsed


@dataclass(slots=True)
class FastPath:
    """What the exchanges of all connections share; `cors` may change. Requests that begin with `line` go to `handle`.

    `handle` delivers a reply, or raises; so do those of `others`, by their lines. A caller has `write_s` seconds to
    read a reply.
    """

    line: bytes
    handle: "Callable[[FastExchange], Awaitable[None]]"
    bodies: BodyBudget
    write_s: float = WRITE_REPLY_S
    cors: Cors | None = None
    others: "Mapping[bytes, Callable[[FastExchange], Awaitable[None]]]" = field(default_factory=dict)
    access: AccessLog | None = None

    def on(self, transport: asyncio.Transport) -> "FastPath":
        return self

    def begin(
        self, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
    ) -> "FastExchange | None":
        """Start an exchange if `data` begins with an ordinary request; None if the general server must take it."""
        line, handle = self.line, self.handle
        if self.others and not data.startswith(line):
            line = data[: data.find(LINE_END) + len(LINE_END)]
            if (other := self.others.get(line)) is None:
                return None
            handle = other
        head = read_head(data, line)
        if head is None:
            return None
        exchange = FastExchange(self, transport, head, explain, on_end, handle, line=line)
        exchange.feed(data[head.end :])
        return exchange


class FastExchange:
    """One request on one connection. Implements `Exchange`."""

    def __init__(
        self,
        fast_path: FastPath,
        transport: asyncio.Transport,
        head: FastHead,
        explain: Explain,
        on_end: Callable[[bytes], None],
        handle: "Callable[[FastExchange], Awaitable[None]] | None" = None,
        *,
        line: bytes = b"",
        record: RequestRecord | None = None,
        after: bytes = b"",
        rest: Rest | None = None,
    ) -> None:
        """`on_end` is called in the end with the bytes that came after this request.

        What has gone straight until now brings its own `handle`, its `record`, what came `after` it, and the `rest`
        of its reply.
        """
        self._fast_path = fast_path
        self._transport = transport
        self._explain = explain
        self._on_end = on_end
        self._headers = head.headers
        self._missing = head.length
        self._account_id: str | None = None  # until it is known, no account's share of the room is taken
        self._taken = 0  # bytes of that share
        self._chunks: list[bytes] = []
        self._no_room: Overloaded | None = None
        self._after = after
        self._whole: asyncio.Future[None] | None = None  # `body` waits for it
        self._rest = rest
        self._sending = Sending(transport, fast_path.write_s) if rest is not None else None  # reply, or failure
        self._replied = rest is not None  # or has begun to
        self._answered = False
        self.answered_at: float | None = None  # on the loop's clock, while the remainder of a refused body is read
        self._last = False  # on this connection
        self.over = False
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._callers_id = head.headers.get("x-request-id")
        self._record = record or RequestRecord(request_id_of(self._callers_id), bytes_in=head.length)
        self.request_id = self._record.request_id
        self._line = line or fast_path.line
        self._began = time.monotonic() - self._record.seconds
        self._task = self._loop.create_task(self._run(handle or fast_path.handle), context=contextvars.Context())

    # -- for the handler

    @property
    def own_id(self) -> str | None:
        return None if self.request_id == self._callers_id else self.request_id

    def header(self, name: str) -> str | None:
        return self._headers.get(name)

    async def body(self, account_id: str) -> bytes:
        self._account_id = account_id
        self._take(sum(map(len, self._chunks)))
        if self._missing and self._no_room is None:
            self._fast_path.bodies.awaited.take(account_id)
            self._transport.resume_reading()
            self._whole = self._loop.create_future()
            self._timer = self._loop.call_later(REQUEST_BODY_S, self._body_is_late)
            try:
                await self._whole
            finally:
                self._timer.cancel()
                self._fast_path.bodies.awaited.give_back(account_id)
        if self._no_room is not None:
            raise self._no_room
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    async def deliver(self, reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply), "no operation on the fast path streams"
        note_reply(self._record, reply.headers, len(reply.body))
        if self._rest is not None and self._sending is not None:
            return await self._sending.finish(self._rest)
        self._replied = True
        request_id = self.request_id if self.own_id is None else reply.headers.get(REQUEST_HEADER, self.request_id)
        head = json_head(200, request_id, reply.headers | self._cors_headers(), len(reply.body))
        return await self._send(head, reply.body)

    # -- for the connection

    def feed(self, data: bytes) -> None:
        part, after = (data, b"") if len(data) <= self._missing else (data[: self._missing], data[self._missing :])
        if after:
            self._after += after
            if len(self._after) > PIPELINED_BYTES_MAX:
                self._transport.pause_reading()
        if part:
            self._missing -= len(part)
            if not self._answered and self._no_room is None:
                self._keep(part)
            if not self._missing:
                self._wake()
                if self._answered:
                    self._end()

    def resume_writing(self) -> None:
        if self._sending is not None:
            self._sending.resume_writing()

    def lost(self) -> None:
        """The connection is gone. What is being sent ends by itself: it may have to be paid."""
        self._last = True
        if self._sending is not None:
            self._sending.lost()
        else:
            self._loop.call_soon(self._task.cancel)  # or one that has not begun would never begin
        if self._task.done():  # only the remainder of a refused body was still read
            self._end()

    async def stopped(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for it to end; then break it off."""
        self._last = True
        await asyncio.wait([self._task], timeout=timeout_s)
        self._task.cancel()

    # -- its life

    async def _run(self, handle: "Callable[[FastExchange], Awaitable[None]]") -> None:
        CURRENT.set(self._record)
        try:
            try:
                await handle(self)
            except ConnectionError:
                raise
            except Exception as error:  # noqa: BLE001 - explained to the caller, and counted if it is a bug of ours
                failure = self._explain(error, self.request_id)
                self._record.outcome, self._record.status = failure.code, status_and_type(failure)[0]
                if self._replied:  # the client would take a second reply for that to its next request
                    raise ConnectionAbortedError from None
                self._last = self._last or isinstance(failure, RequestTimeout)
                refusal = failure_bytes(failure, self.request_id, close=self._last, more=self._cors_headers())
                self._record.bytes_out = len(refusal.partition(b"\r\n\r\n")[2])
                await self._send(b"", refusal)
        except (asyncio.CancelledError, ConnectionError):
            self._note_end()
            self._break_off()
            return
        self._note_end()
        self._answered = True
        self._chunks.clear()
        if self._missing and not self._transport.is_closing():
            self._give_back()
            self._transport.resume_reading()
            self.answered_at = self._loop.time()
            self._timer = self._loop.call_later(REFUSED_BODY_S, self._break_off)
        else:
            self._end()

    def _note_end(self) -> None:
        self._record.over = True
        if (access := self._fast_path.access) is not None:
            self._record.method, self._record.route, _ = self._line.decode("ascii").split()
            peer = self._transport.get_extra_info("peername")
            note_end(access, self._record, self._began, peer, self._headers.get("x-forwarded-for"))

    def _cors_headers(self) -> dict[str, str]:
        cors = self._fast_path.cors
        return {} if cors is None else cors.headers(self._headers.get("origin"))

    async def _send(self, head: bytes, body: bytes) -> Delivery:
        self._sending = Sending(self._transport, self._fast_path.write_s)
        return await self._sending.send(head, body)

    def _keep(self, part: bytes) -> None:
        if self._account_id is not None:
            self._take(len(part))
        elif self._chunks and self._missing:  # enough while the account is unknown: the kernel keeps the remainder
            self._transport.pause_reading()
        if self._no_room is None:
            self._chunks.append(part)

    def _take(self, size: int) -> None:
        assert self._account_id is not None
        try:
            self._fast_path.bodies.take(self._account_id, size)
        except Overloaded as refused:
            self._no_room = refused
            self._wake()
        else:
            self._taken += size

    def _wake(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_result(None)

    def _body_is_late(self) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(
                RequestTimeout(f"The request's body did not arrive within {REQUEST_BODY_S:.0f} s.")
            )

    def _break_off(self) -> None:
        self._transport.abort()
        self._end()

    def _end(self) -> None:
        self.over = True
        if self._timer is not None:
            self._timer.cancel()
        self._give_back()
        if self._last:
            self._transport.close()
        self._on_end(self._after)

    def _give_back(self) -> None:
        if self._account_id is not None:
            self._fast_path.bodies.give_back(self._account_id, self._taken)
        self._taken = 0
