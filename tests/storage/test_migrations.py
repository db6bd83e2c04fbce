"""Migrations: a store of any version that was ever released becomes one of this version, its ledger as it was."""

from pathlib import Path

import pytest

from bench.rig.postgres import PostgresServer
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import SetupError
from embedmesh.storage.books import Books
from embedmesh.storage.db import refusals
from embedmesh.storage.engines import engine_of
from embedmesh.storage.migrate import migrate, newest
from embedmesh.storage.sql import migrations
from embedmesh.storage.sqlite.database import SqliteEngine
from tests.storage.shop import HandClock, Shop, charge, secret

SCRIPTS = migrations("sqlite")
TRADE = """
INSERT INTO accounts (account_id, kind, created_ms) VALUES ('a', 'customer', 1), ('node:n1', 'node', 2);
INSERT INTO transfers (kind, source_id, target_id, amount, reference, created_ms)
VALUES ('credit', 'credit_source', 'a', 1000, 'payment', 3);
INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms)
VALUES ('key_1', 'a', 'laptop', zeroblob(32), 'embeddings', 4);
INSERT INTO holds (hold_id, account_id, amount, owner, created_ms, deadline_ms)
VALUES ('paid', 'a', 100, 'gw', 5, 9), ('released', 'a', 100, 'gw', 5, 9), ('left', 'a', 100, 'gw', 5, 9);
UPDATE holds SET state = 'captured', ended_by = 'capture', captured = 90, ended_ms = 6 WHERE hold_id = 'paid';
UPDATE holds SET state = 'released', ended_by = 'release', ended_ms = 6 WHERE hold_id = 'released';
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)
VALUES ('charge', 'a', 'revenue', 90, 'paid', 6), ('payable', 'revenue', 'node:n1', 30, 'paid', 6);
INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, cost, payable, user_hash, day)
VALUES ('paid', 'a', 'key_1', 'm', 'n1', 7, 90, 30, NULL, 0);
"""


@pytest.fixture(params=sorted(SCRIPTS)[:-1])
def old(request: pytest.FixtureRequest, file_shop: Shop, tmp_path: Path) -> Shop:
    """A store of an earlier version: it has a key, captured, released and open holds, and a payable."""
    file_shop.path = file_shop.place = tmp_path / f"version {request.param}" / "store.db"
    engine = SqliteEngine(file_shop.path)
    db = engine.connect(busy_s=1)
    migrate(engine, db, {version: script for version, script in SCRIPTS.items() if version <= request.param})
    db.connection.executescript(TRADE)
    assert engine.version(db) == request.param
    db.close()
    return file_shop


async def test_a_gateway_brings_an_older_store_to_this_version(old: Shop) -> None:
    """By its start alone. Money, keys and every promise are as before; the open hold is recovered."""
    with pytest.raises(SetupError, match="embedmesh store migrate"):
        Books.open(old.place, clock=old.clock, secret=secret)
    store = await old.open()
    assert store.stats.recovered == 1
    with Books.open(old.place, clock=old.clock, secret=secret) as old.books:
        assert old.money() == (910, 0)
        assert [key.key_id for key in old.books.keys.list()] == ["key_1"]
        balances = {one.account_id: one.balance_nanousd for one in old.books.accounts.list()}
        assert balances == {"a": 910, "node:n1": 30, "revenue": 60, "credit_source": -1_000, "payouts": 0}
        [used] = old.books.reports.usage("a", 0, 10)
        assert (used.requests, used.tokens, used.cost) == (1, 7, 90)
        assert {one.cache for one in old.books.accounts.list()} == {CachePolicy.OFF}
        assert await store.extend_chain() == 3
        old.assert_right()
        hold = old.new_hold(10)
        await store.hold(hold)
        store.capture(hold, charge(10, payable=10))
        await store.close()
        assert old.money() == (900, 0)
        old.assert_right()


async def test_what_was_captured_before_cannot_be_charged_again_after(old: Shop) -> None:
    """The rules that the migration made anew hold for old rows too."""
    await (await old.open()).close()
    with old.by_hand() as db:
        for columns in ("target_id, amount", "'credit_source', amount"):
            with pytest.raises(refusals()):
                db.execute(
                    "INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)"
                    f" SELECT kind, source_id, {columns}, hold_id, 1 FROM transfers WHERE kind = 'charge'"
                )
        with pytest.raises(refusals()):
            db.execute(
                "INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms)"
                " SELECT kind, source_id, target_id, 0, hold_id, 1 FROM transfers WHERE kind = 'payable'"
            )


