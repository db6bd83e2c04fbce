"""Migration 0002: a store of version 1 becomes one of version 2, its ledger as it was; a hold pays several nodes."""

import asyncio
from pathlib import Path

import msgspec
import pysqlite3.dbapi2 as driver
import pytest

from embedmesh.rules.errors import SetupError
from embedmesh.rules.holds import Charge, Payable
from embedmesh.storage.books import Books
from embedmesh.storage.connect import connect, migrate
from embedmesh.storage.sql import migrations
from embedmesh.storage.sqlite import SqliteStore
from tests.storage.shop import SECRET, Shop, charge


def version(path: Path) -> int:
    db = connect(path, busy_s=1)
    found: int = db.execute("PRAGMA user_version").fetchone()[0]
    db.close()
    return found


@pytest.fixture
async def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """A store that only ever saw the first script: it has keys, captured, released and open holds, and a payable."""
    with monkeypatch.context() as earlier:
        earlier.setattr("embedmesh.storage.connect.migrations", lambda: migrations()[:1])
        shop = Shop(tmp_path)
        shop.credit(1_000)
        shop.books.create_key("a", ["embeddings"])
        store = await shop.open()
        paid, released, left = (shop.new_hold(100) for _ in range(3))
        for hold in (paid, released, left):
            await store.hold(hold)
        store.capture(paid, charge(90, payable=30))
        store.release(released)
        assert await store.drain() == 0
        await store.close()
    assert version(shop.path) == 1
    return shop


async def test_a_store_of_version_1_is_brought_to_version_2(old: Shop) -> None:
    """By the gateway's start alone. Money, keys and every promise are as before; the open hold is recovered."""
    money, keys, accounts = old.money(), old.books.list_keys(), old.books.accounts()
    assert money == (910, 100)
    with pytest.raises(SetupError, match="restart `embedmesh serve`"):
        Books.open(old.path, clock=old.clock, key_secret=SECRET)
    assert version(old.path) == 1
    store = await old.open()
    assert version(old.path) == 2 == len(migrations())
    assert store.stats.recovered == 1
    assert old.money() == (910, 0)
    assert old.books.list_keys() == keys
    assert [(one.account_id, one.balance_nanousd) for one in old.books.accounts()] == [
        (one.account_id, one.balance_nanousd) for one in accounts
    ]
    old.assert_right()
    assert store.nodes.all() == []
    hold = old.new_hold(10)
    await store.hold(hold)
    store.capture(hold, charge(10, payable=10))
    await store.close()
    assert old.money() == (900, 0)
    old.assert_right()
    old.books.close()


async def test_what_was_captured_before_cannot_be_charged_again_after(old: Shop) -> None:
    """The rules that the migration made anew hold for old rows too."""
    await (await old.open()).close()
    db = connect(old.path, busy_s=1)
    for statement in (
        "INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)"
        " SELECT kind, source_id, target_id, amount, hold_id, 1 FROM transfers WHERE kind = 'charge'",
        "INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)"
        " SELECT kind, source_id, 'credit_source', amount, hold_id, 1 FROM transfers WHERE kind = 'charge'",
        "INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)"
        " SELECT kind, source_id, target_id, 0, hold_id, 1 FROM transfers WHERE kind = 'payable'",
    ):
        with pytest.raises(driver.IntegrityError):
            db.execute(statement)
    db.close()
    old.assert_right()
    old.books.close()


def test_the_scripts_run_on_an_empty_file_and_once(tmp_path: Path) -> None:
    db = connect(tmp_path / "x.db", busy_s=1)
    migrate(db, tmp_path)
    schema = db.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
    migrate(db, tmp_path)
    assert db.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall() == schema
    assert {"nodes", "invites"} <= {name for name, _ in schema}
    db.close()


def split(cost: int, *payables: Payable) -> Charge:
    return msgspec.structs.replace(charge(cost), payables=payables)


@pytest.mark.parametrize(
    ("payables", "taken"),
    [
        ((Payable("n1", 30), Payable("n1", 30)), False),  # one node twice
        ((Payable("n1", 30), Payable("n2", 10), Payable("n1", 1)), False),
        ((Payable("n1", 60), Payable("n2", 41)), False),  # together more than the caller pays
        ((Payable("n1", 30), Payable("n2", 30)), True),
        ((Payable("n1", 0), Payable("n2", 100)), True),
    ],
)
async def test_a_hold_pays_each_node_once(
    shop: Shop, store: SqliteStore, payables: tuple[Payable, ...], taken: bool
) -> None:
    """Several nodes may have a share of one request, one share each; what is refused leaves the hold as it was."""
    shop.credit(1_000)
    hold = shop.new_hold(100)
    await store.hold(hold)
    store.capture(hold, split(100, *payables))
    await store.drain()
    balances = {one.account_id: one.balance_nanousd for one in shop.books.accounts()}
    if taken:
        assert balances == {
            "a": 900,
            "credit_source": -1_000,
            "revenue": 100 - sum(each.nanousd for each in payables),
            **{f"node:{each.node_id}": each.nanousd for each in payables},
        }
    else:
        assert shop.money() == (1_000, 100)
        assert store.stats.broken_writes == 1
    shop.assert_right()


async def test_many_holds_pay_the_same_two_nodes(shop: Shop, store: SqliteStore) -> None:
    """Once a hold is not once a node."""
    shop.credit(1_000)
    holds = [shop.new_hold(10) for _ in range(20)]
    await asyncio.gather(*map(store.hold, holds))
    for hold in holds:
        store.capture(hold, split(10, Payable("n1", 3), Payable("n2", 4)))
    await store.drain()
    balances = {one.account_id: one.balance_nanousd for one in shop.books.accounts()}
    assert (balances["node:n1"], balances["node:n2"], balances["revenue"]) == (60, 80, 60)
    shop.assert_right()
