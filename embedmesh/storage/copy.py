"""Moving a store from its SQLite file to a PostgreSQL server: all of it, or nothing, with totals proved equal.

No gateway may use the file meanwhile. The rows are copied as they are, in one transaction, with the triggers of the new
store off. Before the commit, every promise of the ledger is checked there, and the sums of each table are compared with
the old ones. The old file stays as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.check import check_within
from embedmesh.storage.migrate import is_empty, migrate, refuse_another_version
from embedmesh.storage.postgres.database import VERSION_FACT, PostgresDb, PostgresEngine
from embedmesh.storage.sqlite.database import OPEN_BUSY_S, GatewayLock, SqliteEngine

NUMBERED = {"transfers": "transfer_id", "prices": "price_id"}  # by the store itself
OF_ONE_STORE = (VERSION_FACT, "probed_ms", "store_place")  # facts that are not copied, nor that a gateway runs
COPIED_ROWS_AT_ONCE = 2_000
HALF = 2**32

Say = Callable[[str, int, int], None]
"""Progress: a table, how many of its rows were copied, and how many it has."""


class Copied(NamedTuple):
    """How many rows of each table were copied, and where the ledger's chain ends in both stores."""

    rows: dict[str, int]
    head: str


async def copy(source: SqliteEngine, target: PostgresEngine, say: Say) -> Copied:
    """Raises SetupError (no server), InvalidValue (a gateway uses the file; the target is used; something differs)."""
    if source.is_new():
        raise InvalidValue(f"There is no store {source.shown}.")
    old = source.connect(busy_s=OPEN_BUSY_S)
    lock = GatewayLock(source.path)
    new = target.connect(planning=True)
    try:
        await lock.take(0.0)
        if not lock.alone:
            raise InvalidValue(f"A gateway uses {source.shown}: stop it first, so that nothing changes meanwhile.")
        refuse_another_version(source, old)
        if is_empty(target, new):
            migrate(target, new)
        refuse_another_version(target, new)
        try:
            return _copy(old, new, target.shown, say)
        except psycopg.Error as error:
            raise StoreUnavailable(
                f"The new store did not take it ({type(error).__name__}); nothing was changed."
            ) from None
    finally:
        new.close()
        lock.close()
        old.close()


def tables_of(new: PostgresDb) -> list[str]:
    """All tables, in the order in which they were made: none refers to a later one."""
    find = "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = current_schema() :: regnamespace"
    return [name for (name,) in new.execute(f"{find} ORDER BY oid").fetchall()]


def _copy(old: Db, new: PostgresDb, shown: str, say: Say) -> Copied:
    tables = tables_of(new)
    old.begin_reading()
    new.begin()
    try:
        new.execute("SELECT pg_advisory_xact_lock(:lock)", {"lock": 0x636F_7079})
        customers = new.execute("SELECT count(*) FROM accounts WHERE kind = 'customer'").fetchall()
        if customers[0][0]:
            raise InvalidValue(f"{shown} has accounts already: copy to a new database.")
        for table in tables:
            new.execute(f"ALTER TABLE {table} DISABLE TRIGGER USER")
        kept = new.execute("SELECT name, value FROM facts").fetchall()
        for table in reversed(tables):
            new.execute(f"DELETE FROM {table}")  # what a new store begins with
        rows = {table: _copy_table(old, new, table, say) for table in tables}
        for name, value in kept:
            if name in OF_ONE_STORE:
                new.execute("INSERT INTO facts (name, value) VALUES (:name, :value)", {"name": name, "value": value})
        for table, column in NUMBERED.items():
            new.execute(
                f"SELECT setval(pg_get_serial_sequence('{table}', '{column}'), "
                f"coalesce((SELECT max({column}) FROM {table}), 0) + 1, false)"
            )
        new.execute("SET CONSTRAINTS ALL IMMEDIATE")
        for table in tables:
            new.execute(f"ALTER TABLE {table} ENABLE TRIGGER USER")
        head = _prove(old, new, tables)
        new.commit()
    finally:
        if not new.lost and new.in_transaction:
            new.rollback()
        old.rollback()
    return Copied(rows, head)


def _copy_table(old: Db, new: PostgresDb, table: str, say: Say) -> int:
    columns = [name for name, _ in _columns(new, table)]
    ((total,),) = old.execute(f"SELECT count(*) FROM {table}").fetchall()
    copied = 0
    into = sql.SQL("COPY {} ({}) FROM STDIN").format(
        sql.Identifier(table), sql.SQL(", ").join(map(sql.Identifier, columns))
    )
    with new.connection.cursor() as cursor, cursor.copy(into) as stream:
        for row in _rows(old, table, columns):
            stream.write_row(row)
            copied += 1
            if copied % COPIED_ROWS_AT_ONCE == 0:
                say(table, copied, total)
    say(table, copied, total)
    return copied


def _rows(old: Db, table: str, columns: Sequence[str]) -> Iterator[Sequence[Any]]:
    left_out = ""
    if table == "facts":
        names = ", ".join(f"'{name}'" for name in OF_ONE_STORE)
        left_out = f" WHERE name NOT IN ({names}) AND name NOT LIKE 'gateway_running%'"
    found = old.execute(f"SELECT {', '.join(columns)} FROM {table}{left_out}")
    while rows := found.fetchmany(COPIED_ROWS_AT_ONCE):
        yield from rows


def _prove(old: Db, new: PostgresDb, tables: Sequence[str]) -> str:
    """Every promise is kept in the new store, and each table's sums are the old one's. Raises InvalidValue."""
    was, now = check_within(old), check_within(new)
    for report, which in ((was, "old"), (now, "new")):
        if report.broken:
            first = report.broken[0]
            raise InvalidValue(
                f"The {which} store is not right ({first.promise}: {first.subject}: {first.detail}): nothing was "
                "copied. See `embedmesh ledger check --offline`."
            )
    if (was.head, was.audit, was.tallies) != (now.head, now.audit, now.tallies):
        raise InvalidValue("The new store is not the old one: nothing was copied.")
    for table in tables:
        numbers = [name for name, kind in _columns(new, table) if kind in ("bigint", "smallint")]
        halves = [f"{name} {half} {HALF}" for name in numbers for half in "/%"]  # a sum of ids does not fit 64 bits
        sums = ", ".join(["count(*)", *(f"CAST(coalesce(sum({half}), 0) AS TEXT)" for half in halves)])
        before, after = (db.execute(f"SELECT {sums} FROM {table}").fetchall() for db in (old, new))
        if table != "facts" and list(before) != list(after):
            raise InvalidValue(f"The table {table} is not what it was: nothing was copied.")
    return now.head.hash


def _columns(new: PostgresDb, table: str) -> list[tuple[str, str]]:
    """Names and types."""
    find = (
        "SELECT column_name, data_type FROM information_schema.columns "
        "WHERE table_schema = current_schema() AND table_name = :table ORDER BY ordinal_position"
    )
    return [(name, kind) for name, kind in new.execute(find, {"table": table}).fetchall()]