def test_the_scripts_run_on_an_empty_store_and_once(tmp_path: Path) -> None:
    """Twice is as once."""
    engine = SqliteEngine(tmp_path / "x.db")
    db = engine.connect(busy_s=1)
    migrate(engine, db)
    find = "SELECT name, sql FROM sqlite_schema ORDER BY name"
    schema = db.execute(find).fetchall()
    migrate(engine, db)
    assert db.execute(find).fetchall() == schema
    assert engine.version(db) == newest(engine)
    db.close()


def test_a_script_runs_whole_or_not_at_all(tmp_path: Path) -> None:
    """One that fails half-way leaves the store at the version before it."""
    engine = SqliteEngine(tmp_path / "x.db")
    db = engine.connect(busy_s=1)
    with pytest.raises(SetupError, match="already exists"):
        migrate(engine, db, {1: "CREATE TABLE a (x);", 2: "CREATE TABLE b (x);\nCREATE TABLE a (x);"})
    assert db.execute("SELECT name FROM sqlite_schema").fetchall() == [("a",)]
    assert engine.version(db) == 1
    for _ in range(2):
        migrate(engine, db, {1: "no", 2: "CREATE TABLE b (x);", 3: "INSERT INTO b VALUES (1);"})
    assert db.execute("SELECT x FROM b").fetchall() == [(1,)]
    db.close()


def test_a_script_that_breaks_references_is_refused(tmp_path: Path) -> None:
    """Foreign keys are off while tables are made anew: what is left is looked at."""
    engine = SqliteEngine(tmp_path / "x.db")
    db = engine.connect(busy_s=1)
    broken = "CREATE TABLE a (x PRIMARY KEY);\nCREATE TABLE b (y REFERENCES a);\nINSERT INTO b VALUES (1);"
    with pytest.raises(SetupError, match="refers to none"):
        migrate(engine, db, {1: broken})
    assert engine.version(db) == 0
    db.close()


def test_a_script_of_postgresql_runs_whole_or_not_at_all(postgres: PostgresServer) -> None:
    """The same there."""
    engine = engine_of(postgres.new())
    db = engine.connect(busy_s=1)
    scripts = migrations("postgres")
    known = max(scripts)
    with pytest.raises(SetupError, match="already exists"):
        migrate(engine, db, {**scripts, known + 1: "CREATE TABLE b (x INT); CREATE TABLE accounts (x INT);"})
    assert engine.version(db) == known
    migrate(engine, db, {known: "no", known + 1: "CREATE TABLE b (x INT);"})
    assert engine.version(db) == known + 1
    with pytest.raises(SetupError, match="newer embedmesh"):
        migrate(engine, db)
    db.close()


@pytest.mark.parametrize("version", sorted(migrations("postgres"))[:-1])
def test_an_older_store_of_postgresql_keeps_what_it_has(postgres: PostgresServer, version: int) -> None:
    """Money, keys and every promise are as before; answers come from no cache."""
    engine = engine_of(url := postgres.new())
    db = engine.connect(busy_s=1)
    scripts = migrations("postgres")
    migrate(engine, db, {number: script for number, script in scripts.items() if number <= version})
    db.connection.execute(TRADE.replace("zeroblob(32)", "decode(repeat('00', 32), 'hex')"))
    db.close()
    with pytest.raises(SetupError, match="embedmesh store migrate"):
        Books.open(url, clock=HandClock(), secret=secret)
    with Books.open(url, clock=HandClock(), secret=secret, migrating=True) as books:
        found = {one.account_id: (one.balance_nanousd, one.held_nanousd, one.cache) for one in books.accounts.list()}
        assert found["a"] == (910, 100, CachePolicy.OFF) and found["node:n1"] == (30, 0, CachePolicy.OFF)
        assert [key.key_id for key in books.keys.list()] == ["key_1"]
        assert books.check().broken == []
        assert books.accounts.set_cache("a", CachePolicy.FREE).cache is CachePolicy.FREE
    postgres.drop(url)


def test_both_kinds_of_stores_have_the_same_tables(shop: Shop, tmp_path: Path, database: str) -> None:
    """Name by name, column by column: statements and `store copy` rely on it."""
    found = []
    for place in (tmp_path / "y.db", database):
        engine = engine_of(place)
        db = engine.connect(busy_s=1)
        migrate(engine, db)
        if engine.dialect == "sqlite":
            tables = "SELECT name FROM sqlite_schema WHERE type = 'table' AND name NOT LIKE 'sqlite%'"
            columns = "SELECT name FROM pragma_table_info('{}')"
        else:
            tables = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public' :: regnamespace"
            columns = "SELECT column_name FROM information_schema.columns WHERE table_name = '{}'"
        names = sorted(name for (name,) in db.execute(tables).fetchall())
        found.append({name: sorted(c for (c,) in db.execute(columns.format(name)).fetchall()) for name in names})
        db.close()
    assert found[0] == found[1]
