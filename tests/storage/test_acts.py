"""The audit: each act has its row, in the same transaction, chained to the row before; on either kind of store."""

import asyncio
import threading
from collections.abc import Awaitable
from typing import Any

import msgspec
import pytest

from embedmesh.rules.acts import ACT_VALUE_CHARS_MAX, CUT, Actor, Verb, changes_text
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.rules.membership import Standing
from embedmesh.storage.books import Books
from embedmesh.storage.books.acts import ActRow
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.books.new_keys import NewKeys
from embedmesh.storage.db import Db, refusals
from embedmesh.storage.ledger.acts import FIRST, follow_acts, link_act
from embedmesh.storage.ledger.chain import follow
from embedmesh.storage.nodes import NodeRecord
from embedmesh.storage.sql import ACTS_SQL
from embedmesh.storage.store import Store
from embedmesh.system import this_user
from tests.storage.shop import Shop, charge, secret
from tests.storage.test_books import without_defences

BY = Actor("key_operator", "192.0.2.7", "x-1")
SECRETS = ("a private name", "em_", "sealed-token")


def acts(shop: Shop, **kind: Any) -> list[ActRow]:
    return list(shop.books.acts.list(oldest_first=True, **kind))


def node(name: str, **members: Any) -> NodeRecord:
    return NodeRecord(node_id=name, kind="upstream", standing=Standing.ADMITTED, inputs_max=1, **members)


async def change(store: Store, name: str, verb: Verb, **fields: Any) -> None:
    """What an operator does to a server of another make; a new one is made."""

    def changed(kept: NodeRecord | None) -> NodeRecord:
        return msgspec.structs.replace(kept or node(name), **fields)

    await store.nodes.update(name, changed, (BY, verb))


async def everything(shop: Shop, store: Store) -> None:
    """Each act of the books and of the nodes, once."""
    books = shop.books
    books.accounts.create("b", credit_limit_nanousd=5, cache=CachePolicy.FREE)
    books.accounts.change("b", credit_limit_nanousd=9)
    shop.credit(1_000)
    paid = shop.new_hold(100)
    await store.hold(paid)
    store.capture(paid, charge(90, payable=30), None)
    await store.drain()
    books.accounts.refund(paid.hold_id, 5, "sorry")
    books.accounts.pay_out("n1", 10, "wire")
    key, _ = books.keys.create("a", ["embeddings", "keys"], name="a private name", limits=Limits(concurrency=3))
    books.keys.create_below(key.key_id, ["embeddings"], limits=key.limits)
    books.keys.change(key.key_id, name="another private name", limits=Limits(concurrency=2, models=("m",)))
    new, _ = books.keys.rotate(key.key_id, overlap_s=60)
    books.keys.revoke(new.key_id)
    books.new_keys.write(NewKeys(Limits(concurrency=1)))
    books.prices.set("m", 7)
    books.prices.set("m", 8)
    books.prices.end("m")
    await store.nodes.add_invite("invite", b"verifier", "a private name", shop.clock.now_ms + 1_000, BY)
    assert await store.nodes.revoke_invite("invite", BY)
    await change(store, "up", Verb.NODE_ADD, secret=b"sealed-token")
    await change(store, "up", Verb.NODE_WEIGHT, weight=2.0)
    await change(store, "up", Verb.NODE_REMOVE, secret=b"")


async def test_each_act_has_a_row_with_what_it_changed_and_no_secret(shop: Shop, store: Store) -> None:
    """In order, by whom it was; and the check of the ledger, which walks the audit, finds it right."""
    await everything(shop, store)
    rows = acts(shop)
    assert [row.verb for row in rows] == [
        "account.create", "account.create", "account.change", "account.credit", "request.refund", "node.payout",
        "key.create", "key.create", "key.change", "key.rotate", "key.revoke", "key.revoke", "key_defaults.change",
        "price.set", "price.set", "price.end", "invite.create", "invite.revoke", "node.add", "node.weight",
        "node.remove",
    ]  # fmt: skip
    me = this_user()
    assert {(row.actor, row.origin, row.request_id) for row in rows[:16]} == {(me.name, me.origin, "")}
    assert {(row.actor, row.origin, row.request_id) for row in rows[16:]} == {("key_operator", "192.0.2.7", "x-1")}
    assert [row.act_id for row in rows] == list(range(1, 22))
    said = {row.verb: row.changes for row in rows}
    assert said["account.change"] == {"credit_limit_nanousd": [5, 9]}
    assert said["account.credit"]["balance_nanousd"] == [0, 1_000]
    assert said["key.change"] == {"name": "changed", "concurrency": [3, 2], "models": [None, ["m"]]}
    assert rows[11].changes == {"keys_below": 2}  # the rotated one, and the one that it made
    assert rows[14].changes["price"] == [7, 8]
    assert said["price.end"]["price"] == [8, None]
    assert said["node.add"]["secret"] == [False, True]
    assert said["node.weight"] == {"weight": [1.0, 2.0]}
    assert said["node.remove"] == {"secret": [True, False]}
    with shop.by_hand() as db:
        kept = str(db.execute("SELECT * FROM acts").fetchall())
    assert not [each for each in SECRETS if each in kept]
    report = shop.books.check()
    assert report.broken == []
    assert (report.audit.acts, report.audit.hash, report.tallies["acts"]) == (21, rows[-1].hash, 21)
    assert shop.books.knew_head(rows[3].hash) and not shop.books.knew_head("11" * 32)


