"""Who may join: every registration that should be refused is, says what to mend, and nothing is done for it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.errors import NodeUnreachable, Overloaded
from embedmesh.rules.limits import PENDING_OF_ORIGIN_MAX
from embedmesh.rules.membership import Offer, Standing
from embedmesh.signing.identity import Identity
from embedmesh.signing.invites import Invite, make_invite
from tests.gateway.mesh import Applicant, Gateway, gateway, relay_to, says, somebody
from tests.http.raw import Raw, request, send

pytestmark = pytest.mark.asyncio(loop_scope="module")


# -- what is said ------------------------------------------------------------------------------------------------------


def changed(**changes: Any) -> Callable[[Applicant, Invite], Awaitable[Raw]]:
    return lambda one, invite: one.ask(invite, **changes)


async def _signed_by_another(one: Applicant, invite: Invite) -> Raw:
    return await one.ask(invite, signed_by=Identity(bytes(32)))


async def _names_another(one: Applicant, invite: Invite) -> Raw:
    return await one.ask(invite, public_key=Identity(bytes(32)).public_key)


async def _changed_after_signing(one: Applicant, invite: Invite) -> Raw:
    asked, _ = await one.registration(invite)
    return await one.post(msgspec.structs.replace(asked, statement=asked.statement.replace(b'"DE"', b'"FR"')))


async def _reused_nonce(one: Applicant, invite: Invite) -> Raw:
    now_s = one.gateway.clock.unix_ms() // 1000
    nonce = one.gateway.nonces.make(now_s)
    assert one.gateway.nonces.take(nonce, now_s)
    return await one.ask(invite, nonce=nonce)


async def _old_nonce(one: Applicant, invite: Invite) -> Raw:
    now_s = one.gateway.clock.unix_ms() // 1000
    return await one.ask(invite, nonce=one.gateway.nonces.make(now_s - 62))


async def _clock(one: Applicant, invite: Invite, off_s: int) -> Raw:
    return await one.ask(invite, time_ms=one.gateway.clock.unix_ms() + off_s * 1000)


async def _without(one: Applicant, invite: Invite, member: str) -> Raw:
    asked, _ = await one.registration(invite)
    statement = json.loads(asked.statement)
    del statement[member]
    return await one.ask(invite, statement=json.dumps(statement).encode())


OFFER = Offer("a", 1, 1, "", "exact")

STATEMENTS: list[tuple[str, Callable[[Applicant, Invite], Awaitable[Raw]], int, str]] = [
    ("signed by another key", _signed_by_another, 401, "not signed by the key"),
    ("names another key", _names_another, 401, "not signed by the key"),
    ("changed after it was signed", _changed_after_signing, 401, "not signed by the key"),
    ("a nonce that was used", _reused_nonce, 401, "nonce"),
    ("a nonce that is too old", _old_nonce, 401, "nonce"),
    ("a nonce of its own", changed(nonce=b"n" * 38), 401, "nonce"),
    ("no nonce", changed(nonce=b""), 401, "nonce"),
    ("a clock 61 s behind", lambda one, invite: _clock(one, invite, -61), 400, "clock"),
    ("a clock 61 s ahead", lambda one, invite: _clock(one, invite, 61), 400, "clock"),
    ("another version", changed(version=2), 400, "version"),
    ("a short key", changed(public_key=b"k" * 31), 400, "public_key"),
    ("half a key half", changed(ephemeral=b"e" * 16), 400, "ephemeral"),
    ("a key half that decides alone", changed(ephemeral=bytes(32)), 400, "half of the session key"),
    ("a country of three letters", changed(country="DEU"), 400, "country"),
    ("a country in lower case", changed(country="de"), 400, "country"),
    ("an address without end", changed(address="https://" + "a" * 300), 400, "address"),
    ("a certificate without end", changed(certificate=bytes(8_193)), 400, "certificate"),
    ("no inputs at all", changed(inputs_max=0), 400, "inputs_max"),
    ("65 offers", changed(offers=(OFFER,) * 65), 400, "offers"),
    ("an offer for less than nothing", changed(offers=(msgspec.structs.replace(OFFER, price=-1),)), 400, "price"),
    ("a member missing", lambda one, invite: _without(one, invite, "nonce"), 400, "nonce"),
    ("a member too many", lambda one, invite: one.ask(invite, statement=b'{"more":1}'), 400, "statement"),
    ("no JSON", lambda one, invite: one.ask(invite, statement=b"\xff\xfe"), 400, "statement"),
    ("nested without end", lambda one, invite: one.ask(invite, statement=b"[" * 100_000), 400, "statement"),
]  # fmt: skip


@pytest.mark.parametrize(("ask", "status", "words"), [case[1:] for case in STATEMENTS], ids=[c[0] for c in STATEMENTS])
async def test_a_statement_that_is_not_right_is_refused(
    gw: Gateway, applicant: Applicant, ask: Callable[[Applicant, Invite], Awaitable[Raw]], status: int, words: str
) -> None:
    """And the join token that came with it is not used up: the node may mend it and come again."""
    invite = await gw.invite()
    says(await ask(applicant, invite), status, words)
    known = gw.roster.by_key(applicant.identity.public_key)
    assert known is None or known.standing is Standing.PENDING
    assert (await applicant.join(invite)).standing == "admitted"


BODIES = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b'{"statement":"?"}', 400),
    (b'{"data":{}}', 400),
    (b'{"data":1,"signature":""}', 400),
    (b'{"data":{},"signature":"","more":1}', 400),
    (b"\xff", 400),
    (b"[" * 100_000, 400),
    (b" " * (512 * 1024 + 1), 413),
]


@pytest.mark.parametrize(("body", "status"), BODIES, ids=[str(body[:20]) for body, _ in BODIES])
async def test_a_body_of_another_form_is_refused(gw: Gateway, body: bytes, status: int) -> None:
    reply = await send(gw.port, request("POST", "/v1/nodes", body, key=None))
    assert reply.status == status
    assert set(reply.error) == {"message", "type", "param", "code"}


# -- whether it may ----------------------------------------------------------------------------------------------------


async def _used(gw: Gateway, other: Applicant) -> Invite:
    invite = await gw.invite()
    await other.join(invite)
    return invite


async def _revoked(gw: Gateway, other: Applicant) -> Invite:
    invite = await gw.invite()
    assert (await gw.admin("DELETE", f"/invites/{invite.invite_id}")).status == 200
    return invite


async def _of_another_gateway(gw: Gateway, other: Applicant) -> Invite:
    return make_invite(Identity(bytes(32)).public_key)


async def _wrong_secret(gw: Gateway, other: Applicant) -> Invite:
    invite = await gw.invite()
    return Invite(invite.invite_id, "x" * 32, invite.fingerprint)


async def _expired(gw: Gateway, other: Applicant) -> Invite:
    return await gw.invite(lasts_s=-0.001)


@pytest.mark.parametrize("spoiled", [_used, _revoked, _of_another_gateway, _wrong_secret, _expired])
async def test_a_join_token_that_is_not_good_is_refused(
    gw: Gateway, applicant: Applicant, tmp_path: Path, spoiled: Callable[[Gateway, Applicant], Awaitable[Invite]]
) -> None:
    """One message for all; and such a node is not even pending: it has shown a token that it should not have."""
    invite = await spoiled(gw, Applicant(gw, tmp_path, "other"))
    says(await applicant.ask(invite), 401, "The join token is not valid, was used by another node, or has expired.")
    assert gw.roster.by_key(applicant.identity.public_key) is None


async def test_a_proof_of_another_statement_is_refused(gw: Gateway, applicant: Applicant) -> None:
    """Who sees a token's proof go by can do nothing with it."""
    invite = await gw.invite()
    seen, _ = await applicant.registration(invite)
    asked, _ = await applicant.registration()
    with_it = msgspec.structs.replace(asked, invite_id=seen.invite_id, proof=seen.proof)
    says(await applicant.post(with_it), 401, "join token")


