"""The money of batches: a tab of its own for each, opened over the exact sum, settled unit by unit, closed at the end.

The tab of a batch has the batch's id and is its own owner. No gateway spends it in memory, so it is neither recalled
nor recovered: whichever gateway has the batch settles it, and the sweep ends it if none does in time.
"""

from collections.abc import Sequence

import msgspec

from embedmesh.rules.batches import BatchLease, BatchPlan, LeaseLost, Segment, UnitEnd, UsedTokens
from embedmesh.rules.errors import InternalError, StoreUnavailable
from embedmesh.rules.file_failures import TooMuchKept
from embedmesh.rules.holds import Hold
from embedmesh.rules.limits import BATCH_GRACE_S
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.charge_holds import REVENUE, node_account
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.settle_tab import Delivered, SettleTab, settle
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, later_ids
from embedmesh.storage.sql import BATCHES_SQL

VALIDATING, IN_PROGRESS = "validating", "in_progress"


class BeginBatch(PlaceHold):
    """Set all of a batch's money aside, and put it in progress: both or neither. The same again changes nothing.

    `outcome` becomes None once that is durable, or raises what PlaceHold does, LeaseLost or TooMuchKept.
    """

    rank = 4  # as OpenTab

    def __init__(self, lease: BatchLease, key_id: str, plan: BatchPlan, bytes_max: int) -> None:
        hold = Hold(lease.batch_id, lease.account_id, plan.amount_nanousd, 0, key_id)
        super().__init__(hold, lease.batch_id, None, lambda _: None)
        self._lease = lease
        self._values = msgspec.structs.asdict(plan) | {
            "batch_id": lease.batch_id,
            "account_id": lease.account_id,
            "epoch": lease.epoch,
            "amount": plan.amount_nanousd,
            "prices": msgspec.json.encode(plan.prices).decode(),
            "grace_ms": int(BATCH_GRACE_S * 1000),
            "bytes_max": bytes_max,
        }
        self._before: Exception | None = None  # why nothing was tried
        self._was_begun = False

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[BeginBatch]") -> None:  # type: ignore[override]
        for write in writes:
            write._placed_ids, write._placed, write._refusal, write._before = None, False, None, None
            if not write.outcome.done():
                write._begin(db, now_ms)

    def _begin(self, db: Db, now_ms: int) -> None:
        values = self._values | {"now_ms": now_ms}
        db.execute(BATCHES_SQL["cancel_if_revoked"], values)
        found = db.execute(BATCHES_SQL["batch_of_lease"], values).fetchone()
        state = None if found is None else found[0]
        self._was_begun = state == IN_PROGRESS  # by this lease: nobody heard of it
        if self._was_begun:
            return
        units, lines = db.execute(BATCHES_SQL["count_units"], values).fetchall()[0]
        if state != VALIDATING or (units, lines) != (values["units"], values["lines"]):
            self._before = LeaseLost("the batch has another gateway, or was cancelled")
        elif db.execute(BATCHES_SQL["has_room_for_output"], values).fetchone() not in ((1,), (True,)):
            self._before = TooMuchKept(
                f"The batch's output may take {values['output_bytes']:,} bytes. With the files that the account keeps "
                f"that is more than the {values['bytes_max']:,} bytes that it may keep: delete files, or cut the batch."
            )
        else:
            self._placed_ids = later_ids(db, BATCHES_SQL["open_batch_tab"], values)
            db.execute(BATCHES_SQL["begin_batch"], values)

    def committed(self, stats: Stats) -> None:
        stats.tabs_opened += self._placed
        if self._before is not None:
            self._fail(self._before)
        elif self._refusal is not None and not self.outcome.done():
            self._fail(self._refusal.failure)
        elif self._placed or self._was_begun:
            self._succeed(None)


class FinishUnit(WaitedWrite[UnitEnd]):
    """Charge a unit's lines and mark it done: both or neither. The same again changes nothing.

    `outcome` becomes what became of the unit once that is durable, or raises LeaseLost.
    """

    rank = 0  # as SettleTab

    def __init__(
        self,
        lease: BatchLease,
        unit: int,
        segment: Segment,
        charges: Sequence[Delivered],
        completed: int,
        failed: int,
        used: UsedTokens,
    ) -> None:
        super().__init__()
        self._lease = lease
        self._segment = segment
        self._charges = charges
        self.weight = max(1, len(charges))
        self._values = {
            "batch_id": lease.batch_id,
            "epoch": lease.epoch,
            "unit": unit,
            "segment": segment.name,
            "output_bytes": segment.output_bytes,
            "error_bytes": segment.error_bytes,
            "completed": completed,
            "failed": failed,
            "charged": len(charges),
            "cost": sum(charge.cost_nanousd for _, charge in charges),
            "input_tokens": used.input,
            "cached_tokens": used.cached,
            "output_tokens": used.output,
        }
        self._end: UnitEnd | None = None  # None: the lease was lost
        self._charged_now = False

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        paid = {node_account(each.node_id) for _, charge in self._charges for each in charge.payables}
        return {self._lease.account_id, REVENUE, *paid}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[FinishUnit]") -> None:
        for write in writes:
            write._charged_now = False
            if not write.outcome.done():
                write._apply(db, now_ms)

    def _apply(self, db: Db, now_ms: int) -> None:
        if not db.execute(BATCHES_SQL["finish_unit"], self._values).fetchall():
            self._end = self._why_not(db)
            return
        if self._charges:
            settle(db, now_ms, [SettleTab(self._lease.batch_id, self._lease.account_id, self._charges)])
        db.execute(BATCHES_SQL["count_unit"], self._values)
        self._end, self._charged_now = UnitEnd.DONE, True

    def _why_not(self, db: Db) -> UnitEnd | None:
        found = db.execute(BATCHES_SQL["why_not_finished"], self._values).fetchone()
        segment, ours = found if found is not None else (None, False)
        if segment == self._segment.name:
            return UnitEnd.DONE  # by this very write, of which nobody heard
        if not ours:
            return None
        return UnitEnd.DONE_BEFORE if segment is not None else UnitEnd.NO_MONEY

    def committed(self, stats: Stats) -> None:
        if self._charged_now:
            stats.units_finished += 1
            stats.captured += len(self._charges)
            stats.captured_under_tabs += len(self._charges)
        if self._end is None:
            self._fail(LeaseLost("another gateway has the batch"))
        else:
            self._succeed(self._end)

    def failed(self, reason: str) -> None:
        self._fail(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        self._fail(InternalError("The ledger refused to charge the lines of a batch."))


def check_charges(charges: Sequence[Delivered]) -> None:
    """Raise ValueError for charges that no ledger could take: a bug of ours, for which nobody pays."""
    ids = {request_id for request_id, _ in charges}
    if len(ids) != len(charges) or not all(charge.is_sound(AMOUNT_MAX_NANOUSD) for _, charge in charges):
        raise ValueError("a line is charged once, and a node's part is at most what it cost")
