"""Heartbeat, farewell and dial are taken once, from the node itself, under its session; nothing else is."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.node import joining
from embedmesh.rules.limits import HEARTBEAT_RECEIPTS_MAX, NODE_MESSAGE_BYTES_MAX
from embedmesh.rules.membership import Heartbeat, HeartbeatReply, Receipt, SignedHead
from embedmesh.rules.nodes import NodeState
from embedmesh.signing.identity import Identity
from embedmesh.signing.messages import RequestSigner
from embedmesh.signing.receipts import RECEIPTS_PURPOSE, head_message, replay
from embedmesh.signing.session import Session
from tests.gateway.mesh import Applicant, Gateway, gateway, memory_folder, real_node, says, somebody, until
from tests.http.raw import request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

BEAT = msgspec.json.encode(Heartbeat(100, 1e4))


def beat_path(one: Applicant) -> str:
    return f"/v1/nodes/{one.node_id}/heartbeat"


# -- who is heard ------------------------------------------------------------------------------------------------------


async def test_a_heartbeat_is_answered_under_the_session(gw: Gateway, applicant: Applicant) -> None:
    """With which receipts are wanted; what waits at the node for others counts as its load."""
    async with applicant.member() as node:
        signed = applicant.signer.sign("POST", beat_path(applicant), BEAT, "nrq_1", gw.clock.unix_ms() // 1000)
        raw = (
            f"POST {beat_path(applicant)} HTTP/1.1\r\nHost: g\r\nContent-Type: application/json\r\n".encode()
            + signed.headers
            + b"Content-Length: %d\r\n\r\n" % len(BEAT)
            + BEAT
        )
        reply = await send(gw.port, raw)
        headers = {name.encode(): value.encode() for name, value in reply.headers.items()}
        assert signed.check_reply(reply.status, reply.body, headers, gw.clock.unix_ms() // 1000) == 0
        assert msgspec.json.decode(reply.body, type=HeartbeatReply).receipts_from == 1
        assert node.load._others_tokens == 100 - node.load.tokens
        shown = msgspec.json.decode((await gw.admin("GET", f"/nodes/{applicant.node_id}")).body)
        assert shown["last_heartbeat_s_ago"] is not None


async def test_what_is_not_signed_as_agreed_is_refused(gw: Gateway, applicant: Applicant, tmp_path: Path) -> None:
    """Heartbeat, farewell or dial: one message for all that is wrong; the right one is taken after each of them."""
    other = Applicant(gw, tmp_path, "other")
    await other.join(await gw.invite())
    async with applicant.member() as node:
        path, key_id = beat_path(applicant), applicant.sessions.of_node.key_id
        good = applicant.signed("POST", path, BEAT)
        assert (await send(gw.port, good)).status == 200

        def by(session: Session, of: str = applicant.node_id) -> bytes:
            return applicant.signed("POST", path, BEAT, RequestSigner(session, of, "f" * 16))

        wrong: dict[str, bytes] = {
            "replayed": good,
            "replayed as a farewell": good.replace(b"/heartbeat ", b"/drain "),
            "unsigned": request("POST", path, BEAT, key=None),
            "with a caller's key": request("POST", path, BEAT, key=gw.key("embeddings")),
            "with an admin key": request("POST", path, BEAT, key=gw.key("admin")),
            "another body": applicant.signed("POST", path, BEAT).replace(b"100", b"999"),
            "another key of that name": by(Session(key_id, bytes(32))),
            "an unknown session": by(Session("f" * 16, bytes(32))),
            "the gateway's own session": by(applicant.sessions.of_gateway),
            "another node's session": by(other.sessions.of_node),
            "another node's session and name": by(other.sessions.of_node, other.node_id),
            "another node's path": applicant.signed("POST", beat_path(other), BEAT),
            "an unknown node's path": applicant.signed("POST", f"/v1/nodes/node_{'0' * 32}/heartbeat", BEAT),
            "a dial that is not signed": request(
                "GET", f"/v1/nodes/{applicant.node_id}/dial", Upgrade="embedmesh-node"
            ),
        }
        for name, raw in wrong.items():
            reply = await send(gw.port, raw)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key"), name
            assert (await applicant.say("heartbeat", BEAT)).status == 200, name
        for off_s in (-61, 61):
            gw.clock.ahead_s = off_s
            late = applicant.signed("POST", path, BEAT)
            gw.clock.ahead_s = 0
            says(await send(gw.port, late), 401, "not signed under a session")
        assert not node.draining


async def test_a_report_is_known_by_its_head(gw: Gateway, applicant: Applicant) -> None:
    """Before a byte of its body is read: who is no node, or says what was said before, need not send it."""
    await applicant.join(await gw.invite())
    path = beat_path(applicant)
    good = applicant.signed("POST", path, BEAT)
    assert (await send(gw.port, good)).status == 200
    forged = applicant.signed(
        "POST", path, BEAT, RequestSigner(Session("f" * 16, bytes(32)), applicant.node_id, "f" * 16)
    )
    large = applicant.signed("POST", path, b" " * (NODE_MESSAGE_BYTES_MAX + 1))
    cases = [(good, 401), (forged, 401), (request("POST", path, BEAT, key=None), 401), (large, 413)]
    for raw, status in cases:
        assert (await send(gw.port, raw.partition(b"\r\n\r\n")[0] + b"\r\n\r\n")).status == status
    assert gw.nodes_api._reports.taken == 0


async def test_a_node_that_reports_without_end_is_told_to_wait_and_others_are_not(
    gw: Gateway, applicant: Applicant, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its body is read: each report of a thousand receipts costs the gateway milliseconds."""
    monkeypatch.setattr(gw.nodes_api, "_reports_a_minute_max", 10)
    other = Applicant(gw, tmp_path, "other")
    for one in (applicant, other):
        await one.join(await gw.invite())
    said = [(await applicant.say("heartbeat", BEAT)).status for _ in range(10)]
    assert said == [200] * said.count(200) + [503] * said.count(503)
    assert 0 < said.count(503) <= 2
    assert (await other.say("heartbeat", BEAT)).status == 200


