"""`store copy`: from a file to a server, all of it or nothing."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.batches import UnitEnd
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.rules.holds import Claim, Hold, StreamNote
from embedmesh.rules.membership import Standing
from embedmesh.rules.tabs import Tab
from embedmesh.storage.batches import BATCH_LEASE_S
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.copy import copy
from embedmesh.storage.engines import engine_of
from embedmesh.storage.ledger.open_tab import OpenTab
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.nodes import NodeRecord
from embedmesh.storage.postgres.database import PostgresEngine
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.system import this_user
from tests.storage.batching import begun, completed, new_key, results_of, work_off
from tests.storage.shop import LASTS_MS, Shop, charge
from tests.storage.test_jobs import opened
from tests.storage.test_locks import new_lock, redeem


def quiet(table: str, copied: int, total: int) -> None:
    """Nobody watches."""


async def full(shop: Shop) -> str:
    """A store with something of everything; a token of one of its keys. The sum of its locks' ids has 65 bits."""
    store = await shop.open()
    shop.credit(1_300)
    shop.books.accounts.create("b", credit_limit_nanousd=5, cache=CachePolicy.FREE)
    key, token = shop.books.keys.create(
        "a", ["embeddings"], limits=Limits(requests_a_minute=5, concurrency=3, models=("m",))
    )
    child, _ = shop.books.keys.create_below(key.key_id, ["embeddings"], limits=key.limits)
    paid, left, streams = shop.new_hold(100, child.key_id), shop.new_hold(50), shop.new_hold(60)
    await store.hold(paid, Claim(b"k" * 32, b"b" * 32))
    await store.hold(left)
    await store.hold(streams)
    await store.extend([StreamNote(streams, charge(40, payable=10), streams.deadline_ms + 1)])
    store.capture(paid, charge(90, payable=30, key_id=child.key_id), b"the reply")
    opening = OpenTab(Tab("tab_1", "a", child.key_id, shop.clock.now_ms + 1), store._opened.instance.name, 10, 10)
    store._writer.submit(opening)
    assert await opening.outcome == 10
    for lock_id in (7, 2**62, 2**62 + 1):
        terms, hold = new_lock(shop)
        await store.locks.open(msgspec.structs.replace(terms, lock_id=lock_id), hold)
    store._writer.submit(SettleRequest("tab_1", shop.new_hold(4), charge(4, key_id=child.key_id)))
    await store.drain()
    shop.books.accounts.refund(paid.hold_id, 5, "sorry")
    shop.books.accounts.pay_out("n1", 10, "paid")
    shop.books.prices.set("m", 7)
    shop.books.prices.set("m", 9, meter="output")
    caller = await store.keys.find(token)
    assert caller is not None
    await store.rate_limits.take_request(caller)
    await store.slots.take(caller, shop.clock.now_ms + LASTS_MS)
    record = NodeRecord(node_id="n1", standing=Standing.ADMITTED, public_key=bytes(32), inputs_max=1, secret=b"session")
    await store.nodes.save(record)
    await store.nodes.add_invite("i", b"verifier", "note", shop.clock.now_ms + 1, this_user())
    lease, units = await begun(store, shop, key.key_id)
    await work_off(store, lease, units[:1], key.key_id, failing=1)
    await (await opened(store, shop, 20, key_id=key.key_id)).pay(store, "one")
    await store.extend_chain()
    await store.close()
    with shop.by_hand() as db:  # as if another gateway had died
        db.execute("INSERT INTO slots VALUES (:key_id, 'gw_dead', 1, 1, 0)", {"key_id": key.key_id})
    return token


