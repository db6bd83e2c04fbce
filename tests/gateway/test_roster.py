"""Real nodes join, report, move, leave and come back, by both doors; only what a person has to mend ends one."""

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.http.receive import BodyBudget
from embedmesh.node import dialling, joining
from embedmesh.node.joining import KnownGateway
from embedmesh.node.member import MemberNode
from embedmesh.rules.errors import NodeUnreachable, SetupError
from embedmesh.rules.membership import Greeting, Standing, Welcome
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.settings import NodeSettings
from embedmesh.signing.identity import Identity
from embedmesh.signing.invites import Invite, make_invite
from tests.flow.world import right_reply
from tests.gateway.mesh import (
    IDS,
    Engine,
    Gateway,
    RealNode,
    free_port,
    gateway,
    memory_folder,
    pipe,
    real_node,
    somebody,
    until,
)
from tests.http.raw import request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")

DOORS = ["https", "http", ""]  # an address of each kind; none: it dials out


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried again soon."""
    monkeypatch.setattr(joining, "REGISTER_RETRY_S", (0.02,))
    monkeypatch.setattr(joining, "PENDING_S", 0.02)
    monkeypatch.setattr(dialling, "REDIAL_MIN_S", 0.02)


async def ends(node: RealNode) -> str:
    """Why it gave up: what its operator is told."""
    with pytest.raises(SetupError) as told:
        async with asyncio.timeout(5):
            await node.running
    return str(told.value)


async def embeds(gw: Gateway) -> int:
    """The status of a caller's request."""
    body = b'{"model":"tiny","input":["abc","d"]}'
    return (await send(gw.port, request(body=body, key=gw.key("embeddings")))).status


# -- joining -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", DOORS)
async def test_an_invited_node_joins_and_comes_back_without_its_token(
    gw: Gateway, tmp_path: Path, address: str
) -> None:
    """By whichever door; it is described as it is, and the second time it is the same node with another session."""
    async with real_node(tmp_path, gw, await gw.invite(), address=address) as node:
        found = await gw.until_ready(node.name)
        await gw.answers_rightly(node.name)
        assert found.kind == ("remote" if address else "dialled")
        assert found.asks == {"acme/tiny": 5, "acme/native": 5}
        first = gw.roster.record(node.name)
        assert (first.address, first.country, first.standing) == (node.address, "DE", Standing.ADMITTED)
    assert (tmp_path / "gateway.json").stat().st_mode & 0o777 == 0o600
    async with real_node(tmp_path, gw, address=node.address) as again:
        await until("it has another session", lambda: gw.roster.record(again.name).secret != first.secret)
        await gw.until_ready(again.name)
        await gw.answers_rightly(again.name)
        record = gw.roster.record(again.name)
        assert (record.small_id, record.node_id) == (first.small_id, first.node_id)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
