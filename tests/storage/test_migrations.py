"""Migrations: a store becomes one of this version, or is refused in one line and left untouched."""

from pathlib import Path
from typing import Any

import pytest

from bench.rig.postgres import PostgresServer
from embedmesh.rules.errors import SetupError
from embedmesh.storage.books import Books
from embedmesh.storage.db import refusals
from embedmesh.storage.engines import engine_of
from embedmesh.storage.ledger.chain import START, link
from embedmesh.storage.ledger.check import check
from embedmesh.storage.ledger.lost_holds import note_text
from embedmesh.storage.migrate import migrate, newest
from embedmesh.storage.sql import migrations
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.store import Store
from tests.storage.shop import HandClock, charge, secret

OLD = "of a program before the first release.*untouched.*another --data-dir.*EMBEDMESH_STORE"


@pytest.mark.parametrize("version", [1, 5, 99])
async def test_a_file_of_a_program_before_the_first_release_is_left_untouched(tmp_path: Path, version: int) -> None:
    """Neither the books, nor `store migrate`, nor a gateway change a byte of it; each says what to do."""
    path = tmp_path / "store.db"
    db = SqliteEngine(path).connect(busy_s=1)
    db.connection.executescript(f"CREATE TABLE accounts (x); PRAGMA user_version = {version};")
    db.close()
    before = path.read_bytes()
    for migrating in (False, True):
        with pytest.raises(SetupError, match=f"has version {version}, {OLD}"):
            Books.open(path, clock=HandClock(), secret=secret, migrating=migrating)
    with pytest.raises(SetupError, match=OLD):
        await Store.open(path, folder=tmp_path, clock=HandClock(), secret=secret)
    assert path.read_bytes() == before
    assert not (tmp_path / "store.db-wal").exists()


@pytest.mark.parametrize("version", [3, 5, 99])
async def test_a_database_of_a_program_before_the_first_release_is_left_untouched(
    postgres: PostgresServer, tmp_path: Path, version: int
) -> None:
    """The same on a server."""
    url = postgres.new()
    db = engine_of(url).connect(busy_s=1)
    db.execute("CREATE TABLE facts (name TEXT PRIMARY KEY, value TEXT NOT NULL)")
    db.execute("INSERT INTO facts VALUES ('schema_version', :version)", {"version": str(version)})
    for migrating in (False, True):
        with pytest.raises(SetupError, match=f"has version {version}, {OLD}"):
            Books.open(url, clock=HandClock(), secret=secret, migrating=migrating)
    with pytest.raises(SetupError, match=OLD):
        await Store.open(url, folder=tmp_path, clock=HandClock(), secret=secret)
    assert db.execute("SELECT name, value FROM facts").fetchall() == [("schema_version", str(version))]
    assert db.execute(
        "SELECT count(*) FROM pg_class WHERE relnamespace = 'public' :: regnamespace AND relkind = 'r'"
    ).fetchall() == [(1,)]
    db.close()
    postgres.drop(url)


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
    with pytest.raises(SetupError, match="refers to a missing row"):
        migrate(engine, db, {1: broken})
    assert engine.version(db) == 0
    db.close()


def test_a_script_of_postgresql_runs_whole_or_not_at_all(postgres: PostgresServer) -> None:
    """The same there."""
    engine = engine_of(postgres.new())
    db: Any = engine.connect(busy_s=1)
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