async def test_all_of_it_is_there_and_goes_on(file_shop: Shop, database: str) -> None:
    """Money, keys, nodes with their secrets, kept replies, the chain; the next transfer, price and hold are taken."""
    shop = file_shop
    token = await full(shop)
    before = shop.books.check()
    copied = await copy(SqliteEngine(shop.path), PostgresEngine(database), quiet)
    with shop.by_hand() as db:
        find = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
        tables = {name for (name,) in db.execute(find).fetchall()}
    assert set(copied.rows) == tables and all(copied.rows.values())
    assert copied.head == before.head.hash
    moved = Shop(shop.folder.parent, database, new=False)
    assert moved.money() == shop.money() == (1_181, 456)
    assert moved.books.accounts.list() == shop.books.accounts.list()
    assert moved.books.accounts.find("b").cache is CachePolicy.FREE
    assert moved.books.keys.list() == shop.books.keys.list()
    assert moved.books.prices.list() == shop.books.prices.list()
    assert moved.books.reports.explain_tab("tab_1") == shop.books.reports.explain_tab("tab_1")
    entries = shop.books.reports.entries("a")
    assert moved.books.reports.entries("a") == entries
    (settled,) = [each.entry_id for each in entries if each.tab_id == "tab_1" and each.requests]
    (request,) = moved.books.reports.charged_requests("a", settled)
    assert shop.books.reports.charged_requests("a", settled) == [request]
    assert moved.books.reports.explain(request.request_id) == shop.books.reports.explain(request.request_id)
    assert shop.books.reports.explain("7") == moved.books.reports.explain("7")
    store = await moved.open()
    stats = store.stats  # the same data directory: it is the same gateway
    assert stats.recovered == stats.captured_at_notes == stats.tabs_recovered == 1
    assert await store.keys.find(token) is not None
    [record] = await store.nodes.all()
    assert record.secret == b"session"
    prior = await store.prior_request(moved.new_hold(1), Claim(b"k" * 32, b"b" * 32))
    assert prior is not None and prior.reply == b"the reply"
    assert isinstance(await redeem(moved, store, (await store.locks.find("a", 7)).terms), Hold)
    moved.books.accounts.credit("a", 1, "after")
    moved.books.prices.set("m", 8)
    assert await store.extend_chain() == 3  # the credit, and what was noted of the stream with its node's part
    await store.close()
    moved.assert_right()
    moved.books.close()


async def test_a_store_in_use_is_not_copied(file_shop: Shop, database: str) -> None:
    store = await file_shop.open()
    with pytest.raises(InvalidValue, match="stop it first"):
        await copy(SqliteEngine(file_shop.path), PostgresEngine(database), quiet)
    await store.close()


async def test_a_database_with_accounts_is_not_written_over(file_shop: Shop, database: str) -> None:
    await full(file_shop)
    target = Shop(file_shop.folder.parent / "other", database)
    target.books.close()
    with pytest.raises(InvalidValue, match="has accounts already"):
        await copy(SqliteEngine(file_shop.path), PostgresEngine(database), quiet)


async def test_there_must_be_a_store(file_shop: Shop, database: str) -> None:
    with pytest.raises(InvalidValue, match="There is no store"):
        await copy(SqliteEngine(file_shop.folder / "none.db"), PostgresEngine(database), quiet)


@pytest.mark.parametrize(
    ("breaking", "says", "failure"),
    [
        ("UPDATE accounts SET balance = balance + 1 WHERE account_id = 'a'", "old store is not right", InvalidValue),
        ("UPDATE keys SET scopes = 'a' || char(0)", "did not take it", StoreUnavailable),
    ],
)
async def test_a_store_that_is_not_right_is_not_copied(
    file_shop: Shop, database: str, breaking: str, says: str, failure: type[Exception]
) -> None:
    """Nothing is left of the attempt."""
    await full(file_shop)
    with file_shop.by_hand() as db:
        db.execute(breaking)
    with pytest.raises(failure, match=says):
        await copy(SqliteEngine(file_shop.path), PostgresEngine(database), quiet)
    db = engine_of(database).connect(busy_s=1)
    rows: Any = db.execute("SELECT count(*) FROM accounts WHERE kind = 'customer'").fetchall()
    assert rows == [(0,)]
    db.close()


async def test_a_batch_goes_on_in_the_copy(file_shop: Shop, database: str, tmp_path: Path) -> None:
    """With its units, its money and its file; once its lease in the old store would have passed."""
    shop = file_shop
    store = await shop.open()
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id)
    await work_off(store, lease, units[:1], key_id)
    await store.close()
    await copy(SqliteEngine(shop.path), PostgresEngine(database), quiet)
    moved = Shop(tmp_path / "moved", database, new=False)
    moved.clock.now_ms += int(BATCH_LEASE_S * 1000) + 1
    store = await moved.open()
    taken = await store.batches.lease()
    assert taken is not None
    assert await store.batches.open_units(taken[0], limit=10) == units[1:]
    assert await store.batches.finish_unit(taken[0], results_of(units[1], key_id)) is UnitEnd.DONE
    assert (await completed(store, moved, taken[0])).completed == 5
    assert moved.money() == (950, 0)
    moved.assert_right()
    await store.close()
    moved.books.close()