async def test_an_address_is_listened_on_by_default(tmp_path: Path, host: str) -> None:
    """Also one of IPv6, where this machine has it."""
    try:
        socket.create_server((host.strip("[]"), 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with memory_folder() as folder:
        address = f"https://{host}:{free_port()}"
        async with (
            gateway(folder, networks=("127.0.0.0/8", "::1/128")) as gw,
            real_node(tmp_path, gw, await gw.invite(), address=address, listen=False) as node,
        ):
            await gw.until_ready(node.name)
            await gw.answers_rightly(node.name)


TO_MEND: list[tuple[dict[str, str], str]] = [
    ({}, "give --join TOKEN"),
    ({"join": "emj_short"}, "Mend --join"),
    ({"join": "em_" + "x" * 94}, "Mend --join"),
    ({"gateway": "gw.example"}, "Mend --gateway"),
    ({"gateway": "ftp://gw.example"}, "Mend --gateway"),
    ({"gateway": "http://user@gw.example"}, "Mend --gateway"),
    ({"gateway": "http://gw.example/some/path"}, "Mend --gateway"),
    ({"gateway": "http://gw.example?x"}, "Mend --gateway"),
    ({"join": "good", "address": "node.example"}, "Mend --address"),
    ({"join": "good", "address": "https://node.example/path"}, "Mend --address"),
    ({"join": "good", "address": "https://node.example", "listen": "8443"}, "--listen"),
    ({"join": "good", "address": "https://node.example", "listen": "0.0.0.0:0"}, "--listen"),
    ({"join": "good", "address": "https://node.example", "listen": "0.0.0.0:https"}, "--listen"),
]


@pytest.mark.parametrize(("given", "words"), TO_MEND, ids=[str(given) for given, _ in TO_MEND])
async def test_settings_that_a_person_must_mend_are_named_at_once(
    gw: Gateway, tmp_path: Path, given: dict[str, str], words: str
) -> None:
    """In one line, before anything is opened or asked; a token is not repeated."""
    if given.get("join") == "good":
        given = given | {"join": (await gw.invite()).text}
    settings = NodeSettings(**{"gateway": gw.url, "data_dir": tmp_path, **given})
    with pytest.raises(SetupError) as told:
        MemberNode(settings, Engine(), Engine(), BodyBudget(1), lambda: None)
    assert words in str(told.value)
    assert "\n" not in str(told.value)
    assert "join" not in given or given["join"] not in str(told.value)


@pytest.mark.parametrize("content", [b"", b"{", b'{"url":1}', b"\xff"])
async def test_a_damaged_memory_of_the_gateway_is_named(gw: Gateway, tmp_path: Path, content: bytes) -> None:
    """Nothing is guessed: the node would not know whom to trust. With a token it joins anew."""
    (tmp_path / "gateway.json").write_bytes(content)
    with pytest.raises(SetupError, match=r"gateway.json cannot be read"):
        async with real_node(tmp_path, gw):
            pass
    async with real_node(tmp_path, gw, await gw.invite()) as node:
        await gw.until_ready(node.name)


async def _another_gateways(gw: Gateway) -> Invite:
    return make_invite(Identity(bytes(32)).public_key)


async def _unknown(gw: Gateway) -> Invite:
    return make_invite(gw.identity.public_key)


async def _expired(gw: Gateway) -> Invite:
    return await gw.invite(lasts_s=-1)


async def _used(gw: Gateway) -> Invite:
    invite = await gw.invite()
    assert await gw.store.nodes.use_invite(invite.invite_id, "node_other")
    return invite


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        (_another_gateways, "is not the gateway of this node's join token"),
        (_unknown, "The join token is not valid"),
        (_expired, "The join token is not valid"),
        (_used, "was used by another node"),
    ],
)
async def test_a_token_that_is_not_good_ends_the_node_with_words(
    gw: Gateway, tmp_path: Path, spoiled: Callable[[Gateway], Awaitable[Invite]], words: str
) -> None:
    """Trying again would not help; and it keeps nothing of a gateway that did not take it."""
    async with real_node(tmp_path, gw, await spoiled(gw)) as node:
        assert words in await ends(node)
        assert not (tmp_path / "gateway.json").exists()
        assert gw.roster.by_key(Identity.load(tmp_path / "node.identity").public_key) is None


async def test_a_gateway_with_another_key_is_told_nothing(gw: Gateway, tmp_path: Path) -> None:
    """Who answers in the gateway's place gets to see no registration: not even who the node is."""
    heard: list[bytes] = []
    greeting = msgspec.json.encode(Greeting(Identity(bytes(32)).public_key, b"n" * 38))

    async def impostor(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(greeting) + greeting)
        await reader.read()

    invite = await gw.invite()
    async with somebody(impostor) as port, real_node(tmp_path, f"http://127.0.0.1:{port}", invite) as node:
        assert "is not the gateway of this node's join token" in await ends(node)
        assert [line.split(b" HTTP")[0] for line in heard] == [b"GET /v1/nodes"]
        assert node.name.encode() not in heard[0]