async def test_one_token_takes_in_one_of_many(gw: Gateway, tmp_path: Path) -> None:
    """That come at the same moment, each with the right proof."""
    invite = await gw.invite()
    several = [Applicant(gw, tmp_path, f"n{number}") for number in range(5)]
    replies = await asyncio.gather(*(one.ask(invite) for one in several))
    assert sorted(reply.status for reply in replies) == [200, 401, 401, 401, 401]


async def test_without_a_token_it_waits_for_the_operator(gw: Gateway, applicant: Applicant) -> None:
    """Nobody connects to a pending node; once it is approved it joins by asking again. What was said of it stays."""
    contacts = 0

    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal contacts
        contacts += 1

    async with somebody(count, applicant.tls) as port:
        place: dict[str, Any] = {"address": f"https://127.0.0.1:{port}", "certificate": applicant.certificate}
        welcome = await applicant.join(**place)
        assert (welcome.standing, welcome.ephemeral, welcome.signature) == ("pending", b"", b"")
        assert await applicant.join(**place) == welcome
    assert contacts == 0
    assert gw.node(applicant.node_id) is None
    reply = await gw.admin("POST", f"/nodes/{applicant.node_id}/weight", {"weight": 2.5})
    assert reply.status == 200
    assert (await applicant.join()).standing == "pending"
    approved = await gw.act(applicant.node_id, "approve")
    assert (approved["standing"], approved["small_id"], approved["state"]) == ("admitted", welcome.small_id, None)
    async with applicant.listening():
        admitted = await applicant.join(**applicant.place)
        assert (admitted.standing, admitted.small_id) == ("admitted", welcome.small_id)
        assert (await gw.until_ready(applicant.node_id)).weight == 2.5
        await gw.answers_rightly(applicant.node_id)