async def test_half_a_report_takes_of_the_share_of_its_node(gw: Gateway, applicant: Applicant, tmp_path: Path) -> None:
    """And only once its head is found to be the node's; others' reports are heard meanwhile."""
    other = Applicant(gw, tmp_path, "other")
    for one in (applicant, other):
        await one.join(await gw.invite())
    raw = applicant.signed("POST", beat_path(applicant), b" " * 1_000)
    _, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(raw[:-10])
    await until("half of it has come", lambda: gw.nodes_api._reports.taken == 990)
    assert gw.nodes_api._reports.shares._accounts == {applicant.node_id: 990}
    assert (await other.say("heartbeat", BEAT)).status == 200
    writer.close()
    await until("it has gone", lambda: gw.nodes_api._reports.taken == 0)


async def test_the_session_before_is_good_for_a_while_and_older_ones_are_not(gw: Gateway, applicant: Applicant) -> None:
    """A report may be on its way while a new session is agreed."""
    signers = []
    for turn in range(3):
        await applicant.join(await gw.invite() if turn == 0 else None)
        signers.append(applicant.signer)
    statuses = [
        (await send(gw.port, applicant.signed("POST", beat_path(applicant), BEAT, signer))).status for signer in signers
    ]
    assert statuses == [401, 200, 200]
    gw.clock.ahead_s = 121
    try:
        statuses = [
            (await send(gw.port, applicant.signed("POST", beat_path(applicant), BEAT, signer))).status
            for signer in signers
        ]
    finally:
        gw.clock.ahead_s = 0
    assert statuses == [401, 401, 200]


