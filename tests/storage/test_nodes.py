"""Nodes and invites in the real store: kept whole, numbered once, bounded, and with their secrets sealed."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.acts import Actor
from embedmesh.rules.errors import Overloaded, StoreUnavailable
from embedmesh.rules.limits import PENDING_NODES_MAX
from embedmesh.rules.membership import Offer, Standing
from embedmesh.storage.db import refusals
from embedmesh.storage.nodes import NO_RECEIPTS_HEAD, NodeRecord, SavedNode
from embedmesh.storage.store import Store
from tests.storage.shop import Shop

OFFER = Offer("acme/tiny", 4, 8, "0" * 64, "exact", 12)
SESSION = b"the session keys of this node, in the plain"
BY = Actor("user:tests", "here")
VERIFIER = b"what checks the proof of this invite"


def node(number: int, standing: Standing = Standing.ADMITTED, **members: Any) -> NodeRecord:
    """A node as a registration makes it."""
    return NodeRecord(
        node_id=f"node_{number:032}",
        standing=standing,
        public_key=number.to_bytes(32, "big"),
        inputs_max=2_048,
        **members,
    )


def execute(shop: Shop, statement: str, values: dict[str, object] | None = None) -> list[tuple[Any, ...]]:
    """What somebody with a shell could do to the store."""
    with shop.by_hand() as db:
        found = db.execute(statement, values)
        return list(found.fetchall()) if found.description else []


# -- nodes -------------------------------------------------------------------------------------------------------------


async def test_a_node_comes_back_as_it_was_kept(shop: Shop) -> None:
    """Every member, also after a restart; of an upstream server, which has no key, too."""
    store = await shop.open()
    kept = [
        node(
            1,
            address="https://node.example:8443",
            ip="93.184.216.34",
            certificate=b"DER",
            country="DE",
            offers=(OFFER, OFFER),
            secret=SESSION,
            trusted=True,
            weight=2.5,
            draining=True,
            quarantined="it lied",
            receipts_count=7,
            receipts_head=b"h" * 32,
            created_ms=1,
            registered_ms=2,
        ),
        node(2, Standing.PENDING),
        node(3, Standing.REMOVED),
        msgspec.structs.replace(node(4), kind="upstream", public_key=None, secret=b"bearer"),
    ]
    for number, record in enumerate(kept, 1):
        assert await store.nodes.save(record) == SavedNode(msgspec.structs.replace(record, small_id=number), None)
    expected = [msgspec.structs.replace(record, small_id=number) for number, record in enumerate(kept, 1)]
    assert await store.nodes.all() == expected
    await store.close()
    again = await shop.open()
    assert await again.nodes.all() == expected
    await again.close()


async def test_a_small_id_is_given_once(shop: Shop, store: Store) -> None:
    """Also where many come at one time; a node keeps its own, and the time it was first seen, whatever changes."""
    saved = await asyncio.gather(*(store.nodes.save(node(number, created_ms=number)) for number in range(1, 21)))
    assert sorted(one.record.small_id for one in saved) == list(range(1, 21))
    changed = node(5, Standing.REMOVED, address="https://elsewhere.example", created_ms=99)
    assert (await store.nodes.save(changed)).record.small_id == saved[4].record.small_id
    [found] = [record for record in await store.nodes.all() if record.node_id == changed.node_id]
    assert (found.standing, found.address, found.created_ms) == (Standing.REMOVED, "https://elsewhere.example", 5)


async def test_two_nodes_cannot_have_one_key(shop: Shop, store: Store) -> None:
    """Nor can a node of our making have none; what the store refuses is said, and nothing is changed."""
    await store.nodes.save(node(1))
    for wrong in (
        msgspec.structs.replace(node(1), node_id="node_other"),
        msgspec.structs.replace(node(2), public_key=None),
        msgspec.structs.replace(node(2), public_key=b"short"),
        msgspec.structs.replace(node(2), weight=-1.0),
    ):
        with pytest.raises(StoreUnavailable):
            await store.nodes.save(wrong)
    assert [record.node_id for record in await store.nodes.all()] == [node(1).node_id]
    assert store.healthy()


async def test_nodes_that_nobody_said_yes_to_are_bounded(shop: Shop, store: Store) -> None:
    """Of those that ask no more the one that asked longest ago goes for a new one: never one that was admitted or
    removed. Where all ask still, the new one is refused.
    """
    await store.nodes.save(node(1, registered_ms=1))
    await store.nodes.save(node(2, Standing.REMOVED, registered_ms=1))
    many = [node(number, Standing.PENDING, registered_ms=number) for number in range(10, 10 + PENDING_NODES_MAX)]
    assert {one.forgotten for one in await asyncio.gather(*map(store.nodes.save, many))} == {None}
    again = await store.nodes.save(msgspec.structs.replace(many[0], registered_ms=999))
    assert (again.record.small_id, again.forgotten) == (
        3,
        None,
    )  # it is one of them: nobody goes, and it keeps its number
    saved = await store.nodes.save(node(500, Standing.PENDING, registered_ms=1_000))
    assert saved.forgotten == many[1].node_id
    for one in await store.nodes.all():
        await store.nodes.touch(one.node_id, shop.clock.unix_ms())
    with pytest.raises(Overloaded):
        await store.nodes.save(node(501, Standing.PENDING, registered_ms=shop.clock.unix_ms()))
    standings = [record.standing for record in await store.nodes.all()]
    assert standings.count(Standing.PENDING) == PENDING_NODES_MAX
    assert standings[:2] == [Standing.ADMITTED, Standing.REMOVED]


@pytest.mark.parametrize("standing", [Standing.ADMITTED, Standing.REMOVED])
async def test_a_node_that_was_admitted_is_never_deleted(shop: Shop, store: Store, standing: Standing) -> None:
    """Its receipts and payables outlive it, by the store's own rule."""
    await store.nodes.save(node(1, standing))
    with pytest.raises(refusals(), match="are kept"):
        execute(shop, "DELETE FROM nodes")
    assert len(await store.nodes.all()) == 1