@pytest.mark.parametrize("spoil", ["signature", "ephemeral", "form", "status"])
async def test_a_welcome_that_the_gateway_did_not_sign_is_none(gw: Gateway, tmp_path: Path, spoil: str) -> None:
    """Somebody between the two changes it: the node does not join under another's key, and tries on."""
    spoiled = asyncio.Event()

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, to_there = await asyncio.open_connection("127.0.0.1", gw.port)

        async def back() -> None:
            while True:
                head = await there.readuntil(b"\r\n\r\n")
                length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
                body = await there.readexactly(length)
                if b'"ephemeral"' in body:
                    welcome = msgspec.json.decode(body, type=Welcome)
                    welcome = {
                        "signature": msgspec.structs.replace(welcome, signature=bytes(64)),
                        "ephemeral": msgspec.structs.replace(welcome, ephemeral=bytes(range(32))),
                    }.get(spoil, welcome)
                    body = b"{}" if spoil == "form" else msgspec.json.encode(welcome)
                    spoiled.set()
                head = b"HTTP/1.1 %d X\r\n" % (503 if spoil == "status" and spoiled.is_set() else 200)
                writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

        await asyncio.gather(pipe(reader, to_there), back(), return_exceptions=True)

    invite = await gw.invite()
    async with somebody(between) as port, real_node(tmp_path, f"http://127.0.0.1:{port}", invite) as node:
        for _ in range(2):
            await spoiled.wait()
            spoiled.clear()
        assert not node.running.done()
        assert not (tmp_path / "gateway.json").exists()
        found = gw.node(node.name)
        assert found is None or found.state is NodeState.UNPROVEN