async def test_what_changes_nothing_makes_no_row(shop: Shop, store: Store) -> None:
    """Done before, refused, or only read."""
    key, _ = shop.books.keys.create("a", ["embeddings"])
    shop.books.accounts.credit("a", 5, "once")
    shop.books.keys.revoke(key.key_id)
    before = len(acts(shop))
    assert not shop.books.accounts.credit("a", 5, "once")
    assert not shop.books.keys.revoke(key.key_id) and not shop.books.keys.revoke("none")
    assert not shop.books.prices.end("m") and not await store.nodes.revoke_invite("none", BY)
    with pytest.raises(InvalidValue):
        shop.books.accounts.create("a")
    shop.books.new_keys.write(shop.books.new_keys.read())
    assert len(acts(shop)) == before


async def test_an_act_without_its_row_is_none(shop: Shop, store: Store) -> None:
    """Nobody acts, nothing was noted, or the row cannot be written: then nothing is changed, in books and batches."""
    key, _ = shop.books.keys.create("a", ["embeddings"])
    with Books.open(shop.place, clock=shop.clock, secret=secret, for_others=True) as books:
        with pytest.raises(AssertionError, match="an act has an actor"):
            books.keys.revoke(key.key_id)
        session = books._session
        with pytest.raises(AssertionError, match="is an act"), session.transaction():
            session.run("UPDATE keys SET revoked_ms = 1 WHERE key_id = :key_id", {"key_id": key.key_id})
        with pytest.raises(AssertionError, match="within transactions"):
            session.run("UPDATE keys SET revoked_ms = 1")
        with pytest.raises(AssertionError, match="run it"):
            session.rows("UPDATE keys SET revoked_ms = 1 RETURNING 1")
        assert books.by(BY, lambda books: books.keys.change(key.key_id, name="n")).name == "n"
    with shop.by_hand() as db:  # the next numbers are taken: no row can be written
        row = acts(shop)[-1]
        values = {"act_id": 10**6, "now_ms": 1, "changes": "{}", "hash": b"x" * 32}
        db.execute(ACTS_SQL["insert_act"], values | {name: getattr(row, name) for name in (
            "actor", "verb", "object_id", "origin", "request_id")})  # fmt: skip
    with pytest.raises(StoreUnavailable):
        shop.books.keys.revoke(key.key_id)
    with pytest.raises(StoreUnavailable):
        await change(store, "up", Verb.NODE_ADD)
    assert shop.books.keys.find(key.key_id).revoked_ms is None
    assert await store.nodes.one("up") is None
    assert (await store.nodes.save(node("other"))).record.node_id == "other"  # others' writes go on


async def test_many_actors_at_once_leave_no_gap(shop: Shop, store: Store) -> None:
    """Books of several connections and a gateway's batches: each row follows the one before, all get their turn."""
    each = 12

    def create(number: int) -> None:
        with Books.open(shop.place, clock=shop.clock, secret=secret) as books:
            for one in range(each):
                key, _ = books.keys.create("a", ["embeddings"], name=f"{number}-{one}")
                books.keys.revoke(key.key_id)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for one in range(each):
        await asyncio.gather(*(change(store, f"up-{one}-{at}", Verb.NODE_ADD) for at in range(4)))
    for thread in threads:
        await asyncio.to_thread(thread.join)
    rows = acts(shop)
    assert [row.act_id for row in rows] == list(range(1, len(rows) + 1))
    assert len(rows) == 1 + 3 * each * 2 + 4 * each
    shop.assert_right()


@pytest.mark.parametrize("broken", [False, True], ids=["at once", "one by one"])
async def test_gateways_that_act_on_the_same_nodes_in_any_order_never_fail(shop: Shop, broken: bool) -> None:
    """Nor where a batch begins again because the store refuses one of its writes: all lock in one order."""
    names = [f"up-{number}" for number in range(5)]
    stores = [await shop.open(lock_wait_s=5) for _ in range(2)]

    async def refused(store: Store) -> None:
        with pytest.raises(StoreUnavailable):
            await store._write(lambda db, now_ms: db.execute("INSERT INTO facts (name, value) VALUES ('acts', '1')"))

    for round_ in range(12):
        work: list[Awaitable[Any]] = []
        for number, store in enumerate(stores):
            for name in names if number else reversed(names):
                work.append(change(store, name, Verb.NODE_WEIGHT, weight=float(2 * round_ + number + 1)))
                work.append(store.nodes.note_receipts(name, round_, b"h" * 32))
            if broken:
                work.append(refused(store))
        await asyncio.gather(*work)
    assert [store.stats.failed_batches for store in stores] == [0, 0]
    assert [store.stats.broken_writes for store in stores] == [12 * broken] * 2
    rows = acts(shop, verb="node")
    assert [row.act_id for row in rows] == list(range(rows[0].act_id, rows[0].act_id + len(rows)))
    assert len(rows) == 12 * len(names) * 2
    shop.assert_right()
    for store in stores:
        await store.close()


