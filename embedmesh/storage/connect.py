"""Opening the store's file: SQLite's version, pragmas, file modes, migrations, and the lock of its one gateway.

Whatever is wrong here is a SetupError: one line that says what to do.
"""

import asyncio
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pysqlite3.dbapi2 as driver

from embedmesh.rules.errors import SetupError
from embedmesh.storage.sql import migrations

Db = Any  # a pysqlite3 connection: the driver has no types

SQLITE_VERSION_MIN = (3, 51, 3)  # 3.7.0 to 3.51.2 can corrupt a WAL that two connections write
WAL_BYTES_KEPT = 64 * 1024 * 1024  # a WAL that grew behind a long read is cut back to this
STATEMENTS_CACHED = 128  # prepared ones, a connection; we have about fifty
OPEN_BUSY_S = 5.0  # another process may be migrating, or checkpointing a large WAL
LOCK_WAIT_S = 35.0  # a gateway whose supervisor was killed drains for 30 s, and writes for a little longer
LOCK_POLL_S = 0.1  # between two looks at the lock

logger = logging.getLogger(__name__)


def check_version(version: tuple[int, ...] = driver.sqlite_version_info) -> None:
    """Refuse an SQLite that can corrupt a WAL."""
    if version < SQLITE_VERSION_MIN:
        found, needed = (".".join(map(str, v)) for v in (version, SQLITE_VERSION_MIN))
        raise SetupError(f"SQLite {found} can corrupt the store: {needed} or newer is needed; reinstall pysqlite3.")


def make_file(path: Path) -> None:
    """Make the file (mode 0600), and its folder (mode 0700), where they are missing."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with suppress(FileExistsError):  # never opened here then: closing it would drop the locks of this process
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))  # -wal and -shm get the same mode
    except OSError as error:
        raise SetupError(f"Cannot write the store {path}: {error.strerror}. Choose another --data-dir.") from None


def connect(path: Path, *, busy_s: float, read_only: bool = False) -> Db:
    """A connection in autocommit mode that waits up to `busy_s` seconds for other writers."""
    db = None
    try:
        db = driver.connect(
            path, timeout=busy_s, isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS_CACHED
        )
        (mode,) = db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise SetupError(f"The store {path} cannot use a write-ahead log (mode {mode}): is it on a network disk?")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        db.execute("PRAGMA recursive_triggers = ON")  # or REPLACE would delete rows behind the triggers' back
        db.execute(f"PRAGMA journal_size_limit = {WAL_BYTES_KEPT}")
        db.execute(f"PRAGMA query_only = {int(read_only)}")
    except BaseException as error:
        if db is not None:
            db.close()
        if isinstance(error, driver.Error):
            raise SetupError(f"Cannot open the store {path}: {error}. Is it one, and is its disk well?") from None
        raise
    return db


def migrate(db: Db, path: Path, scripts: Sequence[str] | None = None) -> None:
    """Bring the store to this program's version, one transaction a script. A store from the future is refused."""
    scripts = migrations() if scripts is None else scripts
    try:
        while (version := _version(db)) != len(scripts):
            _refuse_the_future(version, len(scripts), path)
            db.execute("BEGIN IMMEDIATE")
            if _version(db) == version:  # no other process was faster
                for statement in _statements(scripts[version]):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {version + 1}")
            db.execute("COMMIT")
    except driver.Error as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise SetupError(f"Cannot bring the store {path} to this program's version: {error}.") from None


def is_empty(db: Db) -> bool:
    """Whether nothing was ever made of this file."""
    return _version(db) == 0


def refuse_another_version(db: Db, path: Path) -> None:
    """For those who only come by: raise SetupError for a store that is not of this program's version."""
    version, known = _version(db), len(migrations())
    _refuse_the_future(version, known, path)
    if version < known:
        raise SetupError(
            f"The store {path} has version {version}; this program needs {known}: restart `embedmesh serve` with this "
            "program, which brings it up to date."
        )


def _refuse_the_future(version: int, known: int, path: Path) -> None:
    if version > known:
        raise SetupError(f"The store {path} has version {version}; this program knows {known}: use a newer embedmesh.")


async def lock_for_gateway(path: Path, wait_s: float) -> int:
    """Take the lock that says: one gateway writes holds here. Returns its descriptor; closing that gives it up.

    Another gateway may still drain: it is waited for, up to `wait_s`. Raises SetupError.
    """
    try:
        descriptor = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise SetupError(f"Cannot write {path}.lock: {error.strerror}. Choose another --data-dir.") from None
    try:
        if not _try_lock(descriptor):
            logger.warning("another gateway uses the store: waiting up to %g s for it to end", wait_s)
            async with asyncio.timeout(wait_s):
                while not _try_lock(descriptor):  # noqa: ASYNC110 - no other process can set an event of ours
                    await asyncio.sleep(LOCK_POLL_S)
    except BaseException as error:
        os.close(descriptor)
        if isinstance(error, TimeoutError):
            raise SetupError(f"Another gateway uses the store {path}: stop it, or choose another --data-dir.") from None
        if isinstance(error, OSError):
            raise SetupError(f"Cannot lock {path}.lock: {error.strerror}. Is it on a network disk?") from None
        raise
    return descriptor


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _version(db: Db) -> int:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    return int(version)


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