async def test_a_node_whose_gateway_has_forgotten_it_waits_for_an_operator(
    gw: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As after an old backup: it knows its gateway, has no token any more, and says once what to do there."""
    caplog.set_level(logging.INFO, "embedmesh.node")
    (tmp_path / "gateway.json").write_bytes(msgspec.json.encode(KnownGateway(gw.url, gw.fingerprint)))
    async with real_node(tmp_path, gw, address="https") as node:
        name = node.name
        await until("it is pending", lambda: name in {one.node_id for one in gw.roster.records()})
        asked = gw.strangers_asked()
        await until("it has asked again", lambda: gw.strangers_asked() != asked)
        assert gw.node(name) is None
        assert caplog.text.count(f"`embedmesh nodes approve {name}`") == 1
        await gw.act(name, "approve")
        await gw.until_ready(name)
        await gw.answers_rightly(name)


@pytest.mark.parametrize("ahead_s", [-61, 61])
async def test_a_clock_that_is_wrong_is_named(gw: Gateway, tmp_path: Path, ahead_s: int) -> None:
    invite = await gw.invite()
    gw.clock.ahead_s = ahead_s
    try:
        async with real_node(tmp_path, gw, invite) as node:
            assert "clock" in await ends(node)
    finally:
        gw.clock.ahead_s = 0


async def test_an_address_that_the_gateway_does_not_reach_is_named(gw: Gateway, tmp_path: Path) -> None:
    """At the first time it is a mistake in the settings."""
    async with real_node(tmp_path, gw, await gw.invite(), address="https") as node:
        node.member._joining.address = node.member._joining.address._replace(url=f"https://127.0.0.1:{free_port()}")
        assert "Can this gateway reach it?" in await ends(node)


async def test_a_member_that_is_not_reached_once_tries_on(
    gw: Gateway, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After it has joined, a refusal may be the network's: it must not take a node out of service for good."""
    async with real_node(tmp_path, gw, await gw.invite(), address="https") as node:
        await gw.until_ready(node.name)
        place = node.member._joining.address
        node.member._joining.address = place._replace(url=f"https://127.0.0.1:{free_port()}")
        before = gw.roster.record(node.name)
        gw.connected.leave(node.name)  # so that its next report is refused, and it registers anew
        await until("it was refused", lambda: "does not take this node now: Nobody answers" in caplog.text)
        assert not node.running.done()
        node.member._joining.address = place
        await gw.until_ready(node.name)
        assert gw.roster.record(node.name).secret != before.secret


async def test_a_removed_node_ends(gw: Gateway, tmp_path: Path) -> None:
    """It is told so by the next report, and so is its next start."""
    async with real_node(tmp_path, gw, await gw.invite()) as node:
        await gw.until_ready(node.name)
        await gw.act(node.name, "remove")
        assert "removed by the operator" in await ends(node)
    async with real_node(tmp_path, gw, await gw.invite()) as node:
        assert "removed by the operator" in await ends(node)


async def test_a_gateway_that_is_away_is_waited_for(tmp_path: Path) -> None:
    """A node may start first; and a farewell to nobody does not keep it from ending."""
    port = free_port()
    with memory_folder() as folder:
        async with gateway(folder) as first:
            invite = await first.invite()
        async with real_node(tmp_path, f"http://127.0.0.1:{port}", invite) as node:
            await asyncio.sleep(0.05)
            assert not node.running.done()
            async with gateway(folder, port=port) as there:
                await there.until_ready(node.name)
                await there.answers_rightly(node.name)


# -- what stays, and what changes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", DOORS)
async def test_a_gateway_that_was_killed_finds_its_nodes_again(tmp_path: Path, address: str) -> None:
    """They do nothing for it: sessions are in the store; who dials out dials again. Receipts go on where they were."""
    with memory_folder() as folder:
        async with gateway(folder) as first, real_node(tmp_path, first, await first.invite(), address=address) as node:
            await first.until_ready(node.name)
            for number in range(5):
                await first.embed(node.name, request_id=f"req_{number}")
            await until("receipts are checked", lambda: first.roster.connected(node.name).audit.count >= 5)
            secret = first.roster.record(node.name).secret
            await first.end(within_s=0)
            async with gateway(folder, port=first.port) as second:
                assert second.roster.record(node.name).secret == secret
                await second.until_ready(node.name)
                await second.answers_rightly(node.name)
                member = second.roster.connected(node.name)
                assert member is not None
                assert member.audit.count >= 5
                await until("its log is followed on", lambda: member.node.counts["receipts_matched"])
                assert member.node.counts["receipts_refused"] == 0


async def test_a_gateway_whose_store_is_older_takes_its_nodes_back(gw: Gateway, tmp_path: Path) -> None:
    """It does not know the session: the node is told 401, and registers anew by itself."""
    async with real_node(tmp_path, gw, await gw.invite(), address="https") as node:
        await gw.until_ready(node.name)
        gw.connected.leave(node.name)
        await until("it is back", lambda: gw.node(node.name))
        await gw.until_ready(node.name)
        await gw.answers_rightly(node.name)


@pytest.mark.parametrize("address", DOORS)
async def test_a_new_session_disturbs_no_call(gw: Gateway, tmp_path: Path, address: str) -> None:
    """Calls that run under the old one are answered, those that begin meanwhile too; what was learned of it stays."""
    async with real_node(tmp_path, gw, await gw.invite(), address=address) as node:
        found = await gw.until_ready(node.name)
        member = gw.roster.connected(node.name)
        node.engine.open.clear()
        running = [asyncio.create_task(gw.embed(node.name)) for _ in range(3)]
        await until("they run", lambda: node.engine.running >= 3)
        load, secret = found.load, gw.roster.record(node.name).secret
        node.member._price = 9  # what it offers changes
        began: list[asyncio.Task[Any]] = []

        def registered_anew() -> bool:
            began.append(asyncio.create_task(gw.embed(node.name)))
            return gw.roster.record(node.name).secret != secret

        await until("it has registered anew", registered_anew)
        node.engine.open.set()
        for answer in await asyncio.gather(*running, *began[:12]):
            assert answer == right_reply(IDS)
        await asyncio.gather(*began[12:], return_exceptions=True)  # more than a dialled node has connections
        assert gw.node(node.name) is found
        assert gw.roster.connected(node.name) is member
        assert (found.state, found.load is load, found.asks["acme/tiny"]) == (NodeState.READY, True, 9)
        assert not found.failed.keys() & {Check.ACCESS, Check.STATUS_4XX, Check.SIGNATURE}


async def test_a_node_that_moved_is_asked_at_its_new_address_only(gw: Gateway, tmp_path: Path) -> None:
    """Under a new session; who listens at the old address hears nothing any more."""
    heard = 0

    async def old_place(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard += 1

    async with real_node(tmp_path, gw, await gw.invite(), address="https", farewell=False) as node:
        before = await gw.until_ready(node.name)
        secret = gw.roster.record(node.name).secret
    port = int(node.address.rpartition(":")[2])
    async with real_node(tmp_path, gw, address="https") as moved:
        await until("it is at its new place", lambda: gw.roster.record(node.name).address == moved.address)
        server = await asyncio.start_server(old_place, "127.0.0.1", port)
        after = await gw.until_ready(node.name)
        assert after is not before
        for _ in range(5):
            await gw.answers_rightly(node.name)
        server.close()
        assert heard == 0
        assert gw.roster.record(node.name).secret != secret


@pytest.mark.parametrize(("first", "then"), [("https", ""), ("", "https")])
async def test_a_node_may_change_its_door(gw: Gateway, tmp_path: Path, first: str, then: str) -> None:
    """From an address to dialling out and back: it is the same node, and is asked by the door that it has now."""
    async with real_node(tmp_path, gw, await gw.invite(), address=first) as node:
        await gw.until_ready(node.name)
    async with real_node(tmp_path, gw, address=then) as node:
        await until("it has the other door", lambda: gw.roster.record(node.name).address == node.address)
        found = await gw.until_ready(node.name)
        assert found.kind == ("remote" if then else "dialled")
        await gw.answers_rightly(node.name)


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", DOORS)
async def test_a_node_that_leaves_answers_what_runs_and_gets_no_more(tmp_path: Path, address: str) -> None:
    """Its farewell comes first; then there is nobody to give work to, and callers are told so at once."""
    with memory_folder() as folder:
        async with gateway(folder) as gw:
            async with real_node(tmp_path, gw, await gw.invite(), address=address) as node:
                found = await gw.until_ready(node.name)
                assert await embeds(gw) == 200
                node.engine.open.clear()
                last = asyncio.create_task(embeds(gw))
                await until("it runs", lambda: node.engine.running)
                node.running.cancel()
                leaving = asyncio.create_task(node.member.stop(30))
                await until("it has said farewell", lambda: found.draining)
                assert await embeds(gw) == 503
                assert (await gw.admin("GET", f"/nodes/{node.name}")).status == 200
                node.engine.open.set()
                assert await last == 200
                async with asyncio.timeout(5):  # it does not wait longer than it has something to do
                    await leaving
            assert gw.roster.record(node.name).draining is False  # its own word, not the operator's
            async with real_node(tmp_path, gw, address=node.address) as again:
                await until("it is back", lambda: not gw.node(again.name).draining)
                await gw.until_ready(again.name)
                assert await embeds(gw) == 200


async def test_a_drained_node_stays_drained_until_the_operator_says_otherwise(tmp_path: Path) -> None:
    """Over a new registration and over a restart of the gateway; probes go on, callers' work does not come."""
    with memory_folder() as folder:
        async with gateway(folder) as gw:
            async with real_node(tmp_path, gw, await gw.invite(), address="https") as node:
                await gw.until_ready(node.name)
                shown = await gw.act(node.name, "drain")
                assert (shown["state"], shown["draining"]) == ("draining", True)
                assert await embeds(gw) == 503
            async with real_node(tmp_path, gw, address=node.address) as node:
                await gw.until_ready(node.name)
                assert await embeds(gw) == 503
                shown = await gw.act(node.name, "resume")
                assert (shown["state"], shown["draining"]) == ("ready", False)
                assert await embeds(gw) == 200
                await gw.act(node.name, "drain")
        async with gateway(folder) as gw:
            record = gw.roster.record(node.name)
            assert record.draining
            assert gw.node(node.name).draining


async def test_a_removed_nodes_connections_are_given_up(gw: Gateway, tmp_path: Path) -> None:
    """Of a node that dials out too, and also those that were in use just then: nobody keeps one for nothing."""
    async with real_node(tmp_path, gw, await gw.invite()) as node:
        await gw.until_ready(node.name)
        member = gw.roster.connected(node.name)
        assert member is not None
        node.engine.open.clear()
        running = asyncio.create_task(gw.embed(node.name))
        await until("it runs", lambda: node.engine.running)
        await gw.act(node.name, "remove")
        node.engine.open.set()
        assert await running == right_reply(IDS)
        assert not member.pool._idle
        with pytest.raises(NodeUnreachable):
            await gw.embed(node.name)