def rewritten(db: Db) -> None:
    """What somebody does who knows how rows are hashed: the third never was, and everything after it fits again."""
    db.execute("DELETE FROM acts WHERE act_id = 3")
    rows = db.execute(ACTS_SQL["acts_in_order"], {"after": 0, "rows_max": 100}).fetchall()
    before = FIRST
    for number, (act_id, *columns, _) in enumerate(rows, 1):
        before = link_act(before, (number, *columns))
        values = {"act_id": act_id, "number": number, "hash": before}
        db.execute("UPDATE acts SET act_id = :number, hash = :hash WHERE act_id = :act_id", values)
    db.execute("UPDATE facts SET value = :count WHERE name = 'acts'", {"count": str(len(rows))})


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        (["UPDATE acts SET actor = 'user:nobody' WHERE act_id = 2"], "act 2 was changed"),
        (["UPDATE acts SET changes = '{}' WHERE act_id = 4"], "act 4 was changed"),
        (["DELETE FROM acts WHERE act_id = 3"], "acts 3 to 3 are missing"),
        (["DELETE FROM acts WHERE act_id < 3"], "acts 1 to 2 are missing"),
        (["DELETE FROM acts WHERE act_id > 4"], "acts after 4 are missing"),
        (["DELETE FROM acts"], "acts after 0 are missing"),
        (["UPDATE acts SET act_id = 99 WHERE act_id = 2", "UPDATE acts SET act_id = 2 WHERE act_id = 3",
          "UPDATE acts SET act_id = 3 WHERE act_id = 99"], "act 2 was changed"),
    ],
)  # fmt: skip
def test_the_check_finds_what_was_changed_taken_out_or_moved(shop: Shop, tampering: list[str], says: str) -> None:
    """And the schema refuses each of these as long as its defences are up."""
    for _ in range(5):
        shop.credit(1)
    with shop.by_hand() as db:
        for statement in tampering[:1]:
            with pytest.raises(refusals(), match="append-only"):
                db.execute(statement)
        for statement in ("DELETE FROM facts WHERE name = 'acts'", "UPDATE facts SET value = '1' WHERE name = 'acts'"):
            with pytest.raises(refusals(), match="append-only"):
                db.execute(statement)
        without_defences(db)
        for statement in tampering:
            db.execute(statement)
        assert says in str(follow_acts(db)[1])
    broken = shop.books.check().broken
    assert [each.promise for each in broken] == ["audit_holds"]


async def test_an_audit_that_was_hashed_anew_is_found_by_the_ledgers_chain(shop: Shop, store: Store) -> None:
    """Blocks cover it, so one head that was noted down proves both; and the operator's way stays open."""
    for _ in range(5):
        shop.credit(1)
    await store.extend_chain()
    with shop.by_hand() as db:
        assert follow(db)[1] is None
        without_defences(db)
        rewritten(db)
        assert follow_acts(db)[1] is None
        assert "acts up to 6, were changed" in str(follow(db)[1])
    assert shop.books.keys.create("a", ["embeddings"])[0].key_id == acts(shop)[-1].object_id


def test_acts_are_listed_by_pages_and_kind(shop: Shop) -> None:
    """Either way; a verb's first word stands for all that begin with it."""
    keys = [shop.books.keys.create("a", ["embeddings"])[0] for _ in range(3)]
    shop.clock.now_ms += 1_000
    shop.books.keys.revoke(keys[1].key_id)
    latest = shop.books.acts.list()
    assert [row.act_id for row in latest] == [5, 4, 3, 2, 1]
    assert [row.act_id for row in shop.books.acts.list(after=4, rows_max=2)] == [3, 2]
    assert [row.act_id for row in acts(shop, after=3)] == [4, 5]
    assert [row.verb for row in acts(shop, object_id=keys[1].key_id)] == ["key.create", "key.revoke"]
    assert len(acts(shop, verb="key")) == 4 and len(acts(shop, verb="key.create")) == 3 and not acts(shop, verb="ke")
    assert [row.act_id for row in acts(shop, since_ms=shop.clock.now_ms)] == [5]
    assert not acts(shop, actor="user:nobody") and len(acts(shop, actor=this_user().name)) == 5


def test_a_row_is_bounded() -> None:
    """Whatever was said: the longest value is cut, and the row stays JSON."""
    text = changes_text({"models": [None, ["m" * 200] * 64], "scopes": ("a",)})
    after = msgspec.json.decode(text)["models"][1]
    assert (len(after), after[-1]) == (ACT_VALUE_CHARS_MAX + 1, CUT)
    assert msgspec.json.decode(text)["scopes"] == ["a"]
