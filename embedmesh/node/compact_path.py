"""A node's fast path: a gateway's request, as our gateway writes it, is answered without the general server.

A request takes it if its head is whole in one read and, byte for byte, of the one form that the node protocol gives.
Any other, and all that follows it on its connection, goes to the general server behind, to which the form means the
same. What is answered here has a head that is constant but for its length, so that a gateway can know it by heart.
"""

import asyncio
import re
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

from embedmesh.http.failures import envelope, hint_headers, status_and_type
from embedmesh.http.fast_path import Explain
from embedmesh.http.receive import BodyBudget
from embedmesh.http.rendering import json_head, own_request_id
from embedmesh.http.request_notes import NOBODY_LEFT, note_end
from embedmesh.node.app import LATE, QUEUE_FULL_STATUS, CompactDone
from embedmesh.rules.embeddings import EMBED_HEAD, LIST_HEAD, LISTED_HEAD, SEALED_HEAD, VECTORS_HEAD
from embedmesh.rules.errors import DeadlineExceeded, Failure, Overloaded, RequestTimeout
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_BODY_S, REQUEST_MAX_S, WRITE_REPLY_S
from embedmesh.rules.request_record import AccessLog, RequestRecord

if TYPE_CHECKING:
    from embedmesh.signing.messages import CheckedRequest  # only a node that joined a gateway needs it

TRACED = rb"(?:Traceparent: (00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})\r\n)?"  # of a gateway that traces
LENGTH = TRACED + rb"Content-Length: (0|[1-9][0-9]{0,6})\r\n\r\n"
UNSIGNED = re.compile(LENGTH)
SIGNED_HEADERS = ("content-digest", "embedmesh-node", "embedmesh-request-id", "signature-input", "signature")
SIGNED = re.compile(
    rb"Content-Digest: ([!-~]+)\r\nEmbedmesh-Node: ([!-~]+)\r\nEmbedmesh-Request-Id: ([!-~]+)\r\n"
    rb"Signature-Input: ([!-~]+(?: [!-~]+)*)\r\nSignature: ([!-~]+)\r\n" + LENGTH
)


class App(Protocol):
    """What a node answers by: see NodeApp."""

    def begin_compact(self, body: bytes, done: CompactDone) -> Callable[[], object]: ...

    def list_bytes(self) -> bytes: ...


BeginTraced = Callable[[bytes, CompactDone, str], Callable[[], object]]
"""As `App.begin_compact`, for a call with a `traceparent`."""


class Signs(Protocol):
    """What checks requests and signs replies: see SignedApi."""

    def check_head(self, method: str, path: str, headers: Mapping[str, str]) -> "CheckedRequest": ...

    def check_body(self, checked: "CheckedRequest", body: bytes) -> None: ...

    def sign(self, checked: "CheckedRequest", reply: bytes, tokens: int) -> list[tuple[str, str]]: ...


class Seals(Protocol):
    """What answers sealed calls: see SealedCalls."""

    def begin(self, body: bytes, done: CompactDone) -> Callable[[], object]: ...


class CompactForm(NamedTuple):
    """One kind of request: how its head begins, and how long its body may be."""

    head: bytes
    method: str
    path: str
    bytes_max: int


EMBED = CompactForm(EMBED_HEAD, "POST", "/v1/embeddings", REQUEST_BODY_BYTES_MAX)
SEALED = CompactForm(SEALED_HEAD, "POST", "/v1/confidential/embeddings", REQUEST_BODY_BYTES_MAX)  # larger ones are rare
LIST = CompactForm(LIST_HEAD, "GET", "/v1/models", 0)