OLD_BLOCK = "INSERT INTO blocks VALUES (:last_transfer, :transfers, :hash, :now_ms)"
BEFORE_TABS = """
INSERT INTO accounts (account_id, kind, created_ms) VALUES ('a', 'customer', 0), ('node:n1', 'node', 0);
INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms)
VALUES ('k', 'a', '', HASH, 'embeddings', 0);
INSERT INTO transfers (kind, source_id, target_id, amount, reference, created_ms)
VALUES ('credit', 'credit_source', 'a', 1000, 'payment', 1);
INSERT INTO holds (hold_id, account_id, key_id, amount, owner, created_ms, deadline_ms)
VALUES ('req_1', 'a', 'k', 100, 'me', 2, 9), ('req_2', 'a', 'k', 50, 'me', 2, 9);
UPDATE holds SET state = 'captured', ended_by = 'capture', captured = 80, ended_ms = 3 WHERE hold_id = 'req_1';
INSERT INTO transfers (kind, source_id, target_id, amount, hold_id, created_ms) VALUES
('charge', 'a', 'revenue', 80, 'req_1', 3), ('payable', 'revenue', 'node:n1', 30, 'req_1', 3);
INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, price, cost, payable, day)
VALUES ('req_1', 'a', 'k', 'm', 'n1', 7, 5, 80, 30, 0);
"""


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_store_from_before_tabs_keeps_all_that_it_had(kind: str, tmp_path: Path, postgres: PostgresServer) -> None:
    """Every row, every sum and the chain: and whatever it refused before, it refuses still."""
    engine = engine_of(tmp_path / "x.db" if kind == "sqlite" else postgres.new())
    db = engine.connect(busy_s=1)
    scripts = migrations(kind)
    migrate(engine, db, {100: scripts[100]})
    hash_ = "randomblob(32)" if kind == "sqlite" else "sha256('k')"
    for statement in BEFORE_TABS.replace("HASH", hash_).split(";\n"):
        db.execute(statement)
    rows = db.execute(
        "SELECT transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms FROM transfers "
        "ORDER BY transfer_id"
    ).fetchall()
    block = {
        "last_transfer": rows[-1][0],
        "transfers": 3,
        "hash": link(START, rows),
        "now_ms": 4,
    }
    db.execute(OLD_BLOCK, block)
    kept = "SELECT * FROM transfers ORDER BY transfer_id", "SELECT * FROM usage", "SELECT * FROM entries ORDER BY 1, 2"
    before = [[tuple(row) for row in db.execute(table).fetchall()] for table in kept]
    migrate(engine, db)
    after = [[tuple(row) for row in db.execute(table).fetchall()] for table in kept]
    assert [
        [row[: len(was)] for row, was in zip(*tables, strict=True)] for tables in zip(after, before, strict=True)
    ] == before
    report = check(db)
    assert report.broken == []
    assert (report.head.transfers, report.tallies["holds_open"]) == (3, 1)
    refused = "DELETE FROM transfers", "UPDATE usage SET cost = 0", "UPDATE entries SET amount = 0", "DELETE FROM usage"
    for tampering in refused:
        with pytest.raises(refusals(), match=r"append-only|kept until"):
            db.execute(tampering)
    db.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_keys_that_were_rotated_before_places_have_one_place(
    kind: str, tmp_path: Path, postgres: PostgresServer
) -> None:
    """The first key's, however often it was rotated; a key that never was has its own."""
    engine = engine_of(tmp_path / "x.db" if kind == "sqlite" else postgres.new())
    db = engine.connect(busy_s=1)
    migrate(engine, db, {100: migrations(kind)[100]})
    db.execute("INSERT INTO accounts (account_id, kind, created_ms) VALUES ('a', 'customer', 0)")
    for number, rotated_to in enumerate(("k2", "k3", None, None), start=1):
        hash_ = "randomblob(32)" if kind == "sqlite" else f"sha256('k{number}')"
        db.execute(
            "INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms, rotated_to) "
            f"VALUES ('k{number}', 'a', '', {hash_}, 'embeddings', 0, :rotated_to)",
            {"rotated_to": rotated_to},
        )
    migrate(engine, db)
    places = db.execute("SELECT key_id, place_id FROM keys ORDER BY key_id").fetchall()
    assert places == [("k1", None), ("k2", "k1"), ("k3", "k1"), ("k4", None)]
    db.close()


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
async def test_a_store_from_before_notes_has_them_now(kind: str, tmp_path: Path, postgres: PostgresServer) -> None:
    """Holds that were open are captured at notes as others are, what has ended stays, and prices are those of input."""
    place = tmp_path / "x.db" if kind == "sqlite" else postgres.new()
    engine = engine_of(place)
    db = engine.connect(busy_s=1)
    scripts = migrations(kind)
    migrate(engine, db, {number: script for number, script in scripts.items() if number < 104})
    hash_ = "randomblob(32)" if kind == "sqlite" else "sha256('k')"
    for statement in BEFORE_TABS.replace("HASH", hash_).split(";\n"):
        db.execute(statement)
    db.execute("INSERT INTO prices (model, price, from_ms, created_ms) VALUES ('m', 7, 0, 0)")
    before = db.execute("SELECT * FROM holds ORDER BY hold_id").fetchall()
    migrate(engine, db)
    assert db.execute("SELECT * FROM holds ORDER BY hold_id").fetchall() == before
    assert db.execute("SELECT meter, price FROM prices").fetchall() == [("input", 7)]
    for tampering in ("UPDATE prices SET meter = 'output'", "UPDATE prices SET price = 1"):
        with pytest.raises(refusals(), match="only ends"):
            db.execute(tampering)
    with pytest.raises(refusals()):
        db.execute("INSERT INTO prices (model, meter, price, from_ms, created_ms) VALUES ('m', 'smoke', 7, 0, 0)")
    for meter in ("searches", "images:8x8"):
        db.execute(f"INSERT INTO prices (model, meter, price, from_ms, created_ms) VALUES ('m', '{meter}', 7, 0, 0)")
    note = {"charge": note_text(charge(40, payable=10, key_id="k"))}
    db.execute("INSERT INTO hold_notes (hold_id, cost, charge, noted_ms) VALUES ('req_2', 40, :charge, 5)", note)
    if kind == "sqlite":
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    store = await Store.open(place, folder=tmp_path, clock=HandClock(), secret=secret)
    await store.expire(10**15)
    assert store.stats.captured_at_notes == 1
    await store.close()
    report = check(db)
    assert report.broken == [] and report.tallies["holds_captured_at_notes"] == 1
    ended = db.execute("SELECT ended_by, captured FROM holds ORDER BY hold_id").fetchall()
    assert [ended[0], ended[1][1]] == [("capture", 80), 40]
    db.close()


def test_both_kinds_of_stores_have_the_same_tables(tmp_path: Path, database: str) -> None:
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
