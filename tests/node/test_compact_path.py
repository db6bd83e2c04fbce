"""A node's fast path beside the general server behind it, over a real Unix socket and our gateway's own client."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from embedmesh.gateway.nodes.own import EMBED, OwnLink, Signing
from embedmesh.gateway.nodes.traced import TracedOwnLink
from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.node import compact_path
from embedmesh.node.app import CompactDone, NodeApp
from embedmesh.node.compact_path import CompactExchange, CompactPath
from embedmesh.node.signed_api import SignedApi
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import COMPACT, EmbedIds, ServedModel, ServedModels, pack_ids, unpack_ids
from embedmesh.rules.errors import InvalidValue, NodeBroke, NodeFailure, Overloaded
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.request_record import RequestRecord
from embedmesh.rules.traces import asking_as, traceparent_of
from embedmesh.signing.identity import Identity, node_id
from embedmesh.signing.receipt_log import ReceiptLog
from embedmesh.signing.session import Session
from embedmesh.upstream.pools import unix_pool
from tests.flow.world import CATALOGUE, MODEL, right_reply
from tests.gateway.attempts import at_once
from tests.gateway.mesh import begin_compact, until
from tests.http.raw import Raw, read_reply

IDS = [[1, 2], [3]]
BODY = msgspec.msgpack.encode(pack_ids(MODEL.id, IDS))
VECTORS = msgspec.msgpack.encode(right_reply(IDS))
HEAD = f"POST /v1/embeddings HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n"
SESSION = Session("0123456789abcdef", bytes(range(32)))
BODIES_BYTES = 1_000_000


def ask(body: bytes = BODY, length: object = None) -> bytes:
    """As our gateway writes it."""
    return f"{HEAD}Content-Length: {len(body) if length is None else length}\r\n\r\n".encode() + body


class App:
    """In place of a node's models: right answers, failures on demand, or none while `open` is not set."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.open.set()
        self.raises: Exception | None = None
        self.running = 0

    async def embed_compact(self, body: bytes) -> tuple[bytes, int]:
        self.running += 1
        try:
            await self.open.wait()
        finally:
            self.running -= 1
        if self.raises is not None:
            raise self.raises
        answer = right_reply(unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds)))
        return msgspec.msgpack.encode(answer), answer.tokens

    def begin_compact(self, body: bytes, done: CompactDone) -> Callable[[], object]:
        return begin_compact(self, body, done)

    def list_bytes(self) -> bytes:
        described = [ServedModel(one.id, one.width, one.max_tokens, one.digest, one.tier) for one in CATALOGUE.models]
        return msgspec.json.encode(ServedModels(described))


class NodeServer:
    """A node's server over that application, on a Unix socket, with its fast path or without."""

    def __init__(self, folder: Path, *, fast: bool = True, signed: bool = False) -> None:
        self.socket = folder / "node.sock"
        self.app = App()
        self.bugs = 0
        self.taken: list[CompactExchange] = []
        self.records: list[RequestRecord] = []
        self.bodies = BodyBudget(BODIES_BYTES)
        self.identity = Identity.load(folder / "node.identity")
        app: NodeApp = self.app  # type: ignore[assignment]
        self.door = SignedApi(
            app=app,
            bodies=self.bodies,
            identity=self.identity,
            gateway="",
            address="",
            receipts=ReceiptLog(folder / "receipts.log"),
            clock=SystemClock(),
        )
        self.door.new_session(SESSION)
        general = NodeApp([], CATALOGUE, None, self.bodies)  # type: ignore[arg-type]
        general.embed_compact, general.list_bytes = app.embed_compact, app.list_bytes  # type: ignore[method-assign]
        self.told: list[str] = []  # of traces
        signs = self.door if signed else None
        path = CompactPath(app, self.bodies, signs, begin_traced=self._begin_traced, access=self)
        begin = path.begin

        def noting(*args: object) -> CompactExchange | None:
            exchange = begin(*args)  # type: ignore[arg-type]
            self.taken += [exchange] if exchange is not None else []
            return exchange

        path.begin = noting  # type: ignore[method-assign, assignment]
        routes = self.door.routes() if signed else general.routes()
        self.server = HttpServer(routes, on_internal_error=self._bug, fast_path=path if fast else None)

    def _begin_traced(self, body: bytes, done: CompactDone, traceparent: str) -> Callable[[], object]:
        self.told.append(traceparent)
        return self.app.begin_compact(body, done)

    def client_of(self, peer: object, forwarded: str | None) -> str:
        return ""

    def ended(self, record: RequestRecord) -> None:
        self.records.append(record)

    def _bug(self) -> None:
        self.bugs += 1

    def link(self, *, signed: bool = False, kind: type[OwnLink] = OwnLink) -> OwnLink:
        """Our gateway's client."""
        signing = None
        if signed:
            signing = Signing(
                node_id(self.identity.public_key), "0" * 16, SystemClock(), lambda *answer: self.answered.append(answer)
            )
            signing.add(SESSION)
        self.answered: list[tuple[str, str, str, int]] = []
        return kind(unix_pool(str(self.socket)), SystemClock(), signing)


