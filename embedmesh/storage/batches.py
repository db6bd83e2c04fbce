"""Batches in the store, by their account, and who has them. See `batch_steps` for what is done with them."""

import asyncio
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec

from embedmesh.rules.batches import (
    Batch,
    BatchLease,
    FilePurpose,
    NewBatch,
)
from embedmesh.rules.errors import NotFound, Overloaded, RateLimited, StoreUnavailable
from embedmesh.rules.ids import first_id, new_id
from embedmesh.rules.limits import (
    BATCH_KEPT_S,
    BATCHES_OF_ACCOUNT_A_DAY_MAX,
    BATCHES_OPEN_MAX,
    BATCHES_OPEN_OF_ACCOUNT_MAX,
    BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX,
    PAGE_ROWS_MAX,
    UNITS_A_WRITE_MAX,
)
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import ACCOUNT_SHARE
from embedmesh.storage.batch_rows import batch_of, values_of_new
from embedmesh.storage.batch_steps import AwaitWrite, LeasedBatches, Place, held, read_batch
from embedmesh.storage.db import Db, Row
from embedmesh.storage.files import file_of
from embedmesh.storage.ledger.writes import KeptChange, SubmitWrite, WriteDurably, as_rows
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import BATCHES_SQL, FILES_SQL
from embedmesh.storage.times import MS_PER_DAY

BATCH_LEASE_S = 10.0  # a batch whose gateway has died goes on within this time and one look
BATCH_RENEW_S = 3.0  # three tries within a lease
CANDIDATES_MAX = 8  # batches that nobody has and that are tried, the best first: others may be faster
LAST = "\x7f"  # sorts after every id
LATER_S = 60.0  # when to try again while there are too many batches
LIMITS = {
    "of_account": BATCHES_OPEN_OF_ACCOUNT_MAX,
    "of_all": BATCHES_OPEN_MAX,
    "share": ACCOUNT_SHARE,
    "a_day": BATCHES_OF_ACCOUNT_A_DAY_MAX,
    "unpaid_a_day": BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX,
}

T = TypeVar("T")


class BatchesPage(msgspec.Struct, frozen=True):
    """A page of an account's batches; `more`: there are others after it."""

    batches: list[Batch]
    more: bool


