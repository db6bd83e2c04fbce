"""A store on a PostgreSQL server, for any number of gateways."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import psycopg
from psycopg.pq import TransactionStatus

from embedmesh.rules.errors import InvalidValue, SetupError, StoreAway
from embedmesh.storage.db import Cursor, Db, Row, may_raise
from embedmesh.storage.sql import load

VERSION_MIN = 140_000  # of the server; ours is tested with 18
CONNECT_S = 2  # as long as a caller is told within
ALONE = 0x656D_6D65  # the advisory lock of whoever changes the schema
SESSION = {
    "synchronous_commit": "on",  # a hold is on disk before a node is asked, whatever the server's default is
    "default_transaction_isolation": "read committed",
    "lock_timeout": "1500",  # ms; whoever waits for a hold is told by then
    "statement_timeout": "30000",  # ms; of the writer's none takes a tenth of a second
    "idle_in_transaction_session_timeout": "3000",  # ms; a gateway that was stopped must not keep others' locks
    "TimeZone": "UTC",
    # Only point statements are run; triggers keep their plans: one made while a table was small reads all of it later.
    # For the same reason statements are not prepared: kept plans cost ten times as much after a minute; a plan 0.1 ms.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_bitmapscan": "off",  # a plain index scan marks what it finds dead, for those that come after it
    "jit": "off",
}
CHECK_MS_MAX = "3600000"  # an hour: the check of a large ledger reads all of it
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,
}
may_raise(psycopg.Error, (psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.DataError))

NAMED = re.compile(r"(?<![:\w]):(\w+)")
ROWS = "json_each(:rows)"
VERSION = "schema_version"  # a fact of the store
FACTS_SQL = load("facts.sql")


@cache
def translated(statement: str) -> str:
    """A statement as this driver wants it: values as `%(name)s`, and rows from JSON in PostgreSQL's own words."""
    statement = statement.replace("%", "%%").replace(ROWS, "jsonb_array_elements(CAST(:rows AS jsonb)) AS each (value)")
    return NAMED.sub(r"%(\1)s", statement)


class PostgresDb:
    """One session. Implements the protocol `Db`.

    Inside `pipelined`, statements are sent without waiting for what comes back: that is waited for where it is asked
    for (`fetchall`, `rowcount`), or at the end. What a statement failed with shows only then.
    """

    dialect = "postgres"

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self.connection = connection
        self._pipeline: psycopg.Pipeline | None = None

    @contextmanager
    def pipelined(self) -> Iterator[None]:
        """Raises `errors()` at its end, too."""
        with self.connection.pipeline() as self._pipeline:
            try:
                yield
            finally:
                self._pipeline = None

    @property
    def in_transaction(self) -> bool:
        return self.connection.info.transaction_status not in (TransactionStatus.IDLE, TransactionStatus.UNKNOWN)

    @property
    def lost(self) -> bool:
        """Whether the session has ended."""
        return self.connection.closed or self.connection.broken

    def begin(self) -> None:
        self.connection.execute("BEGIN")

    def begin_reading(self) -> None:
        self.connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")

    def commit(self) -> None:
        self.connection.execute("COMMIT")

    def rollback(self) -> None:
        self.connection.execute("ROLLBACK")

    def execute(self, statement: str, values: Mapping[str, Any] | None = None) -> Cursor:
        query = cast(Any, translated(statement))
        cursor = self.connection.execute(query, {} if values is None else values)
        return cursor if self._pipeline is None else _Pending(cursor, self._pipeline)

    def later(self, statement: str, values: Mapping[str, Any]) -> Callable[[], Sequence[Row]]:
        return self.execute(statement, values).fetchall

    def lock_accounts(self, account_ids: set[str]) -> None:
        self.connection.execute(
            "SELECT 1 FROM accounts WHERE account_id = ANY(%s) ORDER BY account_id FOR NO KEY UPDATE",
            (sorted(account_ids),),
        )

    def close(self) -> None:
        self.connection.close()


