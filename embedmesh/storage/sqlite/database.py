"""A store in one SQLite file: its version, pragmas, file modes, and the lock that its gateways share.

Every failure here is a SetupError: one line that says what to do.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Cursor, Db, Row
from embedmesh.storage.sqlite.backup import backup
from embedmesh.storage.sqlite.driver import check_version, driver

WAL_BYTES_KEPT = 64 * 1024 * 1024  # a WAL that grew behind a long read is cut back to this
STATEMENTS_CACHED = 128  # prepared ones, a connection; we have about fifty
OPEN_BUSY_S = 5.0  # another process may be migrating, or checkpointing a large WAL
LOCK_WAIT_S = 30.0  # another gateway may be bringing a large store to this version, or verifying it
LOCK_POLL_S = 0.1  # between two looks at the lock


def make_file(path: Path) -> None:
    """Make the file (mode 0600), and its folder (mode 0700), where they are missing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # never opened here then: closing it would drop the locks of this process
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # -wal and -shm get the same mode
    except OSError as error:
        raise SetupError(f"Cannot write the store {path}: {error.strerror}. Choose another --data-dir.") from None


class SqliteDb:
    """One connection. Implements the protocol `Db`."""

    dialect = "sqlite"

    def __init__(self, connection: Any) -> None:
        self.connection = connection  # the driver has no types

    @property
    def in_transaction(self) -> bool:
        return bool(self.connection.in_transaction)

    def begin(self) -> None:
        self.connection.execute("BEGIN IMMEDIATE")

    def begin_reading(self) -> None:
        self.connection.execute("BEGIN")

    def commit(self) -> None:
        self.connection.execute("COMMIT").fetchall()  # an unread row would keep the statement open

    def rollback(self) -> None:
        self.connection.execute("ROLLBACK")

    def execute(self, statement: str, values: Mapping[str, Any] | None = None) -> Cursor:
        return cast(Cursor, self.connection.execute(statement, {} if values is None else values))

    def later(self, statement: str, values: Mapping[str, Any]) -> Callable[[], Sequence[Row]]:
        found = self.connection.execute(statement, values).fetchall()  # an unread row would refuse the COMMIT
        return lambda: cast(Sequence[Row], found)

    def lock_accounts(self, account_ids: set[str]) -> None:
        """Nothing to do: there is one writer at a time."""

    lock_names = lock_accounts

    def close(self) -> None:
        self.connection.close()


class SqliteEngine:
    """A store in a file. Implements the protocol `Engine`."""

    dialect = "sqlite"

    def __init__(self, path: Path) -> None:
        # The lock and the log of a file lie beside the file itself, whatever links lead to it. These raise nothing.
        self.path = Path(os.path.realpath(path)) if os.path.islink(path) else path  # noqa: PTH114
        self.shown = str(path)

    def connect(self, *, busy_s: float, read_only: bool = False, planning: bool = False) -> SqliteDb:
        """A connection that waits up to `busy_s` seconds for other writers; the file is made where it is missing."""
        check_version()
        make_file(self.path)
        db = None
        try:
            db = driver.connect(
                self.path,
                timeout=busy_s,
                isolation_level=None,
                check_same_thread=False,
                cached_statements=STATEMENTS_CACHED,
            )
            (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
            if mode != "wal":
                raise SetupError(
                    f"The store {self.path} cannot use a write-ahead log (mode {mode}): is it on a network disk?"
                )
            db.execute("PRAGMA synchronous = FULL")
            db.execute("PRAGMA fullfsync = ON")  # on macOS a plain fsync leaves data in the disk's own cache
            db.execute("PRAGMA checkpoint_fullfsync = ON")
            db.execute("PRAGMA foreign_keys = ON")
            db.execute("PRAGMA recursive_triggers = ON")  # or REPLACE would delete rows behind the triggers' back
            db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
            db.execute(f"PRAGMA query_only = {int(read_only)}")
        except BaseException as error:
            if db is not None:
                db.close()
            if isinstance(error, driver.Error):
                raise SetupError(
                    f"Cannot open the store {self.path}: {error}. Is it an SQLite file, and does its disk work?"
                ) from None
            raise
        return SqliteDb(db)

    def is_new(self) -> bool:
        return not self.path.exists()

    def version(self, db: Db) -> int:
        row = db.execute("PRAGMA user_version").fetchone()
        assert row is not None
        return int(row[0])

    def run_script(self, db: Db, script: str, version: int) -> None:
        try:
            db.execute("PRAGMA foreign_keys = OFF")  # a script may replace a table
            db.begin()
            if self.version(db) < version:
                for statement in _statements(script):
                    db.execute(statement)
                if (broken := db.execute("PRAGMA foreign_key_check").fetchone()) is not None:
                    raise SetupError(f"The store {self.path} has a row of {broken[0]} that refers to a missing row.")
                db.execute(f"PRAGMA user_version = {version}")
            db.commit()
        except driver.Error as error:
            raise SetupError(f"Cannot bring the store {self.path} to this program's version: {error}.") from None
        finally:
            if db.in_transaction:
                db.rollback()
            db.execute("PRAGMA foreign_keys = ON")

    def backup(self, db: Db, target: Path, *, overwrite: bool) -> None:
        backup(db, target, overwrite=overwrite)


class GatewayLock:
    """Says that a gateway uses the store. While it is `alone`, it can recover what dead ones left."""

    def __init__(self, path: Path) -> None:
        """Raises SetupError."""
        self._path = path
        try:
            self._descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise SetupError(f"Cannot write {path}.lock: {error.strerror}. Choose another --data-dir.") from None
        self.alone = False

    async def take(self, wait_s: float) -> None:
        """Take it alone, or share it with other gateways; waits for one that is alone. Raises SetupError."""
        try:
            self.alone = self._try(fcntl.LOCK_EX)
            if self.alone:
                return
            async with asyncio.timeout(wait_s):
                while not self._try(fcntl.LOCK_SH):  # noqa: ASYNC110 - no other process can set an event of ours
                    await asyncio.sleep(LOCK_POLL_S)
        except TimeoutError:
            raise SetupError(
                f"Another gateway is busy with the store {self._path}: wait for it, or choose another --data-dir."
            ) from None
        except OSError as error:
            raise SetupError(f"Cannot lock {self._path}.lock: {error.strerror}. Is it on a network disk?") from None

    async def share(self, wait_s: float) -> None:
        """Let other gateways share it."""
        if self.alone:
            self.alone = False
            async with asyncio.timeout(wait_s):  # for a moment there is no lock, and another may be alone
                while not self._try(fcntl.LOCK_SH):  # noqa: ASYNC110
                    await asyncio.sleep(LOCK_POLL_S)

    def close(self) -> None:
        os.close(self._descriptor)

    def _try(self, kind: int) -> bool:
        try:
            fcntl.flock(self._descriptor, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def _statements(script: str) -> Iterator[str]:
    """The script cut into statements (`executescript` would commit between them)."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if driver.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement  # SQLite names what is wrong with it
