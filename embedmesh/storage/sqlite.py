"""The gateway's side of the store: rules.ports.Keys and rules.ports.Ledger over one SQLite file.

Two connections: one writes, in batches (see writer); one reads, so that nobody waits for a COMMIT to learn who asks.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pysqlite3.dbapi2 as driver

from embedmesh.rules.errors import SetupError, StoreUnavailable
from embedmesh.rules.holds import Charge, Hold, HoldEnd
from embedmesh.rules.ports import Caller, Clock
from embedmesh.storage.check import verify
from embedmesh.storage.connect import (
    LOCK_WAIT_S,
    OPEN_BUSY_S,
    Db,
    check_version,
    connect,
    lock_for_gateway,
    make_file,
    migrate,
)
from embedmesh.storage.nodes import NodeBooks
from embedmesh.storage.secret import FACTS, check_secret
from embedmesh.storage.sql import load
from embedmesh.storage.tokens import hash_token, well_formed
from embedmesh.storage.writer import Writer
from embedmesh.storage.writes import EXPIRED_HOLDS_MAX, HOLDS, Capture, Expire, PlaceHold, Release, Stats

HOLD_S_MAX = 1.5  # a hold that is not durable by then is refused; the caller is told within 2 s (contract section 4)
DRAIN_S_MAX = 5.0  # a disk that does not answer must not keep us from ending; the next start recovers

FIND_KEY = load("keys.sql")["find_key"]
RUNNING = "gateway_running"  # a fact of the store from its opening until all was written and it was closed


def _ignore(reason: str) -> None:
    """For those who look at `healthy` instead."""


class SqliteStore:
    """The embedded store of one gateway. `stats` counts what became durable."""

    def __init__(
        self,
        reads: Db,
        writes: Db,
        descriptors: tuple[int, int],
        *,
        clock: Clock,
        key_secret: bytes,
        owner: str,
        on_fatal: Callable[[str], None],
        stats: Stats,
    ) -> None:
        self.stats = stats
        self._reads = reads
        self._writes = writes
        self._lock, self._wal = descriptors
        self._clock = clock
        self._key_secret = key_secret
        self._owner = owner
        self._writer = Writer(writes, clock, stats, partial(os.fdatasync, self._wal), on_fatal)
        self.nodes = NodeBooks(reads, self._writer, clock, key_secret)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        clock: Clock,
        key_secret: bytes,
        owner: str,
        on_fatal: Callable[[str], None] = _ignore,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> "SqliteStore":
        """Open or make the store, take its lock, release what a dead gateway left open. Raises SetupError.

        A gateway that still drains is waited for, up to `lock_wait_s`. After one that did not close the store, the
        ledger is verified first.
        `owner` names this gateway in the holds that it places. `on_fatal(reason)` is called once if the disk can no
        longer be trusted; the process should then exit without a word to its callers.
        """
        check_version()
        make_file(path)
        lock = await lock_for_gateway(path, lock_wait_s)
        opened: list[Db] = []
        try:
            opened.append(writes := connect(path, busy_s=OPEN_BUSY_S))
            migrate(writes, path)
            stats = Stats(recovered=_prepare(writes, key_secret, clock.unix_ms()))
            writes.execute("PRAGMA busy_timeout = 0")  # the writer waits by itself, without blocking the event loop
            writes.execute("PRAGMA wal_autocheckpoint = 0")  # the writer checkpoints by itself, and sees the errors
            opened.append(reads := connect(path, busy_s=0, read_only=True))
            wal = os.open(f"{path}-wal", os.O_RDONLY)  # the kernel tells it of every failed write-back from now on
        except BaseException:
            for db in opened:
                db.close()
            os.close(lock)
            raise
        return cls(
            reads, writes, (lock, wal), clock=clock, key_secret=key_secret, owner=owner, on_fatal=on_fatal, stats=stats
        )

    def find(self, token: str) -> Caller | None:
        """The caller behind a key, or None whatever is wrong with it. Read every time: a revoked key dies at once."""
        if not well_formed(token):
            return None
        key = {"token_hash": hash_token(token, self._key_secret), "now_ms": self._clock.unix_ms()}
        try:
            row = self._reads.execute(FIND_KEY, key).fetchone()
        except driver.Error:
            raise StoreUnavailable("API keys cannot be looked up now; try again soon.") from None
        if row is None:
            return None
        account_id, key_id, scopes = row
        return Caller(account_id=account_id, key_id=key_id, scopes=frozenset(scopes.split()))

    async def hold(self, hold: Hold) -> None:
        """Durably set money aside, or raise InsufficientQuota or StoreUnavailable; then nothing stays held."""
        write = PlaceHold(hold, self._owner)
        self._writer.submit(write)
        try:
            async with asyncio.timeout(HOLD_S_MAX):
                await write.outcome
        except TimeoutError:
            self._give_back(write)
            raise StoreUnavailable("The ledger did not answer in time; try again soon.") from None
        except asyncio.CancelledError:
            self._give_back(write)
            raise

    def capture(self, hold: Hold, charge: Charge) -> None:
        """End an open hold by charging it; written with the next batch, and kept until it is durable.

        Bounded without a limit of its own: there is at most one for each hold that became durable.
        """
        self._writer.submit(Capture(hold, charge))

    def release(self, hold: Hold, why: HoldEnd = HoldEnd.RELEASE) -> None:
        """End an open hold without charging; written with the next batch. Harmless after a capture.

        When too much is waiting already it is left to the sweep, which releases the hold at its deadline.
        """
        if not self._writer.full():
            self._writer.submit(Release(hold, why))

    async def expire(self, now_ms: int) -> int:
        """Release every hold whose deadline is before `now_ms`; returns how many. Raises StoreUnavailable."""
        total = 0
        while True:
            sweep = Expire(now_ms)
            self._writer.submit(sweep)
            try:
                async with asyncio.timeout(HOLD_S_MAX):
                    expired = await sweep.outcome
            except TimeoutError:
                raise StoreUnavailable("The ledger did not answer in time; the next sweep tries again.") from None
            total += expired
            if expired < EXPIRED_HOLDS_MAX:
                return total

    def healthy(self) -> bool:
        """Whether the store took the last thing it was asked to write."""
        return self._writer.healthy()

    async def drain(self) -> int:
        """Wait until everything queued is durable, at most DRAIN_S_MAX; returns how many writes still are not."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_S_MAX):
                await self._writer.drained()
        return self._writer.waiting()

    async def close(self) -> None:
        """Drain, then let go of the files and the lock."""
        lost = await self.drain()
        sound = self._writer.healthy()
        await self._writer.close()
        if sound and not lost:
            with suppress(driver.Error):  # then the next start verifies, for nothing
                self._writes.execute(FACTS["delete_fact"], {"name": RUNNING})
        self._reads.close()
        self._writes.close()
        os.close(self._wal)
        os.close(self._lock)

    def _give_back(self, write: PlaceHold) -> None:
        if write.covered:  # its batch is at the disk: should it become durable, this follows it
            self.release(write.hold)


def _prepare(db: Db, key_secret: bytes, now_ms: int) -> int:
    """Check the secret, verify the ledger if the last gateway died, and release what it left open.

    Returns how many holds that were.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
        check_secret(db, key_secret)
        opened = db.execute(FACTS["insert_fact"], {"name": RUNNING, "value": str(now_ms)})
        if opened.rowcount == 0 and (broken := verify(db)):
            first = broken[0]
            raise SetupError(
                f"The ledger does not add up after a crash ({first.promise}: {first.subject}: {first.detail}): "
                "keep the store's files, see `embedmesh ledger check`, and restore a backup."
            )
        recovered = db.execute(HOLDS["recover_holds"], {"now_ms": now_ms}).rowcount
        db.execute("COMMIT")
    except driver.Error as error:
        raise SetupError(f"The store cannot be written: {error}. Is its disk full or read-only?") from None
    return int(recovered)