class _Pending:
    """A cursor whose results may be under way. Implements the protocol `Cursor`."""

    def __init__(self, cursor: "psycopg.Cursor[Any]", pipeline: psycopg.Pipeline) -> None:
        self._cursor = cursor
        self._pipeline = pipeline

    @property
    def rowcount(self) -> int:
        if self._cursor.pgresult is None:
            self._pipeline.sync()
        return self._cursor.rowcount

    @property
    def description(self) -> Any:
        if self._cursor.pgresult is None:
            self._pipeline.sync()
        return self._cursor.description

    def fetchone(self) -> Row | None:
        return self._cursor.fetchone()

    def fetchall(self) -> list[Row]:
        return self._cursor.fetchall()

    def fetchmany(self, size: int) -> list[Row]:
        return self._cursor.fetchmany(size)

    def __iter__(self) -> Iterator[Row]:
        return iter(self._cursor)


class PostgresEngine:
    """A store at a `postgresql://` address. Implements the protocol `Engine`."""

    dialect = "postgres"

    def __init__(self, url: str) -> None:
        self.url = url
        parts = urlsplit(url)
        self.shown = f"postgresql://{parts.hostname or 'localhost'}{parts.path}"

    def connect(self, *, busy_s: float = 0.0, read_only: bool = False, planning: bool = False) -> PostgresDb:
        """A session; one for `planning` may choose any plan. Raises StoreAway (no server answers), SetupError."""
        settings = dict(SESSION)
        if planning:
            settings = {name: value for name, value in settings.items() if not name.startswith("enable_")}
            settings["statement_timeout"] = CHECK_MS_MAX
        if read_only:
            settings["default_transaction_read_only"] = "on"
        try:
            connection = psycopg.connect(
                self.url,
                autocommit=True,
                prepare_threshold=None,
                connect_timeout=CONNECT_S,
                application_name="embedmesh",
                **KEEPALIVE,
            )
            try:
                for name, value in settings.items():
                    connection.execute("SELECT set_config(%s, %s, false)", (name, value))
                if connection.info.server_version < VERSION_MIN:
                    raise SetupError(f"The server of {self.shown} is too old: PostgreSQL 14 or newer is needed.")
            except BaseException:
                connection.close()
                raise
        except psycopg.Error as error:
            raise StoreAway(
                f"Cannot use the store {self.shown} ({_first_line(error)}): is EMBEDMESH_STORE right, and does its "
                "server run?"
            ) from None
        return PostgresDb(connection)

    def is_new(self) -> bool:
        db = self.connect()
        try:
            return self.version(db) == 0
        finally:
            db.close()

    def version(self, db: Db) -> int:
        row = db.execute("SELECT to_regclass('facts') IS NOT NULL").fetchone()
        if row != (True,):
            return 0
        found = db.execute(FACTS_SQL["find_fact"], {"name": VERSION}).fetchone()
        return int(found[0]) if found else 0

    def run_script(self, db: Db, script: str, version: int) -> None:
        assert isinstance(db, PostgresDb)
        try:
            db.begin()
            db.execute("SELECT pg_advisory_xact_lock(:lock)", {"lock": ALONE})
            if self.version(db) < version:
                db.connection.execute(cast(Any, script))
                db.execute(FACTS_SQL["set_fact"], {"name": VERSION, "value": str(version)})
            db.commit()
        except psycopg.Error as error:
            if not db.lost:
                db.rollback()
            raise SetupError(
                f"Cannot bring the store {self.shown} to this program's version: {_first_line(error)}"
            ) from None

    def backup(self, db: Db, target: Path, *, overwrite: bool) -> None:
        raise InvalidValue(
            "A PostgreSQL store is backed up with PostgreSQL's own tools: `pg_dump -Fc`, or `pg_basebackup` and the "
            "write-ahead log. Keep key.secret with it."
        )


def _first_line(error: Exception) -> str:
    """What the server or the driver says, without details that may name an address."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
