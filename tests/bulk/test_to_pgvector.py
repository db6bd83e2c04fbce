"""Units in a real PostgreSQL with pgvector: each row once, in any table that is there, whichever process dies."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest

from bench.rig.postgres import PostgresServer
from embedmesh.bulk.stops import NothingListens
from embedmesh.bulk.to_pgvector import PgvectorSink
from embedmesh.bulk.usage import WrongUsage
from tests.bulk.sink_tables import table_of, write

HOW_TO = (Path(__file__).parent.parent.parent / "docs" / "how-to" / "sinks.md").read_text("utf-8")
SENTINEL = "a value that nobody else may see"
TABLE = "CREATE TABLE docs (id text PRIMARY KEY, embedding vector(4))"


@pytest.fixture
def empty(postgres: PostgresServer) -> Iterator[str]:
    """The address of a database with nothing in it."""
    url = postgres.new()
    yield url
    postgres.drop(url)


@pytest.fixture
def db(empty: str) -> Iterator[psycopg.Connection[Any]]:
    """A session in a database with pgvector."""
    with psycopg.connect(empty, autocommit=True) as session:
        session.execute("CREATE EXTENSION vector")
        yield session


def sink_of(url: str, parameters: str = "table=docs") -> PgvectorSink:
    return PgvectorSink(f"{url}&{parameters}" if "?" in url else f"{url}?{parameters}")


def rows_in(db: psycopg.Connection[Any], what: str = "id, embedding::real[]", table: str = "docs") -> dict[Any, Any]:
    found = db.execute(f"SELECT {what} FROM {table}").fetchall()
    assert len({row[0] for row in found}) == len(found)
    return {row[0]: row[1] if len(row) == 2 else row[1:] for row in found}


def test_rows_are_there_once_bit_by_bit(empty: str, db: psycopg.Connection[Any]) -> None:
    """A missing table is made; a unit that comes twice changes nothing; one with other vectors replaces them."""
    unit = table_of("b", "a", 7, "gone", None, title=["x", "nul \0", None, {"n": float("nan")}, 2**70])
    unit.errors[3] = "context_length_exceeded: too long"
    sink = sink_of(empty)
    sink.begin(resumed=False, overwrite=False, width=4)
    assert db.execute("SELECT to_regclass('docs')").fetchone() == (None,)
    for _ in range(2):
        write(sink, unit)
        found = rows_in(db, "id, embedding::real[], error, metadata->'title'")
        assert found.keys() == {"a", "b", "7", "gone"}
        for row, key in enumerate(("b", "a", "7")):
            assert np.array(found[key][0], np.float32).tobytes() == unit.vectors[row].tobytes()
            assert found[key][1] is None
        assert found["gone"][:2] == (None, "context_length_exceeded: too long")
        assert [found[key][2] for key in ("b", "a", "7", "gone")] == ["x", "nul \ufffd", None, {"n": None}]
    other = table_of("a", "new", "a", seed=1)
    write(sink, other)
    found = rows_in(db)
    assert found.keys() == {"a", "b", "7", "gone", "new"}
    assert np.array(found["a"], np.float32).tobytes() == other.vectors[2].tobytes()  # the last of the two


def test_a_table_of_ones_own_is_filled_in(empty: str, db: psycopg.Connection[Any]) -> None:
    """Its names and types are respected, whatever is in a name; rows that are there keep their other columns."""
    db.execute("CREATE SCHEMA shop")
    db.execute(
        """CREATE TABLE shop."d""ocs'; --" (doc_id bigint UNIQUE, body text NOT NULL, vec halfvec(4) NOT NULL
        DEFAULT '[0,0,0,0]', price numeric(9, 2), tags jsonb, made timestamptz, lower text GENERATED ALWAYS AS
        (lower(body)) STORED)"""
    )
    table = """shop."d""ocs'; --\""""
    db.execute(f"INSERT INTO {table} (doc_id, body) SELECT n, 'Body ' || n FROM generate_series(1, 3) AS n")
    sink = sink_of(empty, "table=shop.d%22ocs%27;%20--&id=doc_id&embedding=vec")
    sink.begin(resumed=False, overwrite=False, width=4)
    columns: dict[str, Any] = {
        "price": ["1.50", 2],
        "tags": [["a"], None],
        "made": ["2026-11-30T12:00:00Z", None],
        "lower": ["l", "m"],
    }
    unit = table_of(1, "2", **columns, elsewhere=[1, 2])
    write(sink, unit)
    found = rows_in(
        db, "doc_id, vec::real[], body, price::text, tags, extract(hour from made at time zone 'utc')", table
    )
    assert found[3] == ([0, 0, 0, 0], "Body 3", None, None, None)
    assert found[1][1:] == ("Body 1", "1.50", ["a"], 12)
    assert np.array_equal(np.float32(found[2][0]), np.float16(unit.vectors[1]))
    refused = table_of(1, 3)
    refused.errors[0] = "context_length_exceeded: too long"
    write(sink, refused)  # `vec` must not be null: what was refused is left out
    assert rows_in(db, "doc_id, vec::real[]", table)[1] == found[1][0]
    with pytest.raises(WrongUsage, match='null value in column "body"') as caught:
        write(sink, table_of(3, 4, tags=[None, SENTINEL]))
    assert SENTINEL not in str(caught.value) and len(rows_in(db, "doc_id, body", table)) == 3