class Batches(LeasedBatches):
    """The batches of one store, as the gateway `owner` sees them. Methods raise StoreUnavailable, too."""

    def __init__(
        self,
        reads: Reads,
        write: WriteDurably,
        submit: SubmitWrite,
        outcome: AwaitWrite,
        place: Place,
        owner: str,
        clock: Clock,
    ) -> None:
        super().__init__(reads, write, outcome, place)
        self._submit = submit
        self._owner = owner
        self._clock = clock

    # -- by their account

    async def create(self, new: NewBatch) -> Batch:
        """Raises NotFound (the account has no such file for batches), RateLimited, Overloaded.

        If it cannot be known whether the batch was made, it is deleted.
        """
        batch_id, account = new_id("batch", self._clock), frozenset({new.account_id})
        values = values_of_new(new) | LIMITS | {"batch_id": batch_id, "since_id": self._a_day_ago()}

        def create(db: Db, now_ms: int) -> bool:
            return bool(db.execute(BATCHES_SQL["create_batch"], values | {"now_ms": now_ms}).fetchall())

        try:
            made = await self._write(create, account)
        except (StoreUnavailable, asyncio.CancelledError):
            self._submit(KeptChange(lambda db, now_ms: _undo(db, now_ms, new.account_id, batch_id), account))
            raise
        batch = await self.find(new.account_id, batch_id) if made else None
        if batch is None:
            raise await self._why_not(new)
        return batch

    async def page(self, account_id: str, *, after: str | None = None, limit: int) -> BatchesPage:
        """A page of at most `limit`, and PAGE_ROWS_MAX, of the account's batches, the newest first, after `after`."""
        limit = min(limit, PAGE_ROWS_MAX)
        values = {"account_id": account_id, "after": after or LAST, "rows_max": limit + 1}
        rows = await self._reads.ask(BATCHES_SQL["batches_before"], values)
        return BatchesPage([batch_of(row) for row in rows[:limit]], len(rows) > limit)

    async def cancel(self, account_id: str, batch_id: str) -> Batch | None:
        """Have it begin nothing more; the batch as it is then. One that is past that stays as it is."""
        values = {"account_id": account_id, "batch_id": batch_id}

        def cancel(db: Db, now_ms: int) -> Row | None:
            db.execute(BATCHES_SQL["cancel_batch"], values | {"now_ms": now_ms})
            return read_batch(db, account_id, batch_id)

        found = await self._write(cancel, frozenset({account_id}))
        return None if found is None else batch_of(found)

    # -- leases

    async def lease(self, without: Sequence[str] = ()) -> tuple[BatchLease, Batch] | None:
        """Take a batch that no gateway has, of an account that has the fewest under way; None where there is none.

        Those of the accounts `without` stay where they are.

        The lease lasts BATCH_LEASE_S: renew it every BATCH_RENEW_S.
        """
        now_ms = self._clock.unix_ms()
        free = as_rows([(each,) for each in without]) | {"now_ms": now_ms, "rows_max": CANDIDATES_MAX}
        for batch_id, account_id in await self._reads.ask(BATCHES_SQL["free_batches"], free):
            taken = await self._write(self._take(batch_id, account_id), frozenset({account_id}))
            if taken is not None:
                epoch, row = taken
                return BatchLease(batch_id, account_id, epoch), batch_of(row)
        return None

    async def renew(self, lease: BatchLease) -> Batch:
        """Keep the batch; how it is now. It is cancelled here if its key was revoked. Raises LeaseLost."""

        def renew(db: Db, now_ms: int) -> Row | None:
            values = {"batch_id": lease.batch_id, "epoch": lease.epoch, "until_ms": _until_ms(now_ms), "now_ms": now_ms}
            if not db.execute(BATCHES_SQL["keep_batch"], values).fetchall():
                return None
            db.execute(BATCHES_SQL["cancel_if_revoked"], values)
            return read_batch(db, lease.account_id, lease.batch_id)

        return batch_of(held(await self._under(lease, renew)))

    async def release(self, lease: BatchLease) -> None:
        """Let another gateway take it at once. Harmless if the lease was lost, or the batch is over."""
        values = {"batch_id": lease.batch_id, "epoch": lease.epoch, "until_ms": 0}
        await self._under(lease, lambda db, _: db.execute(BATCHES_SQL["keep_batch"], values).fetchall())

    # -- upkeep

    async def ended(self, batch_ids: Sequence[str]) -> set[str]:
        """Those of some batches that have ended or are not known: their segments are of no use."""
        rows = await self._reads.ask(BATCHES_SQL["open_of_batches"], as_rows([(each,) for each in batch_ids]))
        return set(batch_ids) - {batch_id for (batch_id,) in rows}

    async def unswept(self) -> list[str]:
        """Batches that are over and have units yet: delete their segments, then call `sweep`."""
        rows = await self._reads.ask(BATCHES_SQL["unswept_batches"], {"rows_max": PAGE_ROWS_MAX})
        return [batch_id for batch_id, _ in rows]

    async def sweep(self, batch_id: str) -> None:
        """Delete the units of a batch that is over."""
        values = {"batch_id": batch_id, "rows_max": UNITS_A_WRITE_MAX}
        while await self._write(lambda db, _: db.execute(BATCHES_SQL["clear_units"], values).rowcount):
            pass
        await self._write(lambda db, _: db.execute(BATCHES_SQL["sweep_batch"], values).rowcount)

    async def forget(self) -> int:
        """Delete batches that ended long ago, at most PAGE_ROWS_MAX; how many."""
        old = {"kept_from_ms": self._clock.unix_ms() - BATCH_KEPT_S * 1000, "rows_max": PAGE_ROWS_MAX}
        rows = as_rows([(batch_id,) for batch_id, _ in await self._reads.ask(BATCHES_SQL["old_batches"], old)])
        return len(await self._write(lambda db, _: db.execute(BATCHES_SQL["forget_batches"], rows).fetchall()))

    # -- within

    def _take(self, batch_id: str, account_id: str) -> Callable[[Db, int], tuple[int, Row] | None]:
        def take(db: Db, now_ms: int) -> tuple[int, Row] | None:
            values = {"batch_id": batch_id, "owner": self._owner, "now_ms": now_ms, "until_ms": _until_ms(now_ms)}
            epoch = db.execute(BATCHES_SQL["take_batch"], values).fetchone()
            row = read_batch(db, account_id, batch_id)
            return None if epoch is None or row is None else (epoch[0], row)

        return take

    async def _why_not(self, new: NewBatch) -> NotFound | RateLimited | Overloaded:
        values = {"account_id": new.account_id, "since_id": self._a_day_ago()}
        ((mine, today, unpaid),) = await self._reads.ask(BATCHES_SQL["count_batches"], values)
        if mine >= BATCHES_OPEN_OF_ACCOUNT_MAX:
            words = f"An account may have {BATCHES_OPEN_OF_ACCOUNT_MAX} batches that are not over. Wait, or cancel one."
            return RateLimited(words, retry_after_s=LATER_S)
        if today >= BATCHES_OF_ACCOUNT_A_DAY_MAX:
            words = f"An account may make {BATCHES_OF_ACCOUNT_A_DAY_MAX:,} batches in 24 hours. Put more lines in each."
            return RateLimited(words, retry_after_s=LATER_S)
        if unpaid >= BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX:
            words = f"{unpaid:,} batches of this account in 24 hours have come to nothing yet. See their errors first."
            return RateLimited(words, retry_after_s=LATER_S)
        if await self._has_input(new):
            return Overloaded("There are as many batches as there may be, of each account a share. Try again later.")
        return NotFound("There is no such file with the purpose batch.", param="input_file_id")

    async def _has_input(self, new: NewBatch) -> bool:
        values = {"account_id": new.account_id, "file_id": new.input_file_id, "now_ms": self._clock.unix_ms()}
        rows = await self._reads.ask(FILES_SQL["find_file"], values)
        return bool(rows) and file_of(rows[0]).purpose is FilePurpose.BATCH

    def _a_day_ago(self) -> str:
        return first_id("batch", self._clock.unix_ms() - MS_PER_DAY)


def _until_ms(now_ms: int) -> int:
    return now_ms + int(BATCH_LEASE_S * 1000)


def _undo(db: Db, now_ms: int, account_id: str, batch_id: str) -> None:
    """A batch of which its caller did not hear: it was never there, or, once it is worked on, does nothing more."""
    values = {"account_id": account_id, "batch_id": batch_id, "now_ms": now_ms}
    db.execute(BATCHES_SQL["drop_batch"], values)
    db.execute(BATCHES_SQL["cancel_batch"], values)