class CompactPath:
    """What the exchanges of all connections share. With `signed`, requests and replies are."""

    def __init__(
        self,
        app: App,
        bodies: BodyBudget,
        signed: Signs | None = None,
        sealed: Seals | None = None,
        begin_traced: BeginTraced | None = None,
        access: AccessLog | None = None,
    ) -> None:
        """Without `sealed`, sealed calls are left to the general server; without `begin_traced` nothing is traced."""
        self.app, self.bodies, self.signed, self.sealed = app, bodies, signed, sealed
        self.begin_traced, self.access = begin_traced, access
        self._form = (UNSIGNED if signed is None else SIGNED).match
        self._running: dict[CompactExchange, float] = {}  # since when, on the loop's clock; the oldest comes first
        self._watched = False

    def on(self, transport: asyncio.Transport) -> "CompactPath":
        return self

    def begin(
        self, transport: asyncio.Transport, data: bytes, explain: Explain, on_end: Callable[[bytes], None]
    ) -> "CompactExchange | None":
        """Answer `data` if it begins with a request of the form; None if the general server must take it."""
        if data.startswith(EMBED_HEAD):
            asked = EMBED
        elif data.startswith(LIST_HEAD):
            asked = LIST
        elif self.sealed is not None and data.startswith(SEALED_HEAD):
            asked = SEALED
        else:
            return None
        head = self._form(data, len(asked.head))
        if head is None:
            return None
        *headers, traceparent, length = head.groups()
        missing = int(length)
        if missing > asked.bytes_max:
            return None
        exchange = CompactExchange(self, transport, explain, on_end, asked=asked, missing=missing)
        if traceparent is not None and self.begin_traced is not None:
            exchange.traceparent = traceparent.decode("ascii")
        exchange.check_head(headers)
        exchange.feed(data[head.end() :])
        return exchange

    def watch(self, exchange: "CompactExchange", loop: asyncio.AbstractEventLoop) -> None:
        """End it if it is not forgotten within REQUEST_MAX_S. One timer for all: none comes to that."""
        self._running[exchange] = loop.time()
        if not self._watched:
            self._watched = True
            loop.call_later(REQUEST_MAX_S, self._look, loop)

    def forget(self, exchange: "CompactExchange") -> None:
        """It has ended."""
        self._running.pop(exchange, None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watched = False
        now = loop.time()
        for exchange in [each for each, since in self._running.items() if now - since >= REQUEST_MAX_S]:
            exchange.is_late()
        if self._running:
            self._watched = True
            loop.call_later(next(iter(self._running.values())) + REQUEST_MAX_S - now, self._look, loop)


class CompactExchange:
    """One request on one connection."""

    def __init__(
        self,
        path: CompactPath,
        transport: asyncio.Transport,
        explain: Explain,
        on_end: Callable[[bytes], None],
        *,
        asked: CompactForm,
        missing: int,
    ) -> None:
        """`missing` are the bytes of its body. `on_end` is called in the end with the bytes that came after it."""
        self._path = path
        self._transport = transport
        self._explain = explain
        self._on_end = on_end
        self._asked = asked
        self._missing = self._bytes_in = missing
        self._began = time.monotonic() if path.access is not None else 0.0
        self._checked: CheckedRequest | None = None
        self._refused: Failure | None = None  # before its body was whole, which is then thrown away
        self._chunks: list[bytes] = []
        self._taken = 0  # bytes of the room for bodies
        self._after = b""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._drop: Callable[[], object] | None = None  # while it is embedded
        self._replied = self._noted = False  # `noted` in the access log
        self._last = False  # on this connection
        self.over = False
        self._ended: asyncio.Future[None] | None = None  # `stopped` waits for it
        self.answered_at: float | None = None  # never idle before its end
        self.traceparent: str | None = None

    def check_head(self, headers: list[bytes]) -> None:
        """Check who sends this, before a byte of the body is kept: strangers take no memory."""
        signed = self._path.signed
        if signed is None:
            return
        named = dict(zip(SIGNED_HEADERS, [value.decode("ascii") for value in headers], strict=True))
        try:
            self._checked = signed.check_head(self._asked.method, self._asked.path, named)
        except Failure as failure:
            self._refused = failure

    # -- for the connection

    def feed(self, data: bytes) -> None:
        part, after = (data, b"") if len(data) <= self._missing else (data[: self._missing], data[self._missing :])
        if after:  # our gateway sends nothing before it is answered
            self._after += after
            self._transport.pause_reading()
        if part and self._refused is None:
            self._keep(part)
        self._missing -= len(part)
        if self._missing:
            if self._timer is None:
                self._timer = self._loop.call_later(REQUEST_BODY_S, self._body_is_late)
        elif self._drop is None and not self._replied:
            self._whole()

    def resume_writing(self) -> None:
        if self._replied:
            self._end()

    def lost(self) -> None:
        """The connection is gone: what waits for it is never computed."""
        if not self.over and not self._replied:
            self._note(NOBODY_LEFT, 0, 0, 0)
        if self._drop is not None:
            self._drop()
        self._end()

    def is_late(self) -> None:
        """Nothing may take so long."""
        if self._drop is not None:
            self._drop()
        self._embedded(DeadlineExceeded(LATE), 0)

    async def stopped(self, timeout_s: float) -> None:
        """Wait at most `timeout_s` for it to end; then break it off."""
        self._last = True
        if self.over:
            return
        self._ended = self._loop.create_future()
        await asyncio.wait([self._ended], timeout=timeout_s)
        if not self.over:
            self._transport.abort()

    # -- its life

    def _keep(self, part: bytes) -> None:
        try:
            self._path.bodies.take("", len(part))
        except Overloaded as failure:
            self._refused = failure
            self._chunks.clear()
        else:
            self._taken += len(part)
            self._chunks.append(part)

    def _body_is_late(self) -> None:
        self._last = True
        self._missing = 0
        self._refuse(RequestTimeout(f"The request's body did not arrive within {REQUEST_BODY_S:.0f} s."))

    def _whole(self) -> None:
        """The body is there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._refused is not None:
            self._refuse(self._refused)
            return
        body = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        try:
            if self._checked is not None and self._path.signed is not None:
                self._path.signed.check_body(self._checked, body)
            if self._asked is LIST:
                self._reply(LISTED_HEAD, self._path.app.list_bytes(), 0)
                return
            if self._asked is SEALED and self._path.sealed is not None:
                self._drop = self._path.sealed.begin(body, self._embedded)
            elif self.traceparent is not None and self._path.begin_traced is not None:
                self._drop = self._path.begin_traced(body, self._embedded, self.traceparent)
            else:
                self._drop = self._path.app.begin_compact(body, self._embedded)
            self._path.watch(self, self._loop)
        except Exception as error:  # noqa: BLE001 - explained, and counted if it is a bug of ours
            self._refuse(error)

    def _embedded(self, reply: bytes | Exception, tokens: int) -> None:
        self._drop = None
        if self.over:
            return
        if isinstance(reply, Exception):
            self._refuse(reply)
            return
        try:
            self._reply(VECTORS_HEAD, reply, tokens)
        except Exception as error:  # noqa: BLE001 - as above
            self._refuse(error)

    def _reply(self, start: bytes, body: bytes, tokens: int) -> None:
        head = b"%b%d\r\n" % (start, len(body))
        if self._checked is not None and self._path.signed is not None:
            lines = [f"{name}: {value}\r\n" for name, value in self._path.signed.sign(self._checked, body, tokens)]
            head += "".join(lines).encode("ascii")
        self._note("ok", 200, len(body), tokens)
        self._write(head + b"\r\n" + body)

    def _refuse(self, error: Exception) -> None:
        request_id = self._checked.request_id if self._checked is not None else own_request_id()
        failure = self._explain(error, request_id)
        status = QUEUE_FULL_STATUS if isinstance(failure, Overloaded) else status_and_type(failure)[0]
        body = envelope(failure)
        more = hint_headers(failure) | ({"Connection": "close"} if self._last else {})
        self._note(failure.code, status, len(body), 0)
        self._write(json_head(status, request_id, more, len(body)) + body)

    def _note(self, outcome: str, status: int, size: int, tokens: int) -> None:
        if (access := self._path.access) is not None and not self._noted:
            self._noted = True
            record = RequestRecord(
                self._checked.request_id if self._checked is not None else "",
                method=self._asked.method,
                route=self._asked.path,
                status=status,
                outcome=NOBODY_LEFT if self._transport.is_closing() else outcome,
                bytes_in=self._bytes_in,
                bytes_out=size,
                tokens=tokens,
            )
            note_end(access, record, self._began, self._transport.get_extra_info("peername"), None)

    def _write(self, reply: bytes) -> None:
        if self.over or self._transport.is_closing():
            return
        self._replied = True
        self._transport.write(reply)
        if self._transport.get_write_buffer_size():
            self._timer = self._loop.call_later(WRITE_REPLY_S, self._transport.abort)
        else:
            self._end()

    def _end(self) -> None:
        if self.over:
            return
        self.over = True
        self._path.forget(self)
        if self._timer is not None:
            self._timer.cancel()
        if self._taken:
            self._path.bodies.give_back("", self._taken)
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(None)
        if self._last:
            self._transport.close()
        self._on_end(self._after)