WRONG_TABLES = {
    "DROP EXTENSION vector": "CREATE EXTENSION vector;$",
    "CREATE TABLE docs (id text, embedding vector(4))": 'ALTER TABLE "docs" ADD PRIMARY KEY ."id".;',
    "CREATE TABLE docs (id text, part int, embedding vector(4), PRIMARY KEY (id, part))": "ADD PRIMARY KEY",
    "CREATE TABLE docs (id text UNIQUE DEFERRABLE, embedding vector(4))": "ADD PRIMARY KEY",
    "CREATE TABLE docs (id text PRIMARY KEY, embedding vector(768))": "vectors of 768 components, and these have 4",
    "CREATE TABLE docs (id text PRIMARY KEY, embedding text)": "is text; it must be a vector",
    "CREATE TABLE docs (key text PRIMARY KEY, embedding vector(4))": "lacks a column 'id'",
    "CREATE TABLE docs (id bigint PRIMARY KEY, embedding vector(4))": "does not fit the type of its column",
}


@pytest.mark.parametrize(("statement", "words"), WRONG_TABLES.items(), ids=list(WRONG_TABLES.values()))
def test_a_table_that_cannot_take_it_is_refused(
    empty: str, db: psycopg.Connection[Any], statement: str, words: str
) -> None:
    """In words that say what to do and hold no value; before anything is paid, where it can be known."""
    db.execute(statement)
    sink = sink_of(empty)
    if "bigint" not in statement:
        with pytest.raises(WrongUsage, match=words):
            sink.begin(resumed=False, overwrite=False, width=4)
    with pytest.raises(WrongUsage, match=words) as caught:
        write(sink, table_of(1, SENTINEL))
    assert SENTINEL not in str(caught.value)


def test_a_role_without_rights_and_a_server_that_is_not_there(empty: str, db: psycopg.Connection[Any]) -> None:
    db.execute(TABLE)
    db.execute("CREATE ROLE stranger LOGIN")
    db.execute("REVOKE ALL ON docs FROM PUBLIC")
    try:
        with pytest.raises(WrongUsage, match="permission denied for table docs"):
            write(sink_of(re.sub("postgres:@", "stranger:@", empty)), table_of(1))
    finally:
        db.execute("DROP ROLE stranger")
    with pytest.raises(NothingListens, match="could not do it now: connection failed"):
        sink_of("postgresql://127.0.0.1:1/nowhere").begin(resumed=False, overwrite=False, width=4)


WRONG_ADDRESSES = {
    "host/db?table=docs": "must look like",
    "mysql://host/db?table=docs": "must look like",
    "postgresql://host/db": "must name a table",
    "postgresql://host/db?table=": "must name a table",
    "postgresql://host/db?table=" + "x" * 64: "63 bytes",
    "postgresql://host/db?table=a%00b": "63 bytes",
    "postgresql://host/db?table=docs&tabel=x": "cannot read",
    "postgresql://me:hunter2@host/db?table=docs": "PGPASSWORD",
    "postgresql://host/db?table=docs&password=hunter2": "PGPASSWORD",
}