async def test_how_far_a_log_was_checked_is_not_undone_by_a_change(shop: Shop, store: Store) -> None:
    """Whoever saves a node may have read it before the last receipts came."""
    await store.nodes.save(node(1))
    before = (await store.nodes.all())[0]
    assert (before.receipts_count, before.receipts_head) == (0, NO_RECEIPTS_HEAD)
    await store.nodes.note_receipts(before.node_id, 5, b"h" * 32)
    await store.nodes.save(msgspec.structs.replace(before, trusted=True))
    after = (await store.nodes.all())[0]
    assert (after.receipts_count, after.receipts_head, after.trusted) == (5, b"h" * 32, True)


# -- invites -----------------------------------------------------------------------------------------------------------


async def make_invite(shop: Shop, store: Store, invite_id: str = "i", *, lasts_ms: int = 60_000) -> None:
    await store.nodes.add_invite(invite_id, VERIFIER, "a note", shop.clock.now_ms + lasts_ms, BY)


async def test_an_invite_is_used_once_by_one_node(shop: Shop, store: Store) -> None:
    """Of many at one time exactly one gets it; that one may come again, also later, the others never."""
    await make_invite(shop, store)
    nodes = [f"node_{number}" for number in range(20)]
    assert {await store.nodes.invite("i", name) for name in nodes} == {VERIFIER}
    used = await asyncio.gather(*(store.nodes.use_invite("i", name) for name in nodes))
    assert used.count(True) == 1
    winner = nodes[used.index(True)]
    shop.clock.now_ms += 10**9
    for name in nodes:
        assert await store.nodes.invite("i", name) == (VERIFIER if name == winner else None)
        assert await store.nodes.use_invite("i", name) == (name == winner)
    [row] = await store.nodes.invites()
    assert (row.node_id, row.used_ms) == (winner, row.created_ms)