async def test_an_approval_is_not_lost_to_a_node_that_asks_at_that_moment(gw: Gateway, applicant: Applicant) -> None:
    """Whatever comes first: it was said, and stays said."""
    await applicant.join()
    for pause in range(12):
        asking = asyncio.create_task(applicant.ask())
        for _ in range(pause):
            await asyncio.sleep(0)
        await gw.roster.change(applicant.node_id, None, standing=Standing.ADMITTED)
        await asking
        assert gw.roster.record(applicant.node_id).standing is Standing.ADMITTED
        [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
        assert kept.standing is Standing.ADMITTED
        await gw.roster.change(applicant.node_id, None, standing=Standing.PENDING)


async def test_a_removed_node_is_not_taken_back(gw: Gateway, applicant: Applicant) -> None:
    """Not with a new token, not by an approval, not by its old session; the operator's word is for good."""
    async with applicant.member():
        place = applicant.place
        removed = await gw.act(applicant.node_id, "remove")
        assert (removed["standing"], removed["state"]) == ("removed", None)
        says(await applicant.ask(**place), 403, "removed by the operator")
        says(await applicant.ask(await gw.invite(), **place), 403, "removed by the operator")
        says(await applicant.say("heartbeat", {"tokens_waiting": 0, "tokens_per_s": 0}), 401, "Register again")
        says(await gw.admin("POST", f"/nodes/{applicant.node_id}/approve"), 400, "stays removed")
        with pytest.raises(NodeUnreachable):
            await gw.embed(applicant.node_id)
        [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
        assert (kept.standing, kept.secret) == (Standing.REMOVED, b"")


async def test_a_node_that_is_removed_while_it_registers_stays_removed(gw: Gateway, applicant: Applicant) -> None:
    """Its address is visited for seconds; the operator may speak meanwhile."""
    await applicant.join(await gw.invite())
    visited, go_on = asyncio.Event(), asyncio.Event()
    async with (
        applicant.listening() as address,
        somebody(relay_to(address, after=go_on, reached=visited)) as port,
    ):
        applicant.believe(f"https://127.0.0.1:{port}")
        asking = asyncio.create_task(applicant.ask(**applicant.place))
        await visited.wait()
        await gw.act(applicant.node_id, "remove")
        go_on.set()
        says(await asking, 403, "removed by the operator")
    assert gw.roster.record(applicant.node_id).standing is Standing.REMOVED
    assert gw.node(applicant.node_id) is None


async def test_what_an_operator_says_while_a_node_registers_is_not_lost(gw: Gateway, applicant: Applicant) -> None:
    """The record that is kept in the end has the words of both."""
    async with applicant.member():
        for pause in range(12):
            asking = asyncio.create_task(applicant.join(**applicant.place))
            for _ in range(pause):
                await asyncio.sleep(0.0005)
            await gw.act(applicant.node_id, "drain")
            await gw.act(applicant.node_id, "trust")
            await asking
            record = gw.roster.record(applicant.node_id)
            [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
            assert (record.draining, record.trusted) == (kept.draining, kept.trusted) == (True, True)
            assert record == kept
            await gw.act(applicant.node_id, "resume")
            await gw.act(applicant.node_id, "distrust")


# -- what strangers cost -----------------------------------------------------------------------------------------------


async def test_a_registration_is_taken_once(gw: Gateway, applicant: Applicant) -> None:
    asked, _ = await applicant.registration(await gw.invite())
    assert (await applicant.post(asked)).status == 200
    says(await applicant.post(asked), 401, "nonce")


async def topic_of_nodes(gw: Gateway) -> int:
    """How often gateways were told of nodes."""
    found: dict[str, int] = dict(await gw.store._reads.ask("SELECT kind, version FROM changes", {}))
    return found["nodes"]


async def test_what_a_stranger_says_is_noted_once_and_small(gw: Gateway, applicant: Applicant) -> None:
    """However often it asks: no nonce is used up, nothing is written or reloaded. What it offers is not kept."""
    used = len(gw.nonces._used)
    place: dict[str, Any] = {"address": "https://node.example", "certificate": applicant.certificate}
    asked, _ = await applicant.registration(**place)
    said = await applicant.post(asked)
    record, told = gw.roster.record(applicant.node_id), await topic_of_nodes(gw)
    assert (record.address, record.country) == ("https://node.example", "DE")
    assert (record.offers, record.certificate, record.secret) == ((), b"", b"")
    for _ in range(5):
        assert (await applicant.post(asked)).body == said.body
        assert (await applicant.ask(address="https://elsewhere.example")).body == said.body
    assert gw.roster.record(applicant.node_id) == record
    assert (len(gw.nonces._used), await topic_of_nodes(gw)) == (used, told)


async def test_that_a_stranger_asks_still_is_noted_every_minute_and_told_to_nobody(
    gw: Gateway, applicant: Applicant
) -> None:
    """What has changed of what it says is told then."""
    await applicant.join()
    [first] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
    told = await topic_of_nodes(gw)
    try:
        for ahead_s, address, tells in ((61, "", 0), (122, "https://node.example", 1)):
            gw.clock.ahead_s = ahead_s
            await applicant.join(address=address)
            [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
            assert kept == gw.roster.record(applicant.node_id)
            assert kept.registered_ms >= first.registered_ms + ahead_s * 1000
            assert (kept.address, await topic_of_nodes(gw)) == (address, told + tells)
    finally:
        gw.clock.ahead_s = 0


async def note(gw: Gateway, name: int, origin: str) -> str:
    """A stranger asks to join; its id."""
    public_key = Identity(name.to_bytes(32, "big")).public_key
    return (await gw.roster.note_pending(public_key, origin, address="", country="")).node_id


async def test_an_older_stranger_is_never_pushed_out_and_one_that_is_gone_makes_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the store, and here. Who asks on is not gone; an admitted node takes no place."""
    monkeypatch.setattr("embedmesh.storage.nodes.PENDING_NODES_MAX", 3)
    async with gateway(tmp_path) as gw:
        await Applicant(gw, tmp_path).join(await gw.invite())
        first, second, third = [await note(gw, name, f"origin {name}") for name in (1, 2, 3)]
        with pytest.raises(Overloaded, match="3 nodes wait to be approved"):
            await note(gw, 4, "origin 4")
        gw.clock.ahead_s = 14 * 60 + 59
        assert [await note(gw, name, f"origin {name}") for name in (1, 3)] == [first, third]
        gw.clock.ahead_s = 15 * 60 + 1
        fourth = await note(gw, 4, "origin 4")
        with pytest.raises(Overloaded):
            await note(gw, 5, "origin 5")
        pending = {one.node_id for one in gw.roster.records() if one.standing is Standing.PENDING}
        assert pending == {first, third, fourth} != {second}
        assert {one.node_id for one in await gw.store.nodes.all()} == {one.node_id for one in gw.roster.records()}


async def test_strangers_of_one_address_leave_room_for_those_of_others(gw: Gateway) -> None:
    """Once one of them is approved or removed, another may ask."""
    some = [await note(gw, 100 + number, "one") for number in range(PENDING_OF_ORIGIN_MAX)]
    for _ in range(3):
        with pytest.raises(Overloaded, match="From one address at most 10 nodes"):
            await note(gw, 200, "one")
        assert await note(gw, 101, "one") == some[1]
    await note(gw, 300, "another")
    await gw.act(some[0], "remove")
    await note(gw, 200, "one")
    with pytest.raises(Overloaded):
        await note(gw, 201, "one")


async def test_signatures_that_strangers_have_checked_are_bounded_by_address_and_not_for_nodes_that_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the address that a trusted proxy names last, whatever stands before it."""
    monkeypatch.setattr("embedmesh.gateway.nodes.registration.STRANGERS_A_MINUTE_MAX", 10)
    async with gateway(tmp_path, trusted=["127.0.0.0/8"]) as gw:
        member, stranger = Applicant(gw, tmp_path), Applicant(gw, tmp_path, "stranger")
        await member.join(await gw.invite())

        async def junk(origin: str, by: Applicant = stranger) -> int:
            asked, _ = await by.registration()
            body = msgspec.json.encode(msgspec.structs.replace(asked, signature=bytes(64)))
            forwarded = {"X_Forwarded_For": f"192.0.2.77, {origin}"}
            return (await send(gw.port, request("POST", "/v1/nodes", body, key=None, **forwarded))).status

        said = [await junk("192.0.2.1") for _ in range(12)]
        assert said == [401] * said.count(401) + [503] * said.count(503)
        assert 0 < said.count(401) <= 8
        assert await junk("192.0.2.1", member) == 503  # who names an admitted node is a stranger still
        assert await junk("192.0.2.2") == 401
        assert (await member.join()).standing == "admitted"


async def test_a_node_has_its_address_looked_at_once_at_a_time(gw: Gateway, applicant: Applicant) -> None:
    """Or one that does not answer would keep others from joining for as long as it likes."""
    await applicant.join(await gw.invite())
    visited, go_on = asyncio.Event(), asyncio.Event()
    async with (
        applicant.listening() as address,
        somebody(relay_to(address, after=go_on, reached=visited)) as port,
    ):
        applicant.believe(f"https://127.0.0.1:{port}")
        asking = asyncio.create_task(applicant.ask(**applicant.place))
        await visited.wait()
        says(await applicant.ask(**applicant.place), 503, "for another registration")
        go_on.set()
        assert (await asking).status == 200
        assert (await applicant.ask(**applicant.place)).status == 200