@pytest.mark.parametrize(("address", "words"), WRONG_ADDRESSES.items())
def test_an_address_that_is_none_is_refused(address: str, words: str) -> None:
    with pytest.raises(WrongUsage, match=words) as caught:
        PgvectorSink(address)
    assert "hunter2" not in str(caught.value)


def test_workers_that_write_the_same_rows_at_once(empty: str, db: psycopg.Connection[Any]) -> None:
    """Six begin with no table; their units overlap, in any order. Each row is there once."""
    failed: list[Exception] = []

    def work(seed: int) -> None:
        ids = np.random.default_rng(seed).permutation(300).tolist()
        try:
            for at in range(0, 300, 100):
                write(sink_of(empty), table_of(*ids[at : at + 100], seed=seed))
        except Exception as error:  # noqa: BLE001
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert rows_in(db).keys() == {str(number) for number in range(300)}


def wait_for(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.01)


def waiting(db: psycopg.Connection[Any]) -> list[int]:
    """Sessions of ours that wait for a lock."""
    found = db.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'embedmesh' AND wait_event_type = 'Lock'"
        " AND datname = current_database()"
    )
    return [pid for (pid,) in found]


def test_a_connection_that_is_lost_in_the_middle(empty: str, db: psycopg.Connection[Any]) -> None:
    """The unit is written again, whole."""
    sink = sink_of(empty)
    db.execute(TABLE)
    writer = threading.Thread(target=write, args=(sink, table_of(*range(50))))
    with psycopg.connect(empty) as other:
        other.execute("LOCK TABLE docs IN EXCLUSIVE MODE")
        writer.start()
        wait_for(lambda: bool(waiting(db)))
        (pid,) = waiting(db)
        db.execute("SELECT pg_terminate_backend(%s)", [pid])
        wait_for(lambda: waiting(db) not in ([], [pid]))
    writer.join()
    assert len(rows_in(db)) == 50


def test_kill_9_in_the_middle_of_a_unit(empty: str, db: psycopg.Connection[Any]) -> None:
    """Nothing of it is there; the next run writes it."""
    program = (
        "import sys; from tests.bulk.test_to_pgvector import sink_of, table_of, write\n"
        "write(sink_of(sys.argv[1]), table_of(*range(50)))"
    )
    db.execute(TABLE)
    with psycopg.connect(empty) as other:
        other.execute("LOCK TABLE docs IN EXCLUSIVE MODE")
        process = subprocess.Popen([sys.executable, "-c", program, empty])
        wait_for(lambda: bool(waiting(db)))
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not waiting(db))
    assert rows_in(db) == {}
    write(sink_of(empty), table_of(*range(50)))
    assert len(rows_in(db)) == 50


@pytest.mark.parametrize("width", [384, 3_072])
def test_the_statements_of_the_how_to(empty: str, db: psycopg.Connection[Any], width: int) -> None:
    """An index for ordinary and for wide vectors, and a search by it that finds what was written."""
    (block,) = re.findall(r"```sql\n(.+?)```", HOW_TO, re.S)
    statements = [line.partition(";")[0].replace("2GB", "64MB") for line in block.splitlines()]
    write(sink_of(empty), table_of(*range(200), width=width, title=[f"title {number}" for number in range(200)]))
    searched = "[" + ", ".join(map(str, table_of(*range(200), width=width).vectors[7])) + "]"
    for statement in statements:
        if ("halfvec" in statement) == (width > 2_000) or "embedding" not in statement:
            found = db.execute(statement.replace("[0.1, …]", searched))
    assert found.fetchall()[0] == (("7", "title 7") if width == 384 else ("7",))
    with pytest.raises(WrongUsage, match="16,000 components at most"):
        write(sink_of(empty, "table=wide"), table_of(1, width=16_001))
