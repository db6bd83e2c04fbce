"""A store on a PostgreSQL server, for any number of gateways."""

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any, cast

import psycopg
from psycopg.pq import TransactionStatus

from embedmesh.rules.errors import InvalidValue, SetupError, StoreAway
from embedmesh.storage.db import Cursor, Db, Row, may_raise
from embedmesh.storage.engines import shown_store
from embedmesh.storage.sql import FACTS_SQL

SERVER_VERSION_MIN = 140_000  # of the server; ours is tested with 18
SERVER_CONNECT_S = 2  # callers hear within 2 s of a store that is away
SCHEMA_LOCK = 0x656D_6D65  # the advisory lock of a process that changes the schema
SESSION = {
    "synchronous_commit": "on",  # a hold is on disk before any work begins, also where the server's default differs
    "default_transaction_isolation": "read committed",
    "lock_timeout": "1500",  # ms; callers hear within 2 s of a hold that cannot be placed
    "statement_timeout": "30000",  # ms; none of the writer's statements takes a tenth of a second
    "idle_in_transaction_session_timeout": "3000",  # ms; a gateway that was stopped must not keep others' locks
    "TimeZone": "UTC",
    # Only point statements are run; triggers keep their plans: one made while a table was small reads all of it later.
    # For the same reason statements are not prepared: kept plans cost ten times as much after a minute; a plan 0.1 ms.
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_bitmapscan": "off",  # a plain index scan marks dead entries, for later scans
    "jit": "off",
}
NAMES_LOCK = 0x6E61_6D65  # the first number of advisory locks of names
CHECK_MS_MAX = "3600000"  # an hour: the check of a large ledger reads all of it
KEEPALIVE: dict[str, Any] = {
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 5_000,
}
may_raise(psycopg.Error, (psycopg.IntegrityError, psycopg.ProgrammingError, psycopg.DataError))

NAMED_VALUE = re.compile(r"(?<![:\w]):(\w+)")
SQLITE_ROWS, POSTGRES_ROWS = "jsonb_each(:rows)", "jsonb_array_elements(CAST(:rows AS jsonb)) AS each (value)"
VERSION_FACT = "schema_version"


@cache
def translated(statement: str) -> str:
    """A statement for this driver: values as `%(name)s`, and rows from JSON as PostgreSQL reads them."""
    return NAMED_VALUE.sub(r"%(\1)s", statement.replace("%", "%%").replace(SQLITE_ROWS, POSTGRES_ROWS))


class PipelineCursor(psycopg.Cursor[Any]):
    """In a pipeline, `rowcount` waits for the result, as the fetching methods do."""

    @property
    def rowcount(self) -> int:
        if self.pgresult is None:
            with self.connection.pipeline():  # entering a nested one waits for what was sent
                pass
        return super().rowcount


class PostgresDb:
    """One session. Implements the protocol `Db`.

    Inside `pipelined`, statements are sent without waiting for their results. Fetching, `rowcount` and the end wait for
    them, and only then an error shows.
    """

    dialect = "postgres"

    def __init__(self, connection: "psycopg.Connection[Any]") -> None:
        self.connection = connection

    def pipelined(self) -> AbstractContextManager[psycopg.Pipeline]:
        """Raises `errors()` at its end, too."""
        return self.connection.pipeline()

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
        return self.connection.execute(cast(Any, translated(statement)), {} if values is None else values)

    def later(self, statement: str, values: Mapping[str, Any]) -> Callable[[], Sequence[Row]]:
        return self.execute(statement, values).fetchall

    def lock_accounts(self, account_ids: set[str]) -> None:
        self.connection.execute(
            "SELECT 1 FROM accounts WHERE account_id = ANY(%s) ORDER BY account_id FOR NO KEY UPDATE",
            (sorted(account_ids),),
        )

    def lock_names(self, names: set[str]) -> None:
        numbers = sorted({zlib.crc32(name.encode(errors="surrogatepass")) - 2**31 for name in names})
        self.connection.execute(
            "SELECT pg_advisory_xact_lock(%s, number) FROM unnest(CAST(%s AS integer[])) AS number",
            (NAMES_LOCK, numbers),
        )

    def close(self) -> None:
        self.connection.close()


class PostgresEngine:
    """A store at a `postgresql://` address. Implements the protocol `Engine`."""

    dialect = "postgres"

    def __init__(self, url: str) -> None:
        self.url = url
        self.shown = shown_store(url)

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
                connect_timeout=SERVER_CONNECT_S,
                application_name="embedmesh",
                cursor_factory=PipelineCursor,
                **KEEPALIVE,
            )
            try:
                each = ", ".join("set_config(%s, %s, false)" for _ in settings)  # in one round trip
                connection.execute(cast(Any, f"SELECT {each}"), [word for item in settings.items() for word in item])
                if connection.info.server_version < SERVER_VERSION_MIN:
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
        found = db.execute(FACTS_SQL["find_fact"], {"name": VERSION_FACT}).fetchone()
        return int(found[0]) if found else 0

    def run_script(self, db: Db, script: str, version: int) -> None:
        assert isinstance(db, PostgresDb)
        try:
            db.begin()
            db.execute("SELECT pg_advisory_xact_lock(:lock)", {"lock": SCHEMA_LOCK})
            if self.version(db) < version:
                db.connection.execute(cast(Any, script))
                db.execute(FACTS_SQL["set_fact"], {"name": VERSION_FACT, "value": str(version)})
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