@asynccontextmanager
async def serving(
    folder: Path, *, fast: bool = True, signed: bool = False, drain_s: float = 0.1
) -> AsyncIterator[NodeServer]:
    node = NodeServer(folder, fast=fast, signed=signed)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(node.socket))
    sock.setblocking(False)
    await node.server.start(sock)
    try:
        yield node
    finally:
        await node.server.drain(drain_s)
        node.socket.unlink()
    assert node.bodies.taken == 0, "room for bodies was not given back"


async def connect(node: NodeServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(str(node.socket))


async def send(node: NodeServer, raw: bytes) -> Raw:
    reader, writer = await connect(node)
    try:
        writer.write(raw)
        async with asyncio.timeout(5):
            return await read_reply(reader)
    finally:
        writer.close()


@pytest.mark.parametrize("signed", [False, True], ids=["socket", "signed"])
async def test_all_that_our_gateway_asks_takes_it(tmp_path: Path, signed: bool) -> None:
    """Vectors and lists in turns, on one connection; answers, and receipts where they are signed."""
    async with serving(tmp_path, signed=signed) as node:
        link = node.link(signed=signed)
        for number in (1, 2, 3):
            assert await link.embed_ids(MODEL, IDS, f"req_{number}") == right_reply(IDS)
            assert [one.id for one in (await link.served()).data] == [one.id for one in CATALOGUE.models]
        assert len(node.taken) == 6
        assert node.door.receipts.count == (3 if signed else 0) == len(node.answered)
        link.close()


@pytest.mark.parametrize("fast", [True, False], ids=["fast", "general"])
@pytest.mark.parametrize("signed", [False, True], ids=["socket", "signed"])
async def test_a_request_that_is_traced_takes_it_too(tmp_path: Path, signed: bool, fast: bool) -> None:
    """Only what was asked for that request; a node that knows nothing of traces answers as well."""
    async with serving(tmp_path, signed=signed, fast=fast) as node:
        link, traceparent = node.link(signed=signed, kind=TracedOwnLink), traceparent_of(1, 2)
        with asking_as("req_1", traceparent):
            assert await link.embed_ids(MODEL, IDS, "req_1") == right_reply(IDS)
            assert await link.embed_ids(MODEL, IDS, "req_2") == right_reply(IDS), "of another one, in a shared call"
            assert await at_once(link, IDS) == right_reply(IDS)
        assert await at_once(link, IDS) == right_reply(IDS)
        assert node.told == ([traceparent] * 2 if fast else [])
        assert len(node.taken) == (4 if fast else 0)
        assert node.door.receipts.count == (4 if signed else 0)
        link.close()


@pytest.mark.parametrize("asked", [ask(), HEAD.replace("POST /v1/embeddings", "GET /v1/models").encode()])
async def test_the_head_of_an_answer_is_constant(tmp_path: Path, asked: bytes) -> None:
    """Status, type and length, in this order, and nothing else."""
    async with serving(tmp_path) as node:
        embeds = asked.startswith(b"POST")
        reader, writer = await connect(node)
        writer.write(asked if embeds else asked + b"Content-Length: 0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        body = VECTORS if embeds else node.app.list_bytes()
        content_type = COMPACT if embeds else "application/json"
        assert (
            head.decode() == f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        assert await reader.readexactly(len(body)) == body
        writer.close()


@pytest.mark.parametrize(
    "asked",
    [
        ask().replace(b"Host: node", b"Host: other"),
        ask().replace(b"\r\nHost", b"\r\nhost"),
        ask().replace(b"Content-Length: ", b"Content-Length: 0"),
        ask().replace(b"Content-Length", b"X: y\r\nContent-Length"),
        ask().replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: keep-alive\r\n"),
        ask()[:40],
        b"GET /v1/models HTTP/1.1\r\nHost: node\r\n\r\n",
    ],
)
async def test_any_other_form_goes_to_the_general_server(tmp_path: Path, asked: bytes) -> None:
    """Which answers it as well."""
    async with serving(tmp_path) as node:
        reader, writer = await connect(node)
        writer.write(asked)
        if asked == ask()[:40]:
            await asyncio.sleep(0.01)
            writer.write(ask()[40:])
        reply = await read_reply(reader)
        assert (reply.status, node.taken) == (200, [])
        assert reply.body == (node.app.list_bytes() if asked.startswith(b"GET") else VECTORS)
        writer.close()


@pytest.mark.parametrize(
    ("failure", "status"),
    [
        (Overloaded("full", retry_after_s=2.0), 429),
        (InvalidValue("wrong", param="input.1"), 400),
        (NodeBroke("broke"), 500),
        (RuntimeError("a bug"), 500),
    ],
)
async def test_a_failure_is_told_as_the_general_server_tells_it(
    tmp_path: Path, failure: Exception, status: int
) -> None:
    """The connection is good for more."""
    replies = []
    for fast in (True, False):
        async with serving(tmp_path, fast=fast) as node:
            node.app.raises = failure
            reader, writer = await connect(node)
            writer.write(ask())
            replies.append(await read_reply(reader))
            node.app.raises = None
            writer.write(ask())
            assert (await read_reply(reader)).body == VECTORS
            assert (len(node.taken), node.bugs) == (2 if fast else 0, int(isinstance(failure, RuntimeError)))
            writer.close()
    assert [reply.status for reply in replies] == [status, status]
    assert replies[0].error == replies[1].error
    assert set(replies[0].headers) == set(replies[1].headers)


async def test_a_body_may_come_in_pieces(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        reader, writer = await connect(node)
        for number, byte in enumerate(ask()):
            if number <= len(HEAD) + 25:
                continue
            if number == len(HEAD) + 26:
                writer.write(ask()[:number])
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        assert (await read_reply(reader)).body == VECTORS
        assert len(node.taken) == 1
        writer.close()


async def test_requests_that_are_sent_at_once_are_answered_in_order(tmp_path: Path) -> None:
    """Our gateway does not do so; each is answered all the same, by the one or the other."""
    async with serving(tmp_path) as node:
        reader, writer = await connect(node)
        other = msgspec.msgpack.encode(pack_ids(MODEL.id, [[7]]))
        writer.write(ask() + ask(other) + ask().replace(b"Host: node", b"Host: b") + ask(other))
        bodies = [(await read_reply(reader)).body for _ in range(4)]
        assert bodies == [VECTORS, msgspec.msgpack.encode(right_reply([[7]]))] * 2
        assert len(node.taken) == 2
        writer.close()


async def test_who_hangs_up_is_not_embedded_for(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        node.app.open.clear()
        _, writer = await connect(node)
        writer.write(ask())
        await until("it runs", lambda: node.app.running == 1)
        writer.close()
        await until("it is dropped", lambda: node.app.running == 0)


async def test_a_gateway_that_goes_in_the_middle_of_a_body_leaves_nothing(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        _, writer = await connect(node)
        writer.write(ask()[:-3])
        await until("some of it is there", lambda: node.bodies.taken)
        writer.close()
        await until("it is given back", lambda: not node.bodies.taken)


async def test_a_body_that_does_not_come_in_time_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_path, "REQUEST_BODY_S", 0.05)
    async with serving(tmp_path) as node:
        reader, writer = await connect(node)
        writer.write(ask()[:-3])
        reply = await read_reply(reader)
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert await reader.read() == b""
        writer.close()


async def test_a_body_without_room_is_read_and_refused(tmp_path: Path) -> None:
    """The gateway hears 429 and asks another node; the connection stays."""
    async with serving(tmp_path) as node:
        reader, writer = await connect(node)
        writer.write(ask(b"x" * (BODIES_BYTES + 1)))
        assert (await read_reply(reader)).status == 429
        writer.write(ask())
        assert (await read_reply(reader)).status == 200
        assert len(node.taken) == 2
        writer.close()
        assert (await send(node, ask(b"x", REQUEST_BODY_BYTES_MAX + 1))).status == 413


async def test_a_stranger_is_refused_and_takes_no_memory(tmp_path: Path) -> None:
    """A signature of another session, with a body that is still to come."""
    async with serving(tmp_path, signed=True) as node:
        link = node.link(signed=True)
        assert link.signing is not None
        link.signing.add(Session("fedcba9876543210", bytes(32)))
        signed = link.signing.sign(EMBED, BODY, "req_1").headers
        raw = ask().replace(b"Content-Length", signed + b"Content-Length")
        reader, writer = await connect(node)
        writer.write(raw[:-3])
        await until("its head is there", lambda: node.taken)
        assert node.bodies.taken == 0
        writer.write(raw[-3:])
        reply = await read_reply(reader)
        assert (reply.status, node.app.running, node.door.receipts.count) == (401, 0, 0)
        assert await link.embed_ids(MODEL, IDS, "req_2") == right_reply(IDS), "it signs by the session before, then"
        writer.close()
        link.close()


async def test_a_body_that_was_not_signed_and_a_replay_are_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, signed=True) as node:
        link = node.link(signed=True)
        assert link.signing is not None
        raw = [
            ask().replace(
                b"Content-Length",
                link.signing.sign(EMBED, body, "req_1").headers + b"Content-Length",
            )
            for body in (BODY, BODY + b"x")
        ]
        statuses = [(await send(node, each)).status for each in (raw[0], raw[0], raw[1])]
        assert statuses == [200, 401, 401]
        assert len(node.taken) == 3


async def test_at_the_end_the_running_request_is_answered(tmp_path: Path) -> None:
    """Idle connections are closed; a request that takes too long is broken off."""
    async with serving(tmp_path, drain_s=5.0) as node:
        node.app.open.clear()
        reader, writer = await connect(node)
        writer.write(ask())
        await until("it runs", lambda: node.app.running == 1)
        draining = asyncio.create_task(node.server.drain(5.0))
        await asyncio.sleep(0.01)
        node.app.open.set()
        assert (await read_reply(reader)).body == VECTORS
        assert await reader.read() == b""
        await draining
        writer.close()


async def test_at_the_end_what_takes_too_long_is_broken_off(tmp_path: Path) -> None:
    async with serving(tmp_path) as node:
        node.app.open.clear()
        link = node.link()
        asking = asyncio.create_task(link.embed_ids(MODEL, IDS, "req_1"))
        await until("it runs", lambda: node.app.running == 1)
        await node.server.drain(0.05)
        with pytest.raises(NodeFailure):
            await asking
        await until("it is dropped", lambda: node.app.running == 0)


async def test_what_takes_too_long_is_dropped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one timer for all, which looks at the oldest; the connections are good for more."""
    monkeypatch.setattr(compact_path, "REQUEST_MAX_S", 0.1)
    async with serving(tmp_path) as node:
        node.app.open.clear()
        both = [await connect(node) for _ in range(2)]
        both[0][1].write(ask())
        await asyncio.sleep(0.05)
        both[1][1].write(ask())
        for reader, writer in both:
            assert (await read_reply(reader)).status == 504
            writer.write(ask())
        await until("only the new ones run", lambda: node.app.running == 2)
        node.app.open.set()
        for reader, writer in both:
            assert (await read_reply(reader)).body == VECTORS
            writer.close()


async def test_a_gateway_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_path, "WRITE_REPLY_S", 0.05)
    async with serving(tmp_path) as node:
        many = [[n] for n in range(2_000)]
        body = msgspec.msgpack.encode(pack_ids(MODEL.id, many))
        sock = socket.socket(socket.AF_UNIX)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, str(node.socket))
        _, writer = await asyncio.open_unix_connection(sock=sock, limit=1)
        writer.write(ask(body) * 40)
        await until("it was cut off", lambda: node.taken and all(one.over for one in node.taken))
        writer.close()


@pytest.mark.parametrize("signed", [False, True])
async def test_the_access_log_hears_of_each_call(tmp_path: Path, signed: bool) -> None:
    """With the gateway's id of the request where calls are signed: its log has the same; also of what fails."""
    async with serving(tmp_path, signed=signed) as node:
        link = node.link(signed=signed)
        await link.embed_ids(MODEL, IDS, "req_1")
        await link.served()
        node.app.raises = NodeBroke("the text")
        with pytest.raises(NodeFailure):
            await link.embed_ids(MODEL, IDS, "req_2")
        node.app.raises = None
        node.app.open.clear()
        call = asyncio.create_task(link.embed_ids(MODEL, IDS, "req_3"))
        await until("it is asked", lambda: node.app.running)
        call.cancel()
        await until("it has left", lambda: len(node.records) == 4)
        node.app.open.set()
        link.close()
    told = [(each.method, each.route, each.status, each.outcome, each.tokens) for each in node.records]
    path, tokens = "/v1/embeddings", right_reply(IDS).tokens
    status = told[2][2]
    assert status >= 500
    assert told == [
        ("POST", path, 200, "ok", tokens),
        ("GET", "/v1/models", 200, "ok", 0),
        ("POST", path, status, told[2][3], 0),
        ("POST", path, 0, "dropped", 0),
    ]
    assert [each.request_id for each in node.records][::2] == (["req_1", "req_2"] if signed else ["", ""])
    assert node.records[0].bytes_in == len(BODY) and node.records[0].bytes_out == len(VECTORS)


async def test_the_access_log_hears_once_of_an_answer_that_came_too_late(tmp_path: Path) -> None:
    """The connection is closing, and its end is not told yet."""
    async with serving(tmp_path) as node:
        node.app.open.clear()
        link = node.link()
        call = asyncio.create_task(link.embed_ids(MODEL, IDS, "req_1"))
        await until("it is asked", lambda: node.app.running)
        (exchange,) = node.taken
        exchange._transport.close()
        exchange._embedded(b"late", 1)
        await until("it is over", lambda: exchange.over)
        node.app.open.set()
        await asyncio.gather(call, return_exceptions=True)
        link.close()
    assert [(each.outcome, each.bytes_out) for each in node.records] == [("dropped", 0)]
