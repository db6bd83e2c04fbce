"""Batches and their units in the store. Reads are plain; writes wait until they are durable.

Whatever a gateway writes about a batch that it works on is written under its lease: if another gateway has taken the
batch over, nothing is written and LeaseLost is raised.
"""

from collections.abc import Sequence

import msgspec

from embedmesh.rules.batches import (
    Batch,
    BatchLease,
    BatchPlan,
    FileRow,
    LineError,
    NewBatch,
    Segment,
    Unit,
    UnitEnd,
    UsedTokens,
)
from embedmesh.rules.holds import Charge
from embedmesh.rules.ports import Clock
from embedmesh.storage.ledger.writes import WriteDurably
from embedmesh.storage.reads import Reads

BATCH_LEASE_S = 10.0  # a batch whose gateway has died goes on within this time and one look
BATCH_RENEW_S = 3.0  # three tries within a lease


class BatchesPage(msgspec.Struct, frozen=True):
    """A page of an account's batches; `more`: there are others after it."""

    batches: list[Batch]
    more: bool


class UnitResults(msgspec.Struct, frozen=True):
    """What a unit came to. `charges` name the line, from 0 on in the file; a line that failed has none."""

    unit: int
    segment: Segment
    charges: Sequence[tuple[int, Charge]]
    completed: int
    failed: int
    used: UsedTokens


class DoneUnit(msgspec.Struct, frozen=True):
    """A unit that is done, and where its results are."""

    unit: Unit
    segment: Segment


class Batches:
    """The batches of one store. Methods raise StoreUnavailable; then nobody knows what became of a write."""

    def __init__(self, reads: Reads, write: WriteDurably, clock: Clock) -> None:
        self._reads = reads
        self._write = write
        self._clock = clock

    # -- by their account

    async def create(self, new: NewBatch) -> Batch:
        """Raises NotFound (the account has no such file), InvalidValue (it is no batch's input), Overloaded."""
        raise NotImplementedError

    async def find(self, account_id: str, batch_id: str) -> Batch | None:
        """A batch of the account."""
        raise NotImplementedError

    async def page(self, account_id: str, *, after: str | None = None, limit: int) -> BatchesPage:
        """A page of the account's batches, the newest first, after the batch `after`."""
        raise NotImplementedError

    async def cancel(self, account_id: str, batch_id: str) -> Batch | None:
        """Have it begin nothing more; the batch as it is then. One that is past that stays as it is."""
        raise NotImplementedError

    # -- leases

    async def lease(self) -> tuple[BatchLease, Batch] | None:
        """Take a batch that no gateway has, of an account that has the fewest under way; None where there is none.

        The lease lasts BATCH_LEASE_S: renew it every BATCH_RENEW_S.
        """
        raise NotImplementedError

    async def renew(self, lease: BatchLease) -> Batch:
        """Keep the batch; how it is now. It is cancelled here if its key was revoked. Raises LeaseLost."""
        raise NotImplementedError

    async def release(self, lease: BatchLease) -> None:
        """Let another gateway take it at once. Harmless if the lease was lost."""
        raise NotImplementedError

    # -- validation

    async def clear_units(self, lease: BatchLease) -> None:
        """Begin the validation anew: delete units of one that was broken off. Raises LeaseLost."""
        raise NotImplementedError

    async def add_units(self, lease: BatchLease, units: Sequence[Unit]) -> None:
        """Add units that follow those that are there, at most UNITS_A_WRITE_MAX at a time. Raises LeaseLost."""
        raise NotImplementedError

    async def begin(self, lease: BatchLease, plan: BatchPlan, *, bytes_max: int) -> Batch:
        """Set the batch's money aside, all of it, and put it in progress: both or neither.

        Raises LeaseLost; InsufficientQuota, where the balance or a budget does not cover the sum, which is named;
        TooMuchKept, where the account may not keep so much output: `bytes_max` is how much it may keep in all.
        Then call `fail`.
        """
        raise NotImplementedError

    async def fail(self, lease: BatchLease, errors: Sequence[LineError], *, total: int = 0) -> Batch:
        """The validation has found errors: nothing is done. Raises LeaseLost."""
        raise NotImplementedError

    # -- work

    async def open_units(self, lease: BatchLease, *, after: int = -1, limit: int) -> list[Unit]:
        """Units that are not done, in their order, those after the unit `after`."""
        raise NotImplementedError

    async def finish_unit(self, lease: BatchLease, results: UnitResults) -> UnitEnd:
        """Charge a unit's lines and mark it done: both or neither. Its segment is durable already. Raises LeaseLost."""
        raise NotImplementedError

    # -- the end

    async def finalize(self, lease: BatchLease) -> Batch:
        """All units are done: the output files follow. Raises LeaseLost, also where units are open."""
        raise NotImplementedError

    async def done_units(self, lease: BatchLease, *, after: int = -1, limit: int) -> list[DoneUnit]:
        """Units that are done, in their order, those after the unit `after`."""
        raise NotImplementedError

    async def finish(self, lease: BatchLease, output: FileRow | None, errors: FileRow | None, *, failed: int) -> Batch:
        """End the batch: its files get their rows, what is left of its money goes back. Raises LeaseLost.

        It becomes what follows from its state: finalizing → completed, cancelling → cancelled, in_progress or
        validating → expired. `failed` is how many lines are in the error file. The files' contents are durable already.
        """
        raise NotImplementedError

    # -- upkeep

    async def ended(self, batch_ids: Sequence[str]) -> set[str]:
        """Those of some batches that have ended or are not known: their segments are of no use."""
        raise NotImplementedError

    async def forget(self) -> int:
        """Delete batches that ended long ago; how many."""
        raise NotImplementedError
