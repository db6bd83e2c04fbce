"""Group commit: statements run on the event loop, only COMMIT runs in a thread of its own.

Whatever arrives during one COMMIT is the next batch; there is no timer. A batch that fails as a whole (disk full,
read-only, another process keeps the lock) tells those who wait and keeps the rest, in order, to be tried again every
RETRY_S until it is durable. After a failed fsync nobody knows what the disk holds: nothing is written or acknowledged
any more, and `on_fatal` is to end the process; the next start recovers. SQLite's error does not say whether it was an
fsync that failed (the driver hides extended codes), so the kernel is asked: `sync_wal` syncs the WAL through a
descriptor of our own, and the kernel tells each descriptor of a failed write-back once.

The event loop never touches the connection while the thread does.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pysqlite3.dbapi2 as driver

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.connect import Db
from embedmesh.storage.sql import load
from embedmesh.storage.writes import Stats, Write

BATCH_WRITES_MAX = 128  # about 3 ms of the event loop; a COMMIT takes as long
QUEUE_WRITES_MAX = 8_192  # about half a second of writing; whoever would wait longer is better told at once
BUSY_S_MAX = 1.0  # as long as another process may keep the lock before those who wait are told (within 2 s)
BUSY_PAUSE_MIN_S, BUSY_PAUSE_MAX_S = 0.001, 0.02  # between two tries to get the lock
STUCK_S_MAX = 1.5  # a batch that takes longer is a disk that does not answer
RETRY_S = 0.5  # between two tries while the store cannot be written
PROBE_AFTER_S = 4.0  # with nothing written; the sweep comes every 5 s, so that a bad disk is noticed within 10 s
CHECKPOINT_COMMITS = 256  # some 10 MB of WAL; a checkpoint takes a few milliseconds, after the batch was acknowledged

# Errors of one statement; the transaction and the batch's other writes are sound. All others fail the whole batch.
REFUSALS = (driver.IntegrityError, driver.ProgrammingError, driver.InterfaceError, driver.DataError, OverflowError)
FSYNC_FAILED = "an fsync failed: nobody knows what the disk holds"

WRITE_PROBE = load("facts.sql")["write_probe"]

logger = logging.getLogger(__name__)


class Writer:
    """The one writer of a store's connection. Made on a running event loop; `close` ends it."""

    def __init__(
        self, db: Db, clock: Clock, stats: Stats, sync_wal: Callable[[], None], on_fatal: Callable[[str], None]
    ) -> None:
        self._db = db
        self._sync_wal = sync_wal
        self._clock = clock
        self._stats = stats
        self._on_fatal = on_fatal
        self._queue: deque[Write] = deque()
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="commit")
        self._batch: list[Write] = []  # being written
        self._began_s: float | None = None  # when that began
        self._trouble = ""  # why the last batch failed; empty when it did not
        self._dead = False
        self._commits_since_checkpoint = 0
        self._written_s = clock.monotonic()  # when something was last made durable
        self._changes = db.total_changes  # rows changed until then
        self._task = asyncio.get_running_loop().create_task(self._run(), name="store writer")

    def submit(self, write: Write) -> None:
        """Queue a write. One that need not be kept is refused with StoreUnavailable when it could not be soon."""
        if self._dead:
            if not write.kept:
                raise StoreUnavailable("The ledger cannot be written; try again soon.")
            return  # this process is ending; the next one recovers
        if not write.kept and len(self._queue) >= QUEUE_WRITES_MAX:
            raise StoreUnavailable("The ledger is too busy; try again soon.")
        self._queue.append(write)
        self._idle.clear()
        self._work.set()

    def full(self) -> bool:
        """Whether the queue is as long as it should get."""
        return len(self._queue) >= QUEUE_WRITES_MAX

    def healthy(self) -> bool:
        """Whether the last batch became durable, and the one being written does not take too long."""
        stuck = self._began_s is not None and self._clock.monotonic() - self._began_s > STUCK_S_MAX
        return not (self._dead or self._trouble or stuck)

    async def drained(self) -> None:
        """Wait until nothing is queued or being written."""
        await self._idle.wait()

    def waiting(self) -> int:
        """How many writes are queued or being written."""
        return len(self._queue) + len(self._batch)

    async def close(self) -> None:
        """Stop writing; what is queued is lost, so drain first. A COMMIT under way is waited for."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._thread.shutdown(wait=True)

    async def _run(self) -> None:
        try:
            while not self._dead:
                await self._work.wait()
                self._began_s = self._clock.monotonic()
                await self._write_batch()
                if self._commits_since_checkpoint >= CHECKPOINT_COMMITS:
                    await self._checkpoint()
                self._began_s = None
                if not self._queue:
                    self._idle.set()
                if self._trouble:
                    await asyncio.sleep(RETRY_S)
                elif not self._queue:
                    self._work.clear()
        except Exception as error:  # noqa: BLE001 - a writer that died in silence would stop every caller
            self._die(f"the store's writer failed: {type(error).__name__}", error)

    async def _write_batch(self) -> None:
        """One transaction: begin, apply, commit in the thread, tell."""
        try:
            await self._begin()
            while self._queue and len(self._batch) < BATCH_WRITES_MAX:
                self._batch.append(self._queue.popleft())
            applied = self._apply(self._batch)
            await self._in_thread(self._execute, "COMMIT")
        except driver.Error as error:
            await self._fail(error)
            return
        self._note(trouble="")
        if self._db.total_changes != self._changes:
            self._changes, self._written_s = self._db.total_changes, self._clock.monotonic()
        self._commits_since_checkpoint += 1
        self._stats.commits += 1
        self._stats.writes += len(self._batch)
        self._stats.largest_batch = max(self._stats.largest_batch, len(self._batch))
        self._batch = []
        for write in applied:
            write.committed(self._stats)

    async def _begin(self) -> None:
        """Get the write lock, waiting without blocking the event loop while another process has it."""
        began_s, pause_s = self._clock.monotonic(), BUSY_PAUSE_MIN_S
        while True:
            try:
                self._db.execute("BEGIN IMMEDIATE")
                return
            except driver.OperationalError as error:
                waited_s = self._clock.monotonic() - began_s
                if _name(error) != "SQLITE_BUSY" or self._trouble or waited_s > BUSY_S_MAX:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, BUSY_PAUSE_MAX_S)

    def _apply(self, batch: list[Write]) -> list[Write]:
        """Run the batch's statements, each write in its own savepoint. Returns the writes that were not refused.

        A batch may change nothing, and says nothing of the disk then: after trouble, or a while, a row is written that
        does.
        """
        now_ms = self._clock.unix_ms()
        if self._trouble or self._clock.monotonic() - self._written_s > PROBE_AFTER_S:
            self._db.execute(WRITE_PROBE, {"now_ms": now_ms})
        applied = []
        for write in batch:
            self._db.execute("SAVEPOINT one")
            try:
                write.apply(self._db, now_ms)
            except REFUSALS as error:
                self._db.execute("ROLLBACK TO one")
                self._stats.broken_writes += 1
                logger.error("the ledger refused a %s: %s", type(write).__name__, error)
                write.refused(error)
            else:
                applied.append(write)
            self._db.execute("RELEASE one")
        return applied

    async def _in_thread(self, call: Callable[..., None], *args: str) -> None:
        """Run what waits for the disk. The thread finishes it even when we are cancelled."""
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, call, *args))

    def _execute(self, statement: str) -> None:
        self._db.execute(statement).fetchall()  # an unread row would keep the statement open, and COMMIT refuses that

    async def _fail(self, error: driver.Error) -> None:
        """The batch is not durable: tell those who wait, keep the rest in front of the queue."""
        self._stats.failed_batches += 1
        name = _name(error)
        if name.startswith("SQLITE_IOERR"):
            try:
                await self._in_thread(self._sync_wal)
            except OSError:
                self._die(FSYNC_FAILED, error)
                return
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._note(trouble=name)
        self._keep_what_must_be()

    def _keep_what_must_be(self) -> None:
        """Batch and queue become the queue, in order, without the writes that somebody waits for."""
        self._queue = deque(write for write in (*self._batch, *self._queue) if write.kept or self._turn_away(write))
        self._batch = []

    def _turn_away(self, write: Write) -> bool:
        write.failed("The ledger cannot be written now; try again soon.")
        return False

    async def _checkpoint(self) -> None:
        """Move the WAL's content into the database. Done here, not by SQLite inside COMMIT, which hides its errors."""
        self._commits_since_checkpoint = 0
        try:
            await self._in_thread(self._execute, "PRAGMA wal_checkpoint(PASSIVE)")
        except driver.Error as error:
            if _name(error).startswith("SQLITE_IOERR"):  # may be an fsync of the database itself: not worth the doubt
                self._die(FSYNC_FAILED, error)
            else:  # the WAL still has everything; the next checkpoint tries again
                logger.warning("a checkpoint failed: %s", _name(error))

    def _note(self, trouble: str) -> None:
        if trouble and not self._trouble:
            logger.error("the store cannot be written (%s); trying every %s s", trouble, RETRY_S)
        elif self._trouble and not trouble:
            logger.warning("the store can be written again")
        self._trouble = trouble

    def _die(self, reason: str, error: Exception) -> None:
        """Acknowledge nothing more."""
        logger.critical("%s (%s)", reason, _name(error))
        self._dead = True
        self._keep_what_must_be()
        self._idle.set()
        self._on_fatal(reason)


def _name(error: Exception) -> str:
    """SQLite's own name of an error; the driver's errors of its own have none."""
    return getattr(error, "sqlite_errorname", None) or type(error).__name__
