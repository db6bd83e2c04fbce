"""Between a gateway and its node every request and every reply is the other side's own, now, and for the first time.

The node is a real one behind a real door; where an answer is to be wrong, somebody between the two changes it.
"""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web

from embedmesh.gateway.nodes.own import OwnLink, Signing
from embedmesh.http.server import HttpServer
from embedmesh.node import dialling
from embedmesh.node.dialling import DialOut
from embedmesh.rules.embeddings import COMPACT, Counted, EmbedVectors, pack_ids
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeUnreachable, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import DIALLED_CONNECTIONS
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.signing.certificates import pinned_context
from embedmesh.signing.messages import RequestSigner, content_digest
from embedmesh.signing.session import Session
from embedmesh.upstream import pools
from embedmesh.upstream.http1 import Connection
from embedmesh.upstream.pools import InboundPool, tcp_pool
from tests.flow.world import CATALOGUE, MODEL, right_reply
from tests.gateway.attempts import at_once
from tests.gateway.mesh import IDS, Applicant, Gateway, Script, real_node, somebody, until
from tests.http.raw import Raw, read_reply, request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

BODY = msgspec.msgpack.encode(pack_ids(MODEL.id, IDS))
PROBES = len(CATALOGUE.models) + 1  # answers that a new node has given once it is measured
EVERY_METHOD = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD")


@asynccontextmanager
async def plain_node(one: Applicant) -> AsyncIterator[int]:
    """Its door without TLS, so that raw bytes can be sent to it: the port. It is a member."""
    async with one.listening(plain=True) as address:
        await one.join(await one.gateway.invite(), **one.place)
        await one.gateway.until_ready(one.node_id)
        yield int(address.rpartition(":")[2])


def gateway_signer(one: Applicant, instance: str = "00112233445566ff") -> RequestSigner:
    """Signs as the gateway does, in a process of its own."""
    return RequestSigner(one.sessions.of_gateway, one.node_id, instance)


def signed(one: Applicant, signer: RequestSigner, *, at_s: int = 0, **changes: Any) -> bytes:
    """A gateway's request. `changes` are of what is sent, after it was signed."""
    asked: dict[str, Any] = {"method": "POST", "path": "/v1/embeddings", "body": BODY}
    now_s = one.gateway.clock.unix_ms() // 1000 + at_s
    headers = signer.sign(asked["method"], asked["path"], asked["body"], "req_1", now_s).headers
    sent = asked | changes
    body: bytes = sent["body"]
    head = f"{sent['method']} {sent['path']} HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n"
    return head.encode() + headers + b"Content-Length: %d\r\n\r\n" % len(body) + body


# -- what a node answers -----------------------------------------------------------------------------------------------