@pytest.mark.parametrize(
    ("what", "body", "status"),
    [
        ("heartbeat", b"{}", 400),
        ("heartbeat", b"[]", 400),
        ("heartbeat", b"\xff", 400),
        ("heartbeat", b'{"tokens_waiting":-1,"tokens_per_s":0}', 400),
        ("heartbeat", b'{"tokens_waiting":0,"tokens_per_s":1e10}', 400),
        ("heartbeat", b'{"tokens_waiting":0,"tokens_per_s":0,"more":1}', 400),
        ("heartbeat", b" " * (NODE_MESSAGE_BYTES_MAX + 1), 413),
        ("remove", BEAT, 404),
        ("", BEAT, 404),
        ("heartbeat/more", BEAT, 404),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_report_of_another_form_is_refused(
    gw: Gateway, applicant: Applicant, what: str, body: bytes, status: int
) -> None:
    """Rightly signed as it may be."""
    await applicant.join(await gw.invite())
    reply = await applicant.say(what, body)
    assert reply.status == status
    assert set(reply.error) == {"message", "type", "param", "code"}


async def test_a_farewell_ends_the_work_until_it_is_back(gw: Gateway, applicant: Applicant) -> None:
    async with applicant.member() as node:
        assert (await applicant.say("drain")).status == 200
        assert node.draining
        assert gw.registry.ready("acme/tiny") == [] or node not in gw.registry.ready("acme/tiny")
        shown = msgspec.json.decode((await gw.admin("GET", f"/nodes/{applicant.node_id}")).body)
        assert (shown["state"], shown["draining"]) == ("draining", True)
        await applicant.join(**applicant.place)
        assert not (await gw.until_ready(node.node_id)).draining
        assert node in gw.registry.ready("acme/tiny")


# -- dialling in -------------------------------------------------------------------------------------------------------


def dial(one: Applicant, *, upgrade: str = "embedmesh-node", what: str = "dial", method: str = "GET") -> bytes:
    path = f"/v1/nodes/{one.node_id}/{what}"
    headers = one.signer.sign(method, path, b"", "nrq_1", one.gateway.clock.unix_ms() // 1000).headers
    return (
        f"{method} {path} HTTP/1.1\r\nHost: g\r\nConnection: Upgrade\r\nUpgrade: {upgrade}\r\n".encode()
        + headers
        + b"\r\n"
    )


async def test_a_dialled_connection_is_used_for_requests(gw: Gateway, applicant: Applicant) -> None:
    """After the 101 the gateway asks, signed, what it would ask at an address; a dial counts once."""
    await applicant.join(await gw.invite())
    raw = dial(applicant)
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(raw)
    head = await reader.readuntil(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 101 ")
    assert b"Upgrade: embedmesh-node" in head
    asked = await reader.readuntil(b"\r\n\r\n")
    assert asked.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"\r\nSignature: em=:" in asked
    says(await send(gw.port, raw), 401, "not signed under a session")
    writer.close()


async def test_a_dial_of_another_form_is_refused(gw: Gateway, applicant: Applicant) -> None:
    await applicant.join(await gw.invite())
    says(await send(gw.port, dial(applicant, upgrade="websocket")), 404, "Upgrade: embedmesh-node")
    says(await send(gw.port, dial(applicant, what="dail")), 404, "nothing at this path")
    reader, writer = await asyncio.open_connection("127.0.0.1", gw.port)
    writer.write(dial(applicant, method="HEAD"))  # a question about it, and no dial
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404 ")
    writer.close()


async def test_a_node_with_an_address_does_not_dial(gw: Gateway, applicant: Applicant) -> None:
    """It is reached there; a connection that nobody uses would only be kept."""
    async with applicant.member():
        says(await send(gw.port, dial(applicant)), 400, "registered with an address")


# -- receipts ----------------------------------------------------------------------------------------------------------


def head_of(one: Applicant, receipts: tuple[Receipt, ...], *, by: Identity | None = None) -> SignedHead:
    head, count, now_ms = replay(bytes(32), receipts), len(receipts), one.gateway.clock.unix_ms()
    message = head_message(one.node_id, one.gateway.fingerprint, count, head, now_ms)
    return SignedHead(count, head, now_ms, (by or one.identity).sign(RECEIPTS_PURPOSE, message))


async def report(one: Applicant, receipts: tuple[Receipt, ...], head: SignedHead) -> int:
    """Which receipts are wanted after this page."""
    reply = await one.say("heartbeat", Heartbeat(0, 0.0, receipts, head))
    assert reply.status == 200, reply.body
    return msgspec.json.decode(reply.body, type=HeartbeatReply).receipts_from


async def with_receipts(one: Applicant) -> tuple[Receipt, ...]:
    """Those of its answers so far."""
    await until("it was probed and measured", lambda: one.receipts.count == 3)
    return one.receipts.page(1).receipts


async def test_receipts_are_held_against_what_was_seen(gw: Gateway, applicant: Applicant) -> None:
    """Each matched once; how far the log was checked is in the store."""
    async with applicant.member() as node:
        receipts = await with_receipts(applicant)
        assert await report(applicant, receipts, head_of(applicant, receipts)) == 4
        assert (node.counts["receipts_matched"], node.counts["receipts_unmatched"]) == (3, 0)
        kept = next(one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id)
        assert (kept.receipts_count, kept.receipts_head) == (3, replay(bytes(32), receipts))
        await gw.act(applicant.node_id, "trust")
        kept = next(one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id)
        assert kept.receipts_count == 3


async def test_a_node_is_told_how_far_any_gateway_has_checked(gw: Gateway, applicant: Applicant) -> None:
    """It forgets what was checked: told of less, it would have to begin its log anew."""
    async with applicant.member():
        receipts = await with_receipts(applicant)
        await gw.store.nodes.note_receipts(applicant.node_id, 3, replay(bytes(32), receipts))  # by another gateway
        reply = await applicant.say("heartbeat", Heartbeat(0, 0.0))
        assert msgspec.json.decode(reply.body, type=HeartbeatReply).receipts_from == 4


REFUSED: dict[str, Callable[[Applicant, tuple[Receipt, ...]], tuple[tuple[Receipt, ...], SignedHead]]] = {
    "a gap": lambda one, log: ((log[0], log[2]), head_of(one, log)),
    "fewer than the head says": lambda one, log: (log[:2], head_of(one, log)),
    "signed by another": lambda one, log: (log, head_of(one, log, by=Identity(bytes(32)))),
    "no head of these": lambda one, log: (log, msgspec.structs.replace(head_of(one, log), head=bytes(32))),
    "an old head": lambda one, log: (log, msgspec.structs.replace(head_of(one, log), time_ms=1)),
}


async def test_a_log_that_is_not_whole_moves_nothing(gw: Gateway, applicant: Applicant) -> None:
    """It is counted, and the node is told again what is wanted; it is no reason to give it no work."""
    async with applicant.member() as node:
        log = await with_receipts(applicant)
        for number, (name, spoil) in enumerate(REFUSED.items(), 1):
            assert await report(applicant, *spoil(applicant, log)) == 1, name
            assert node.counts["receipts_refused"] == number
        assert node.state is NodeState.READY
        assert await report(applicant, log, head_of(applicant, log)) == 4


@pytest.mark.parametrize("lie", [{"tokens": 10**6}, {"request_digest": bytes(32)}])
async def test_a_false_receipt_quarantines_the_node(gw: Gateway, applicant: Applicant, lie: dict[str, Any]) -> None:
    """It wants to be paid for what it did not do, and signed that."""
    async with applicant.member() as node:
        log = await with_receipts(applicant)
        false = (*log[:2], msgspec.structs.replace(log[2], **lie))
        await report(applicant, false, head_of(applicant, false))
        assert (node.counts["receipts_false"], node.state) == (1, NodeState.QUARANTINED)
        await until(
            "it is written down",
            lambda: gw.roster.record(applicant.node_id).quarantined,
        )


async def test_more_receipts_than_a_report_may_have_are_refused(gw: Gateway, applicant: Applicant) -> None:
    await applicant.join(await gw.invite())
    one = Receipt(1, "r", bytes(32), bytes(32), 1, 1)
    many = tuple(msgspec.structs.replace(one, number=number) for number in range(1, HEARTBEAT_RECEIPTS_MAX + 2))
    reply = await applicant.say("heartbeat", Heartbeat(0, 0.0, many, head_of(applicant, many)))
    says(reply, 400, "receipts")
    assert await report(applicant, many[:-1], head_of(applicant, many[:-1])) == HEARTBEAT_RECEIPTS_MAX + 1


async def test_a_report_whose_answer_is_lost_is_no_lie(gw: Gateway, tmp_path: Path, monkeypatch: Any) -> None:
    """The node does not know whether its receipts have come: it asks, and says none twice."""
    monkeypatch.setattr(joining, "GATEWAY_REPLY_S", 0.2)
    lost = 0

    async def losing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Between node and gateway; keeps back every other answer to a report with receipts."""
        there, to_there = await asyncio.open_connection("127.0.0.1", gw.port)
        with_receipts = False

        async def onwards() -> None:
            nonlocal with_receipts
            while data := await reader.read(65_536):
                with_receipts = b'"receipts":[[' in data
                to_there.write(data)

        async def back() -> None:
            nonlocal lost
            while data := await there.read(65_536):
                if with_receipts and lost < 3:
                    lost += 1
                    writer.close()
                    return
                writer.write(data)

        await asyncio.gather(onwards(), back(), return_exceptions=True)
        to_there.close()

    invite = await gw.invite()
    async with (
        somebody(losing) as port,
        real_node(tmp_path, f"http://127.0.0.1:{port}", invite, address="https") as node,
    ):
        found = await gw.until_ready(node.name)
        member = gw.roster.connected(node.name)
        assert member is not None
        number = 0
        while lost < 3 or number < 4:
            number += 1
            await gw.embed(node.name, request_id=f"req_{number}")
            await until("its receipts are checked", lambda: member.audit.count == node.member._receipts.count)
        assert (found.counts["receipts_refused"], found.counts["receipts_unmatched"]) == (0, 0)


@pytest.mark.story
async def test_a_busy_nodes_receipts_do_not_pile_up(tmp_path: Path) -> None:
    """A page that is full is followed by the next at once, not by a heartbeat's pause."""
    with memory_folder() as folder:
        async with gateway(folder, beat_s=1.0) as gw, real_node(tmp_path, gw, await gw.invite()) as node:
            await gw.until_ready(node.name)
            for number in range(3 * HEARTBEAT_RECEIPTS_MAX):
                node.member._receipts.add(f"req_{number}", bytes(32), bytes(32), 1, 1)
            member = gw.roster.connected(node.name)
            assert member is not None
            await until("a page has come", lambda: member.audit.count >= HEARTBEAT_RECEIPTS_MAX)
            began = time.monotonic()
            await until("the next has come", lambda: member.audit.count >= 2 * HEARTBEAT_RECEIPTS_MAX)
            assert time.monotonic() - began < 0.7
