"""Migrations: a store becomes one of this version, or is refused in one line and left untouched."""

from pathlib import Path
from typing import Any

import pytest

from bench.rig.postgres import PostgresServer
from embedmesh.rules.errors import SetupError
from embedmesh.storage.books import Books
from embedmesh.storage.engines import engine_of
from embedmesh.storage.migrate import migrate, newest
from embedmesh.storage.sql import migrations
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.store import Store
from tests.storage.shop import HandClock, secret

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
