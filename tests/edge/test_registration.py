"""Who may join: every registration that should be refused is, says what to mend, and nothing is done for it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.errors import NodeUnreachable
from embedmesh.rules.membership import Offer, Standing, Statement
from embedmesh.signing.identity import Identity
from embedmesh.signing.invites import Invite, make_invite
from tests.edge.http import Raw, request, send
from tests.edge.mesh import Applicant, Gateway, relay_to, says, somebody

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
    asked, _ = await one.registration()
    assert (await one.post(asked)).status == 200
    nonce = msgspec.json.decode(asked.statement, type=Statement).nonce
    return await one.ask(invite, nonce=nonce)


async def _replayed(one: Applicant, invite: Invite) -> Raw:
    asked, _ = await one.registration()
    assert (await one.post(asked)).status == 200
    return await one.post(asked)


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
    ("the same registration again", _replayed, 401, "nonce"),
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
    known = gw.members.by_key(applicant.identity.public_key)
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
    assert gw.members.by_key(applicant.identity.public_key) is None


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
        place = {"address": f"https://127.0.0.1:{port}", "certificate": applicant.certificate}
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
        await gw.members.change(applicant.node_id, standing=Standing.ADMITTED)
        await asking
        assert gw.members.record(applicant.node_id).standing is Standing.ADMITTED
        [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
        assert kept.standing is Standing.ADMITTED
        await gw.members.change(applicant.node_id, standing=Standing.PENDING)


async def test_a_removed_node_is_not_taken_back(gw: Gateway, applicant: Applicant) -> None:
    """Not with a new token, not by an approval, not by its old session; the operator's word is for good."""
    async with applicant.member():
        place = applicant.place
        removed = await gw.act(applicant.node_id, "remove")
        assert (removed["standing"], removed["state"]) == ("removed", None)
        says(await applicant.ask(**place), 403, "removed by the operator")
        says(await applicant.ask(await gw.invite(), **place), 403, "removed by the operator")
        says(await applicant.say("heartbeat", {"tokens_waiting": 0, "tokens_per_s": 0}), 401, "Register anew")
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
    assert gw.members.record(applicant.node_id).standing is Standing.REMOVED
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
            record = gw.members.record(applicant.node_id)
            [kept] = [one for one in await gw.store.nodes.all() if one.node_id == applicant.node_id]
            assert (record.draining, record.trusted) == (kept.draining, kept.trusted) == (True, True)
            assert record == kept
            await gw.act(applicant.node_id, "resume")
            await gw.act(applicant.node_id, "distrust")


async def test_nodes_that_nobody_knows_fill_no_memory(gw: Gateway, tmp_path: Path, monkeypatch: Any) -> None:
    """The oldest that is pending goes for the newest, in the store and here."""
    monkeypatch.setattr("embedmesh.storage.nodes.PENDING_MAX", 3)
    several = [Applicant(gw, tmp_path, f"n{number}") for number in range(6)]
    for one in several:
        await one.join()
        await asyncio.sleep(0.001)
    pending = {one.node_id for one in gw.members.records() if one.standing is Standing.PENDING}
    assert pending == {one.node_id for one in several[-3:]}
    assert {one.node_id for one in await gw.store.nodes.all()} == {one.node_id for one in gw.members.records()}
