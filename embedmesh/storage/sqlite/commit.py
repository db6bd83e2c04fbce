"""How a batch becomes durable in an SQLite file.

Statements run on the event loop, only COMMIT runs in a thread of its own, and the event loop never touches the
connection while the thread does. After a failed fsync nobody knows what the disk holds: that is Fatal, and the process
is to end; the next start recovers. SQLite's error does not say whether it was an fsync that failed (the driver hides
extended codes), so `sync_wal` syncs the WAL through a descriptor of our own: the kernel reports a failed write-back
once to each descriptor.
"""

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from embedmesh.rules.ports import Clock
from embedmesh.storage.db import name_of, refusals
from embedmesh.storage.ledger.batch import WriteBatch
from embedmesh.storage.ledger.group_commit import Fatal
from embedmesh.storage.sqlite.database import SqliteDb
from embedmesh.storage.sqlite.driver import driver

BUSY_S_MAX = 1.0  # as long as another process may keep the lock; callers hear of it within 2 s
BUSY_PAUSE_MIN_S, BUSY_PAUSE_MAX_S = 0.001, 0.02  # between two tries to get the lock
CHECKPOINT_COMMITS = 256  # some 10 MB of WAL; a checkpoint takes a few milliseconds, after the batch was acknowledged
FSYNC_FAILED = "an fsync failed: nobody knows what the disk holds"

logger = logging.getLogger(__name__)


class SqliteMedium:
    """Implements the protocol `Medium` over one connection that nobody else writes with."""

    def __init__(self, db: SqliteDb, clock: Clock, sync_wal: Callable[[], None]) -> None:
        self._db = db
        self._clock = clock
        self._sync_wal = sync_wal
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._commits = 0  # since the last checkpoint

    async def write(self, batch: WriteBatch, *, patient: bool) -> None:
        try:
            await self._begin(patient)
            try:
                batch.apply(self._db)
            except refusals():
                self._db.rollback()
                await self._begin(patient)
                batch.apply_again(self._db)
            await self._in_thread(self._db.commit)
            batch.settle(self._db)
        except (driver.Error, OverflowError) as error:
            if name_of(error).startswith("SQLITE_IOERR"):
                try:
                    await self._in_thread(self._sync_wal)
                except OSError:
                    raise Fatal(f"{FSYNC_FAILED} ({name_of(error)})") from None
            if self._db.in_transaction:
                self._db.rollback()
            raise
        self._commits += 1

    async def between_batches(self) -> None:
        """Move the WAL's content into the database. SQLite would do that inside COMMIT, and hide its errors."""
        if self._commits < CHECKPOINT_COMMITS:
            return
        self._commits = 0
        try:
            await self._in_thread(self._checkpoint)
        except driver.Error as error:
            if name_of(error).startswith("SQLITE_IOERR"):  # may be an fsync of the database itself: not worth the doubt
                raise Fatal(f"{FSYNC_FAILED} ({name_of(error)})") from None
            # the WAL still has everything; the next checkpoint tries again
            logger.warning("a checkpoint failed: %s", name_of(error))

    async def close(self) -> None:
        self._thread.shutdown(wait=True)

    async def _begin(self, patient: bool) -> None:
        """Get the write lock, waiting without blocking the event loop while another process has it."""
        began_s, pause_s = self._clock.monotonic(), BUSY_PAUSE_MIN_S
        while True:
            try:
                self._db.begin()
                return
            except driver.OperationalError as error:
                waited_s = self._clock.monotonic() - began_s
                if name_of(error) != "SQLITE_BUSY" or not patient or waited_s > BUSY_S_MAX:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BUSY_PAUSE_MAX_S)

    def _checkpoint(self) -> None:
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

    async def _in_thread(self, call: Callable[[], None]) -> None:
        """Run what waits for the disk. The thread finishes it even when we are cancelled."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call))