@pytest.mark.parametrize("why", ["unknown", "expired", "just expired", "revoked"])
async def test_an_invite_that_is_not_open_is_none(shop: Shop, store: Store, why: str) -> None:
    await make_invite(shop, store)
    if why == "revoked":
        assert await store.nodes.revoke_invite("i", BY)
    shop.clock.now_ms += {"expired": 60_001, "just expired": 60_000}.get(why, 0)
    asked = "another" if why == "unknown" else "i"
    assert await store.nodes.invite(asked, "node_1") is None
    assert not await store.nodes.use_invite(asked, "node_1")
    assert not await store.nodes.revoke_invite(asked, BY)
    assert (await store.nodes.invites())[0].used_ms is None


async def test_a_used_invite_is_not_revoked(shop: Shop, store: Store) -> None:
    """Its node has joined: that is ended by removing the node."""
    await make_invite(shop, store)
    assert await store.nodes.use_invite("i", "node_1")
    assert not await store.nodes.revoke_invite("i", BY)
    assert await store.nodes.invite("i", "node_1") == VERIFIER


async def test_invites_are_listed_newest_first_without_their_secret(shop: Shop, store: Store) -> None:
    for invite_id in ("a", "b", "c"):
        await make_invite(shop, store, invite_id)
        shop.clock.now_ms += 1
    rows = await store.nodes.invites()
    assert [row.invite_id for row in rows] == ["c", "b", "a"]
    assert (rows[0].note, rows[0].expires_ms - rows[0].created_ms) == ("a note", 60_000)
    assert VERIFIER not in msgspec.msgpack.encode(rows)
    with pytest.raises(StoreUnavailable):
        await make_invite(shop, store, "a")  # an id is not given twice


# -- secrets -----------------------------------------------------------------------------------------------------------


async def test_no_secret_is_in_the_files(file_shop: Shop) -> None:
    """Who steals the store, or a backup, has no session key, no token of another server, and no invite."""
    shop = file_shop
    store = await shop.open()
    await store.nodes.save(node(1, secret=SESSION))
    await make_invite(shop, store)
    target = shop.path.with_name("backup.db")
    shop.books.backup(target)
    files: list[Path] = sorted(shop.path.parent.iterdir())
    assert {"backup.db", "store.db", "store.db-wal"} <= {file.name for file in files}
    for file in files:
        assert SESSION not in file.read_bytes(), file.name
        assert VERIFIER not in file.read_bytes(), file.name
    assert (await store.nodes.all())[0].secret == SESSION
    await store.close()


@pytest.mark.parametrize(
    "move",
    [
        "UPDATE nodes SET sealed = (SELECT sealed FROM nodes WHERE small_id = 1) WHERE small_id = 2",
        "UPDATE nodes SET sealed = (SELECT sealed FROM invites WHERE invite_id = 'i') WHERE small_id = 2",
        "UPDATE nodes SET node_id = 'node_other' WHERE small_id = 2",
        "UPDATE nodes SET sealed = receipts_head WHERE small_id = 2",
    ],
)
async def test_a_secret_in_another_row_opens_nothing(shop: Shop, store: Store, move: str) -> None:
    """Who can write to the store cannot give one node another's session."""
    await store.nodes.save(node(1, secret=SESSION))
    await store.nodes.save(node(2, secret=b"another's"))
    await make_invite(shop, store)
    execute(shop, move)
    with pytest.raises(ValueError, match="something else, or was changed"):
        await store.nodes.all()


@pytest.mark.parametrize("source", ["SELECT sealed FROM invites WHERE invite_id = 'i'", "SELECT sealed FROM nodes"])
async def test_an_invite_of_another_row_opens_nothing(shop: Shop, store: Store, source: str) -> None:
    await store.nodes.save(node(1, secret=SESSION))
    await make_invite(shop, store, "i")
    await make_invite(shop, store, "j")
    execute(shop, f"UPDATE invites SET sealed = ({source}) WHERE invite_id = 'j'")
    with pytest.raises(ValueError, match="something else, or was changed"):
        await store.nodes.invite("j", "node_1")
