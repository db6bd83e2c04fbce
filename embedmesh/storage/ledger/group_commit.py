"""Group commit: the writes that arrive while one batch is being made durable are the next batch; there is no timer.

A batch that fails as a whole (disk full, read-only, no server) fails the writes that callers wait for. The others are
tried again every RETRY_S, in order, until they are durable. A Medium makes a batch durable.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import OnFatal, errors, name_of
from embedmesh.storage.ledger.batch import WriteBatch
from embedmesh.storage.ledger.writes import Stats, Write

QUEUE_WRITES_MAX = 8_192  # about half a second of writing; a caller that would wait longer is refused at once
STUCK_S_MAX = 1.5  # a batch that takes longer is a disk, or a server, that does not answer
RETRY_S = 0.5  # between two tries while the store cannot be written
WRITE_PROBE_EVERY_S = 4.0  # the sweep comes every 5 s, so that a bad disk is noticed within 10 s

logger = logging.getLogger(__name__)


class Fatal(Exception):
    """Nobody knows what the disk holds: nothing more may be acknowledged."""


class Medium(Protocol):
    """How a batch becomes durable."""

    async def write(self, batch: WriteBatch, *, patient: bool) -> None:
        """One transaction around the batch. Raises `errors()` where it is not durable, or nobody knows, and Fatal.

        `patient`: wait for other processes that write.
        """

    async def between_batches(self) -> None:
        """What else has to be done now and then. Raises Fatal."""

    async def close(self) -> None:
        """Wait for what is being written."""


class Writer:
    """The one writer of a gateway's store. Made on a running event loop; `close` ends it."""

    def __init__(self, medium: Medium, clock: Clock, stats: Stats, on_fatal: OnFatal) -> None:
        self._medium = medium
        self._clock = clock
        self._stats = stats
        self._on_fatal = on_fatal
        self._queue: deque[Write] = deque()
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._batch: list[Write] = []  # being written
        self._began_s: float | None = None  # when that began
        self._trouble = ""  # why the last batch failed; empty when it did not
        self._dead = False
        self._probed_s = clock.monotonic()
        self._listeners: list[Callable[[], None]] = []
        self._task = asyncio.get_running_loop().create_task(self._run(), name="store writer")

    def submit(self, write: Write) -> None:
        """Queue a write. Raises StoreUnavailable where it could not be written soon, unless it must be kept."""
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

    def on_health(self, call: Callable[[], None]) -> None:
        """Have `call` called as soon as a batch has failed, or succeeds again. That one takes long is not told."""
        self._listeners.append(call)

    async def drained(self) -> None:
        """Wait until nothing is queued or being written."""
        await self._idle.wait()

    def waiting(self) -> int:
        """How many writes are queued or being written."""
        return len(self._queue) + len(self._batch)

    async def close(self) -> None:
        """Stop writing; what is queued is lost, so drain first. A batch that is being made durable is waited for."""
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._medium.close()

    async def _run(self) -> None:
        try:
            while not self._dead:
                await self._work.wait()
                self._began_s = self._clock.monotonic()
                await self._write_batch()
                await self._medium.between_batches()
                self._began_s = None
                if not self._queue:
                    self._idle.set()
                if self._trouble:
                    await asyncio.sleep(RETRY_S)
                elif not self._queue:
                    self._work.clear()
        except Fatal as error:
            self._die(str(error))
        except Exception as error:  # noqa: BLE001 - a writer that died in silence would stop every caller
            self._die(f"the store's writer failed: {type(error).__name__}")

    async def _write_batch(self) -> None:
        now_s = self._clock.monotonic()
        if probe := bool(self._trouble) or now_s - self._probed_s > WRITE_PROBE_EVERY_S:
            self._probed_s = now_s
        batch = WriteBatch(self._queue, self._clock, probe=probe)
        self._batch = batch.writes
        try:
            await self._medium.write(batch, patient=not self._trouble)
        except errors() as error:
            self._stats.failed_batches += 1
            self._note(trouble=name_of(error))
            self._keep_what_must_be()
            return
        self._note(trouble="")
        self._stats.commits += 1
        self._stats.writes += len(batch.writes)
        self._stats.broken_writes += batch.refused
        self._stats.largest_batch = max(self._stats.largest_batch, len(batch.writes))
        self._batch = []
        for write in batch.applied:
            write.committed(self._stats)

    def _keep_what_must_be(self) -> None:
        """WriteBatch and queue become the queue, in order, without the writes that callers wait for."""
        waiting = [*self._batch, *self._queue]
        self._batch = []
        self._queue = deque(write for write in waiting if write.kept)
        for write in waiting:
            if not write.kept:
                write.failed("The ledger cannot be written now; try again soon.")

    def _note(self, trouble: str) -> None:
        if trouble and not self._trouble:
            logger.error("the store cannot be written (%s); trying every %s s", trouble, RETRY_S)
        elif self._trouble and not trouble:
            logger.warning("the store can be written again")
        changed, self._trouble = bool(trouble) != bool(self._trouble), trouble
        if changed:
            self._tell()

    def _die(self, reason: str) -> None:
        """Acknowledge nothing more."""
        logger.critical("%s", reason)
        self._dead = True
        self._keep_what_must_be()
        self._idle.set()
        self._tell()
        self._on_fatal(reason)

    def _tell(self) -> None:
        for call in self._listeners:
            call()