async def test_a_node_answers_nobody_who_does_not_sign(applicant: Applicant) -> None:
    """On any path and by any method; not even what it serves, nor that it is a node."""
    async with plain_node(applicant) as port:
        paths = ["/", "/v1", "/health", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/tokenize", "/v1/models/x"]
        there = dict.fromkeys(paths, ()) | {path: tuple(methods) for path, methods in applicant.door.routes().items()}
        assert "/v1/embeddings" in there
        for path, methods in there.items():
            for method in EVERY_METHOD:
                for content_type in (COMPACT, "application/json"):
                    raw = request(method, path, b"{}" if method == "POST" else b"", content_type=content_type)
                    reply = await send(port, raw) if method != "HEAD" else await _head(port, raw)
                    if method in methods or (method == "HEAD" and "GET" in methods):
                        assert reply.status in (400, 401, 415), (method, path)
                    else:
                        assert reply.status == (405 if methods else 404), (method, path)
                    assert "signature" not in reply.headers
                    assert b"acme" not in reply.body


async def _head(port: int, raw: bytes) -> Raw:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(raw)
    status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
    writer.close()
    return Raw(status, {}, b"")


async def test_what_is_signed_wrongly_is_refused_and_not_embedded(applicant: Applicant) -> None:
    """One message for all; the right request is still taken after each of them."""
    async with plain_node(applicant) as port:
        signer = gateway_signer(applicant)
        good = signed(applicant, signer)
        assert (await send(port, good)).status == 200
        stranger = Session(applicant.sessions.of_gateway.key_id, bytes(32))
        wrong: dict[str, bytes] = {
            "replayed": good,
            "another body": signed(applicant, signer, body=msgspec.msgpack.encode(pack_ids(MODEL.id, [[9]]))),
            "another path": signed(applicant, signer, path="/v1/models"),
            "61 s old": signed(applicant, signer, at_s=-61),
            "61 s ahead": signed(applicant, signer, at_s=61),
            "another key": signed(applicant, RequestSigner(stranger, applicant.node_id, "0" * 16)),
            "an unknown session": signed(
                applicant, RequestSigner(Session("f" * 16, bytes(32)), applicant.node_id, "0" * 16)
            ),
            "the node's own session": signed(
                applicant, RequestSigner(applicant.sessions.of_node, applicant.node_id, "0" * 16)
            ),
            "another node's": signed(
                applicant, RequestSigner(applicant.sessions.of_gateway, "node_" + "0" * 32, "0" * 16)
            ),
            "no digest": good.replace(b"Content-Digest", b"X-Digest"),
            "no signature": good.replace(b"\r\nSignature:", b"\r\nX:"),
        }
        asked = len(applicant.engine.asked)
        for name, raw in wrong.items():
            reply = await send(port, raw)
            assert reply.status in ((401, 405) if name == "another path" else (401,)), name
            if reply.status == 401:
                assert reply.error["message"] == "This node answers its own gateways only.", name
        assert len(applicant.engine.asked) == asked
        reply = await send(port, signed(applicant, signer))
        assert reply.status == 200
        assert {"signature", "signature-input", "content-digest", "embedmesh-receipt"} <= set(reply.headers)


async def test_a_query_changes_nothing(applicant: Applicant) -> None:
    """It is not signed, so it must not mean anything."""
    async with plain_node(applicant) as port:
        reply = await send(port, signed(applicant, gateway_signer(applicant), path="/v1/embeddings?model=other"))
        assert reply.status == 200
        assert msgspec.msgpack.decode(reply.body, type=EmbedVectors) == right_reply(IDS)


async def test_each_answer_has_the_next_receipt(applicant: Applicant) -> None:
    """Counted from one; a list of models has none."""
    async with plain_node(applicant) as port:
        signer = gateway_signer(applicant)
        before = await until("it was probed and measured", lambda: applicant.receipts.count == PROBES and PROBES)
        replies = [await send(port, signed(applicant, signer)) for _ in range(3)]
        assert [int(reply.headers["embedmesh-receipt"]) for reply in replies] == [before + at for at in (1, 2, 3)]
        assert applicant.receipts.count == before + 3
        headers = signer.sign("GET", "/v1/models", b"", "req_2", applicant.gateway.clock.unix_ms() // 1000).headers
        listed = await send(port, b"GET /v1/models HTTP/1.1\r\nHost: node\r\n" + headers + b"\r\n")
        assert (listed.status, listed.headers["embedmesh-receipt"]) == (200, "0")


# -- what a gateway believes -------------------------------------------------------------------------------------------

Change = Callable[[bytes, bytes], bytes]
"""What somebody between the two makes of a reply, who has an earlier one as well."""


def header(reply: bytes, name: str) -> bytes:
    """Its whole line."""
    return next(line for line in reply.split(b"\r\n") if line.lower().startswith(name.encode() + b":"))


def without(name: str) -> Change:
    return lambda reply, earlier: reply.replace(header(reply, name) + b"\r\n", b"")


def put(name: str, value: bytes) -> Change:
    return lambda reply, earlier: reply.replace(header(reply, name), name.encode() + b": " + value)


def tampered(reply: bytes, earlier: bytes) -> bytes:
    return reply[:-1] + bytes([reply[-1] ^ 1])


def tampered_with_its_digest(reply: bytes, earlier: bytes) -> bytes:
    changed = tampered(reply, earlier)
    digest = content_digest(changed.partition(b"\r\n\r\n")[2]).encode()
    return put("content-digest", digest)(changed, earlier)


def signature_of_the_earlier(reply: bytes, earlier: bytes) -> bytes:
    return reply.replace(header(reply, "signature"), header(earlier, "signature"))


WRONG: dict[str, Change] = {
    "a tampered body": tampered,
    "a tampered body and its digest": tampered_with_its_digest,
    "the reply to an earlier request": lambda reply, earlier: earlier,
    "the signature of an earlier reply": signature_of_the_earlier,
    "a signature of zeros": put("signature", b"em=:" + b"A" * 43 + b"=:"),
    "no signature": without("signature"),
    "no words on the signature": without("signature-input"),
    "no digest": without("content-digest"),
    "no receipt": without("embedmesh-receipt"),
    "another receipt": put("embedmesh-receipt", b"7"),
    "a receipt below none": put("embedmesh-receipt", b"-1"),
    "another session's name": lambda reply, earlier: re.sub(b'keyid="[0-9a-f]+"', b'keyid="' + b"0" * 16 + b'"', reply),
}


def changing(to: str, change: list[Change], rewrite: Callable[[bytes], bytes] = lambda raw: raw) -> Script:
    """Somebody between the two: replies by the first of `change`, where there is one; requests by `rewrite`."""
    earlier: list[bytes] = []

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", int(to.rpartition(":")[2]))
        while True:
            to_there.write(rewrite(await read_message(reader)))
            reply = await read_message(there)
            earlier.append(reply)
            writer.write(change[0](reply, earlier[0]) if change else reply)

    return script


async def read_message(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    return head + await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


@asynccontextmanager
async def linked(one: Applicant, script: Script) -> AsyncIterator[OwnLink]:
    """A gateway's link to a node, through somebody."""
    signing = Signing(one.node_id, "f" * 16, one.gateway.clock, lambda *answer: None)
    signing.add(one.sessions.of_gateway)
    async with somebody(script) as port:
        link = OwnLink(tcp_pool("127.0.0.1", port), one.gateway.clock, signing)
        yield link
        link.close()


async def call(link: OwnLink) -> EmbedVectors:
    return await link.embed(Part("n", (0, 1), 7, 0.1), MODEL, Counted(lengths=[4, 3], ids=IDS), "req_1")


async def test_a_reply_that_is_not_the_nodes_to_this_very_request_is_a_wrong_answer(applicant: Applicant) -> None:
    """Changed anywhere, replayed, or without its signature; and the next right reply is believed again."""
    change: list[Change] = []
    async with plain_node(applicant), linked(applicant, changing(applicant.address, change)) as link:
        for name, wrong in WRONG.items():
            change.clear()
            assert await call(link) == await at_once(link, IDS) == right_reply(IDS)
            change.append(wrong)
            for way in (at_once(link, IDS), call(link)):
                with pytest.raises(NodeFailure) as failure:
                    await way
                assert isinstance(failure.value, WrongAnswer), name
        change[:] = [lambda reply, earlier: reply.replace(b" 200 ", b" 201 ", 1)]
        with pytest.raises(NodeBroke):
            await call(link)


async def test_a_reply_under_another_session_is_a_wrong_answer(applicant: Applicant) -> None:
    """Of the same node, to the same question, rightly signed: but not under the session that it was asked under."""
    async with plain_node(applicant):
        before = gateway_signer(applicant)
        await applicant.join(**applicant.place)
        asked_before = changing(applicant.address, [], lambda raw: signed(applicant, before))
        async with linked(applicant, asked_before) as link:
            with pytest.raises(WrongAnswer, match=r"not signed as agreed \(key\)"):
                await call(link)


async def test_wrong_answers_quarantine_a_node_until_it_is_readmitted(gw: Gateway, applicant: Applicant) -> None:
    """By the operator; neither a new registration nor a restart of the gateway ends it."""
    change: list[Change] = []
    async with applicant.listening(plain=True) as address, somebody(changing(address, change)) as port:
        applicant.believe(f"http://127.0.0.1:{port}")
        await applicant.join(await gw.invite(), **applicant.place)
        node = await gw.until_ready(applicant.node_id)
        await until("it was probed and measured", lambda: applicant.receipts.count == PROBES)
        change.append(tampered)
        for _ in range(3):
            with pytest.raises(WrongAnswer) as wrong:
                await gw.embed(applicant.node_id)
            gw.registry.failed(node, wrong.value)  # as the line says
        assert node.state is NodeState.QUARANTINED
        change.clear()

        def kept() -> str:
            return next(one.quarantined for one in gw.roster.records() if one.node_id == applicant.node_id)

        assert "signature: 3 wrong answers" in await until("it is written down", kept)
        await applicant.join(**applicant.place)
        await gw.act(applicant.node_id, "trust")
        assert node.state is NodeState.QUARANTINED
        assert "signature: 3 wrong answers" in kept()
        await gw.act(applicant.node_id, "readmit")
        assert kept() == ""
        assert node.state in (NodeState.UNPROVEN, NodeState.READY)


# -- over both doors ---------------------------------------------------------------------------------------------------


async def test_only_the_pinned_certificate_is_talked_to(gw: Gateway, applicant: Applicant, tmp_path: Path) -> None:
    """At the same address with another one nobody is told anything, not even the head of a request."""
    other = Applicant(gw, tmp_path, "other")
    heard: list[bytes] = []

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))

    tls = pinned_context(applicant.certificate)
    async with somebody(listen, other.tls) as port:
        link = OwnLink(tcp_pool("127.0.0.1", port, tls, certificate=applicant.certificate), gw.clock)
        with pytest.raises(NodeUnreachable):
            await call(link)
        link.close()
    assert not any(heard)


@pytest.mark.parametrize("size", [0, 1, 100, 20_000, 1_000_000])
async def test_a_reply_over_tls_ends_its_request(applicant: Applicant, size: int) -> None:
    """What is written is done with at once: or the server would think that it still works, and drain for nothing."""
    begun = 0

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        nonlocal begun
        begun += 1
        return web.Response(body=b"x" * size)

    server = HttpServer({"/": {"POST": answer}})
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    await server.start(sock, applicant.tls)
    pool = tcp_pool("127.0.0.1", sock.getsockname()[1], pinned_context(applicant.certificate))
    for number in range(1, 6):
        reply = await pool.exchange(lambda: b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", size)
        assert (len(reply.body), begun) == (size, number)
        [connection] = server._aiohttp.connections
        await until("the request has ended", partial(lambda one: not one._request_in_progress, connection))
    async with asyncio.timeout(1):
        await server.drain(30)
    pool.close()


@pytest.mark.parametrize("address", ["https", ""])
async def test_a_caller_that_goes_stops_the_work(gw: Gateway, tmp_path: Path, address: str, monkeypatch: Any) -> None:
    """The connection is closed, which cancels the node's handler; a dialled one is then dialled anew."""
    monkeypatch.setattr(dialling, "REDIAL_MIN_S", 0.02)
    async with real_node(tmp_path, gw, await gw.invite(), address=address) as node:
        await gw.until_ready(node.name)
        member = gw.roster.connected(node.name)
        assert member is not None
        if not address:
            await until("it has dialled", lambda: len(member.pool._idle) == DIALLED_CONNECTIONS)
        await until("it is measured", lambda: member.node.load.parts == 0)
        node.engine.open.clear()
        calls = [asyncio.create_task(gw.embed(node.name)) for _ in range(3)]
        await until("they run", lambda: node.engine.running >= 3)
        for one in calls:
            one.cancel()
        await until("they are dropped", lambda: node.engine.dropped >= 3)
        node.engine.open.set()
        if not address:
            await until("it has dialled again", lambda: len(member.pool._idle) == DIALLED_CONNECTIONS)
        await gw.answers_rightly(node.name)


async def test_a_node_that_dials_out_answers_as_many_calls_as_it_has_connections(
    gw: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At one time; the next waits for a free one, not longer than a connection may take: then it is busy, not gone."""
    async with real_node(tmp_path, gw, await gw.invite()) as node:
        await gw.until_ready(node.name)
        member = gw.roster.connected(node.name)
        assert member is not None
        assert member.node.in_flight_max == DIALLED_CONNECTIONS
        await until("it has dialled", lambda: len(member.pool._idle) == DIALLED_CONNECTIONS)
        node.engine.open.clear()
        calls = [asyncio.create_task(gw.embed(node.name)) for _ in range(DIALLED_CONNECTIONS)]
        await until("they run", lambda: node.engine.running == DIALLED_CONNECTIONS)
        with monkeypatch.context() as patched, pytest.raises(NodeBusy):
            patched.setattr(pools, "CONNECT_S", 0.1)
            await gw.embed(node.name)
        late = asyncio.create_task(gw.embed(node.name))
        await asyncio.sleep(0)
        node.engine.open.set()
        assert await asyncio.gather(*calls, late) == [right_reply(IDS)] * (DIALLED_CONNECTIONS + 1)


async def test_a_session_that_the_node_has_not_heard_of_yet_costs_no_call(gw: Gateway, applicant: Applicant) -> None:
    """The gateway knows of a new one first: until its welcome has arrived the node is asked under the one before."""
    async with applicant.member() as node:
        await applicant.join(tell_door=False, **applicant.place)
        for _ in range(3):
            await gw.answers_rightly(applicant.node_id)
            assert await at_once(gw.clients, IDS, applicant.node_id) == right_reply(IDS)
        applicant.door.new_session(applicant.sessions.of_gateway)
        for _ in range(3):
            await gw.answers_rightly(applicant.node_id)
        assert not node.failed.keys() & {Check.ACCESS, Check.STATUS_4XX, Check.SIGNATURE}
        assert gw.node(applicant.node_id) is node


# -- the pool of a node that dials out ---------------------------------------------------------------------------------


async def connected() -> tuple[Connection, asyncio.StreamWriter, asyncio.Server]:
    """A connection as a gateway has it, and its other end."""
    ends: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
    server = await asyncio.start_server(lambda reader, writer: ends.put_nowait(writer), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    _, connection = await asyncio.get_running_loop().create_connection(Connection, "127.0.0.1", port)
    return connection, await ends.get(), server


async def test_connections_that_were_cut_do_not_crowd_out_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router cuts what lies idle, again and again, while one connection is in use all the time."""
    monkeypatch.setattr(pools, "IDLE_CONNECTIONS_MAX", 4)
    pool = InboundPool()
    ends = []
    for _ in range(12):
        connection, other_end, server = await connected()
        pool.offer(connection)
        other_end.close()
        ends.append(server)
        await until("it is cut", partial(lambda one: not one.usable, connection))
    assert len(pool._idle) <= 4
    connection, other_end, server = await connected()
    pool.offer(connection)
    assert connection.usable
    with suppress(TimeoutError):
        async with asyncio.timeout(0.05):
            await pool.exchange(lambda: b"GET / HTTP/1.1\r\n\r\n", 10)
    assert connection.heard is False
    for one in (*ends, server):
        one.close()
    pool.close()
    other_end.close()


async def test_closed_wires_keep_nothing() -> None:
    """Neither a connection that comes back from a call, nor one that is offered later, nor somebody who waits."""
    pool = InboundPool()
    waiting = asyncio.create_task(pool.exchange(lambda: b"", 10))
    await asyncio.sleep(0)
    pool.close()
    with pytest.raises(NodeUnreachable):
        await waiting
    connection, other_end, server = await connected()
    pool.offer(connection)
    assert not connection.usable
    assert not pool._idle
    other_end.close()
    server.close()


async def test_a_connection_that_is_offered_to_who_has_just_left_is_there_for_the_next() -> None:
    """Else callers who leave at that moment would take an unreachable node's few connections away from all."""
    pool = InboundPool()
    waiting = asyncio.create_task(pool.exchange(lambda: b"", 10))
    await asyncio.sleep(0)
    connection, other_end, server = await connected()
    pool.offer(connection)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert pool.take() is connection
    connection.abort()
    other_end.close()
    server.close()


async def test_a_gateway_that_takes_connections_and_ends_them_is_not_hammered() -> None:
    """Each of them rests before it is dialled again, also after it was taken."""
    dials = 0

    async def take_and_end(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dials
        dials += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\n")

    async with somebody(take_and_end) as port:
        out = DialOut(f"http://127.0.0.1:{port}", HttpServer({}))
        out.start("node_1", lambda method, path, body: {})
        await until("each has dialled", lambda: dials >= DIALLED_CONNECTIONS)
        await asyncio.sleep(0.1)
        await out.stop()
    assert dials < 2 * DIALLED_CONNECTIONS


@pytest.mark.parametrize(
    "answer", [b"HTTP/1.1 401 Unauthorized\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 9_000, b""]
)
async def test_a_gateway_that_does_not_take_the_connection_is_tried_again(answer: bytes, monkeypatch: Any) -> None:
    monkeypatch.setattr(dialling, "REDIAL_MIN_S", 0.001)
    monkeypatch.setattr(dialling, "DIALLED_CONNECTIONS", 1)
    served = 0
    dials = 0

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal dials, served
        dials += 1
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"GET /v1/nodes/node_1/dial HTTP/1.1\r\n")
        if dials < 3:
            writer.write(answer)
            return
        writer.write(b"HTTP/1.1 101 Switching Protocols\r\n\r\nGET / HTTP/1.1\r\nHost: x\r\n\r\n")  # in one packet
        assert (await read_reply(reader)).status == 404
        served += 1
        await reader.read()

    async with somebody(refuse) as port:
        out = DialOut(f"http://127.0.0.1:{port}", HttpServer({}))
        out.start("node_1", lambda method, path, body: {})
        await until("it is served in the end", lambda: served)
        await out.stop()
