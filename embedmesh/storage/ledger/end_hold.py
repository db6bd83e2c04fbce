"""Ending holds: by a charge, by a release, or by expiry."""

import logging
from collections.abc import Callable, Sequence

from embedmesh.rules.holds import NOTED, Charge, Hold, HoldEnd
from embedmesh.rules.tabs import TabState
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.charge_holds import accounts_of, charge_holds
from embedmesh.storage.ledger.lost_holds import EndedHolds, LostHolds, drop_notes
from embedmesh.storage.ledger.open_tab import end_tabs
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, Write, as_rows, later_ids
from embedmesh.storage.sql import CLAIMS_SQL, HOLDS_SQL, TABS_SQL

EXPIRED_HOLDS_MAX = 256  # a batch: about two milliseconds
NOTED_ENDS = {end.value for end in NOTED.values()}

logger = logging.getLogger(__name__)


class EndHold(Write):
    """End an open hold: by charging it, or without. A hold that has ended stays as it is.

    Kept until it is durable: nobody waits for it, and it must not be lost. If the store refuses it, the sweep will
    end the hold.
    """

    def __init__(
        self,
        hold: Hold,
        why: HoldEnd,
        charge: Charge | None = None,
        reply: bytes | None = None,
        *,
        noted: bool = False,
    ) -> None:
        """`reply` is kept for later requests with the same Idempotency-Key. `noted`: it may have a note, to delete."""
        self.hold = hold
        self.why = why
        self.charge = charge
        self.reply = reply
        self.noted = noted
        self._ended_ids: Callable[[], frozenset[str]] | None = None  # of all holds that ended with this one
        self._ended = False
        self._ended_by: str | None = None  # by what else, if a capture came too late

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self.hold.account_id} if self.charge is None else accounts_of(self.hold, self.charge)

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[EndHold]") -> None:
        first: dict[str, EndHold] = {}
        for write in writes:
            write._ended, write._ended_by, write._ended_ids = False, None, None
            first.setdefault(write.hold.hold_id, write)  # a hold ends once: the first write says how
        if released := [write for write in first.values() if write.charge is None]:
            rows = as_rows([{"hold_id": write.hold.hold_id, "ended_by": write.why.value} for write in released])
            ended_ids = later_ids(db, HOLDS_SQL["release_holds"], rows | {"now_ms": now_ms})
            for write in released:
                write._ended_ids = ended_ids
        if captured := [(write, write.charge) for write in first.values() if write.charge is not None]:
            ended_ids = _capture(db, now_ms, [(write.hold, charge) for write, charge in captured])
            for write, _ in captured:
                write._ended_ids = ended_ids
                if write.reply is not None:
                    db.execute(CLAIMS_SQL["keep_reply"], {"hold_id": write.hold.hold_id, "reply": write.reply})
        if noted := [write.hold.hold_id for write in writes if write.noted]:
            drop_notes(db, noted)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[EndHold]") -> None:
        for write in writes:
            write._ended = write._ended_ids is not None and write.hold.hold_id in write._ended_ids()
            if write.charge is not None and not write._ended:
                found = db.execute(HOLDS_SQL["hold_end"], {"hold_id": write.hold.hold_id}).fetchone()
                ended_by = None if found is None else found[0]
                write._ended_by = None if ended_by == HoldEnd.CAPTURE.value else ended_by or "nothing"

    def committed(self, stats: Stats) -> None:
        if self.charge is None:
            stats.released += self._ended
            return
        stats.captured += self._ended
        if self._ended_by is not None:
            stats.late_captures += 1
            charged = "charged at its note" if self._ended_by in NOTED_ENDS else "not charged"
            words, known = "hold %s had ended before it was captured: delivered, %s", {"request_id": self.hold.hold_id}
            logger.warning(words, self.hold.hold_id, charged, extra=known)


class Expire(WaitedWrite[int]):
    """End holds and tabs past their deadline, at most EXPIRED_HOLDS_MAX of each. What has a note is charged for that.

    `outcome` becomes how many, once durable. Whatever is captured or extended in the same batch comes before.
    """

    rank = 1

    def __init__(self, until_ms: int) -> None:
        super().__init__()
        self._until_ms = until_ms
        self._overdue = LostHolds(())
        self._overdue_tabs: list[str] = []
        self._ended = EndedHolds()
        self._of_locks: frozenset[str] = frozenset()  # holds of locks that no request had used
        self._locks = 0
        self._captured = 0
        self._released = 0
        self._ended_tab_ids: Callable[[], frozenset[str]] = frozenset
        self._expired_tabs = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        limits = {"now_ms": self._until_ms, "holds_max": EXPIRED_HOLDS_MAX}
        found = db.execute(HOLDS_SQL["overdue_holds"], limits).fetchall()
        self._overdue = LostHolds([row[:-1] for row in found])
        self._of_locks = frozenset(row[0] for row in found if row[-1])
        tabs = db.execute(
            TABS_SQL["overdue_tabs"], {"now_ms": self._until_ms, "tabs_max": EXPIRED_HOLDS_MAX}
        ).fetchall()
        self._overdue_tabs = [tab_id for tab_id, _ in tabs]
        return self._overdue.accounts | {account_id for _, account_id in tabs}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        for write in writes:
            write._ended = write._overdue.end(db, now_ms, HoldEnd.EXPIRE, write._until_ms)
            write._ended_tab_ids = end_tabs(db, now_ms, write._overdue_tabs, TabState.EXPIRED)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        for write in writes:
            released = write._ended.released()
            write._locks = len(released & write._of_locks)
            write._captured, write._released = len(write._ended.captured()), len(released) - write._locks
            write._expired_tabs = len(write._ended_tab_ids())

    def committed(self, stats: Stats) -> None:
        stats.expired += self._released
        stats.locks_expired += self._locks
        stats.captured_at_notes += self._captured
        stats.tabs_expired += self._expired_tabs
        self._succeed(max(len(self._overdue), len(self._overdue_tabs)))


def release_holds(db: Db, now_ms: int, hold_ids: Sequence[str], why: HoldEnd) -> int:
    """Release those of some holds that are open; how many that were."""
    if not hold_ids:
        return 0
    rows = as_rows([{"hold_id": hold_id, "ended_by": why.value} for hold_id in hold_ids])
    return len(db.execute(HOLDS_SQL["release_holds"], rows | {"now_ms": now_ms}).fetchall())


def _capture(db: Db, now_ms: int, charges: Sequence[tuple[Hold, Charge]]) -> Callable[[], frozenset[str]]:
    """Capture those of some holds that are open, and charge them; nothing for the others. Returns the ids of those."""
    captures = as_rows([{"hold_id": hold.hold_id, "cost": charge.cost_nanousd} for hold, charge in charges])
    captured_ids = later_ids(db, HOLDS_SQL["capture_holds"], captures | {"now_ms": now_ms})
    charge_holds(db, now_ms, charges)
    return captured_ids
