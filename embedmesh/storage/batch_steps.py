"""What a gateway does with a batch that it has: validation, units, the end.

Whatever it writes is written under its lease: if another gateway has taken the batch over, nothing is written, and
LeaseLost is raised. Every such write may be repeated when nobody knows what became of it: it is done once.

All writes lock the batch's account first, so that two gateways never wait for each other.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from embedmesh.rules.batches import (
    Batch,
    BatchLease,
    BatchPlan,
    BatchState,
    BatchUnit,
    FileRow,
    LeaseLost,
    LineError,
    Segment,
    UnitEnd,
    UsedTokens,
    line_request_id,
)
from embedmesh.rules.holds import Charge, PriorRequest
from embedmesh.rules.limits import (
    UNITS_A_WRITE_MAX,
)
from embedmesh.rules.tabs import TabState
from embedmesh.storage.batch_rows import DoneUnit, batch_of, done_unit_of, errors_text
from embedmesh.storage.db import Db, Row
from embedmesh.storage.files import values_of
from embedmesh.storage.ledger.batch_tab import BeginBatch, FinishUnit, check_charges
from embedmesh.storage.ledger.open_tab import end_tabs
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.writes import WaitedWrite, WriteDurably, as_rows
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import BATCHES_SQL, FILES_SQL

T = TypeVar("T")


class UnitResults(msgspec.Struct, frozen=True):
    """What a unit came to. `charges` name the line, from 0 on in the file; a line that failed has none."""

    unit: int
    segment: Segment
    charges: Sequence[tuple[int, Charge]]
    completed: int
    failed: int
    used: UsedTokens


class AwaitWrite(Protocol):
    """Writes, and waits until it is durable. Raises StoreUnavailable, or what the write says."""

    def __call__(self, write: WaitedWrite[T]) -> Awaitable[T]: ...


Place = Callable[[Callable[[], PlaceHold]], Awaitable[PriorRequest | None]]
"""Sets money aside; what it lacks is recalled from tabs first. See `Store.hold`."""


class LeasedBatches:
    """The steps of a batch under its lease. Methods raise StoreUnavailable, too."""

    def __init__(self, reads: Reads, write: WriteDurably, outcome: AwaitWrite, place: Place) -> None:
        self._reads = reads
        self._write = write
        self._outcome = outcome
        self._place = place

    async def find(self, account_id: str, batch_id: str) -> Batch | None:
        """A batch of the account."""
        rows = await self._reads.ask(BATCHES_SQL["find_batch"], {"account_id": account_id, "batch_id": batch_id})
        return batch_of(rows[0]) if rows else None

    # -- validation

    async def clear_units(self, lease: BatchLease) -> None:
        """Begin the validation anew: delete units of one that was broken off. Raises LeaseLost."""
        values = {"batch_id": lease.batch_id, "rows_max": UNITS_A_WRITE_MAX}

        def clear(db: Db, now_ms: int) -> int | None:
            if _state(db, lease) is not BatchState.VALIDATING:
                return None
            return db.execute(BATCHES_SQL["clear_units"], values).rowcount

        while held(await self._under(lease, clear)):
            pass

    async def add_units(self, lease: BatchLease, units: Sequence[BatchUnit]) -> None:
        """Add units that follow those that are there. Raises LeaseLost."""

        def add(part: Sequence[BatchUnit]) -> Callable[[Db, int], bool | None]:
            def write(db: Db, now_ms: int) -> bool | None:
                if _state(db, lease) is not BatchState.VALIDATING:
                    return None
                db.execute(BATCHES_SQL["add_units"], as_rows(part) | {"batch_id": lease.batch_id})
                return True

            return write

        for at in range(0, len(units), UNITS_A_WRITE_MAX):
            held(await self._under(lease, add(units[at : at + UNITS_A_WRITE_MAX])))

    async def begin(self, lease: BatchLease, plan: BatchPlan, *, bytes_max: int) -> Batch:
        """Set the batch's money aside, all of it, and put it in progress: both or neither.

        Raises LeaseLost, also where it was cancelled or its units are not those of the plan; InsufficientQuota, where
        the balance or a budget does not cover the sum, which is named; TooMuchKept, where the account may not keep so
        much output: `bytes_max` is how much it may keep in all. After these two call `fail`. RateLimited: try again.
        """
        batch = held(await self.find(lease.account_id, lease.batch_id))
        await self._place(lambda: BeginBatch(lease, batch.key_id, plan, bytes_max))
        return held(await self.find(lease.account_id, lease.batch_id))

    async def fail(self, lease: BatchLease, errors: Sequence[LineError], *, total: int = 0) -> Batch:
        """The validation has found errors: nothing is done. Raises LeaseLost."""
        values = {"batch_id": lease.batch_id, "epoch": lease.epoch, "errors": errors_text(errors), "total": total}
        return await self._move(lease, "fail_batch", values, BatchState.FAILED)

    # -- work

    async def open_units(self, lease: BatchLease, *, after: int = -1, limit: int) -> list[BatchUnit]:
        """Units that are not done, in their order, those after the unit `after`."""
        values = {"batch_id": lease.batch_id, "after": after, "rows_max": min(limit, UNITS_A_WRITE_MAX)}
        return [BatchUnit(*row) for row in await self._reads.ask(BATCHES_SQL["open_units"], values)]

    async def finish_unit(self, lease: BatchLease, results: UnitResults) -> UnitEnd:
        """Charge a unit's lines and mark it done: both or neither. Its segment is durable already.

        After StoreUnavailable say the same again, with the same segment. Raises LeaseLost, InternalError.
        """
        charges = [(line_request_id(lease.batch_id, line), charge) for line, charge in results.charges]
        check_charges(charges)
        about = results.completed, results.failed, results.used
        return await self._outcome(FinishUnit(lease, results.unit, results.segment, charges, *about))

    # -- the end

    async def finalize(self, lease: BatchLease) -> Batch:
        """All units are done: the output files follow. Raises LeaseLost, also where units are open."""
        values = {"batch_id": lease.batch_id, "epoch": lease.epoch}
        return await self._move(lease, "finalize_batch", values, BatchState.FINALIZING)

    async def done_units(self, lease: BatchLease, *, after: int = -1, limit: int) -> list[DoneUnit]:
        """Units that are done, in their order, those after the unit `after`."""
        values = {"batch_id": lease.batch_id, "after": after, "rows_max": min(limit, UNITS_A_WRITE_MAX)}
        return [done_unit_of(row) for row in await self._reads.ask(BATCHES_SQL["done_units"], values)]

    async def finish(self, lease: BatchLease, output: FileRow | None, errors: FileRow | None, *, failed: int) -> Batch:
        """End the batch: its files get their rows, what is left of its money goes back. Raises LeaseLost.

        It becomes what follows from its state: finalizing → completed, cancelling → cancelled, in_progress or
        validating → expired. `failed` is how many lines are in the error file; it is counted as at least those that are
        known to have failed, and at most all that were not completed. The files' contents are durable already.
        """
        files = [file for file in (output, errors) if file is not None]
        ids = (output.file_id if output else None), (errors.file_id if errors else None)
        values = {"batch_id": lease.batch_id, "epoch": lease.epoch, "output_file_id": ids[0], "error_file_id": ids[1]}

        def finish(db: Db, now_ms: int) -> Row | None:
            found = db.execute(BATCHES_SQL["batch_of_lease"], values).fetchone()
            if found is None:
                return None
            state, output_id, error_id, completed, failed_now, total = found
            if not BatchState(state).final:
                end_tabs(db, now_ms, [lease.batch_id], TabState.CLOSED)()
                for file in files:
                    db.execute(FILES_SQL["add_output_file"], values_of(file))
                counted = min(max(failed, failed_now), total - completed)
                db.execute(BATCHES_SQL["finish_batch"], values | {"now_ms": now_ms, "failed": counted})
            elif (output_id, error_id) != ids:
                return None
            return read_batch(db, lease.account_id, lease.batch_id)

        return batch_of(held(await self._under(lease, finish)))

    # -- within

    async def _move(self, lease: BatchLease, statement: str, values: dict[str, Any], to: BatchState) -> Batch:
        """Move a batch that a gateway has; one that it has moved there already stays as it is."""

        def move(db: Db, now_ms: int) -> Row | None:
            db.execute(BATCHES_SQL[statement], values | {"now_ms": now_ms})
            return read_batch(db, lease.account_id, lease.batch_id) if _state(db, lease) is to else None

        return batch_of(held(await self._under(lease, move)))

    async def _under(self, lease: BatchLease, write: Callable[[Db, int], T]) -> T:
        return await self._write(write, frozenset({lease.account_id}))


def _state(db: Db, lease: BatchLease) -> BatchState | None:
    """Where a batch stands that a gateway has; None where it has it no longer."""
    values = {"batch_id": lease.batch_id, "epoch": lease.epoch}
    found = db.execute(BATCHES_SQL["batch_of_lease"], values).fetchone()
    return None if found is None else BatchState(found[0])


def read_batch(db: Db, account_id: str, batch_id: str) -> Row | None:
    """A batch of an account, for `batch_of`."""
    return db.execute(BATCHES_SQL["find_batch"], {"account_id": account_id, "batch_id": batch_id}).fetchone()


def held(found: T | None) -> T:
    """What a write under a lease has found. Raises LeaseLost for None."""
    if found is None:
        raise LeaseLost("another gateway has the batch, or it has moved on")
    return found
