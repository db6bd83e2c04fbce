"""Redeeming locks: of all requests that come with a lock, at whatever gateway, one has it; the others hear of it."""

from collections.abc import Callable, Sequence

import msgspec

from embedmesh.rules.confidential import FoundLock, LockState, LockTerms
from embedmesh.rules.holds import Hold, HoldEnd, HoldState, PriorRequest
from embedmesh.rules.lock_failures import LockExpired, LockNotFound, LockUsed
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.end_hold import release_holds
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, Write, as_rows
from embedmesh.storage.sql import LOCKS_SQL


class Redemption(msgspec.Struct, frozen=True):
    """A request that comes with a lock. `use_id` is known to this write alone."""

    terms: LockTerms
    use_id: str
    body_hash: bytes
    deadline_ms: int


class RedeemLock(WaitedWrite[Hold | PriorRequest]):
    """Use a lock: its hold is this gateway's, with another deadline. `outcome` is that hold once that is durable.

    Or the prior request of the same body, or a refusal is raised. A request that has gone by then, or that does not
    hear whether it has the lock, uses it up: its hold is released.
    """

    rank = 2

    def __init__(self, asked: Redemption, owner: str, submit: Callable[[Write], None]) -> None:
        super().__init__()
        self._asked = asked
        self._owner = owner
        self._submit = submit
        self._tried = False
        self._taken: Callable[[], Sequence[Row]] | None = None  # ids and amounts of all that were taken with it
        self._amount: int | None = None  # of the hold, if the lock is this request's
        self._found: FoundLock | None = None

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self._asked.terms.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[RedeemLock]") -> None:
        first: dict[int, RedeemLock] = {}
        for write in writes:
            write._tried, write._taken, write._amount, write._found = False, None, None, None
            if not write.outcome.done():  # else the caller has gone
                write._tried = True
                first.setdefault(write._asked.terms.lock_id, write)
        if not first:
            return
        using = as_rows([write._row() for write in first.values()])
        used = db.execute(LOCKS_SQL["use_locks"], using | {"now_ms": now_ms}).fetchall()
        redeemed = [first[lock_id] for (lock_id,) in used]
        if not redeemed:
            return
        taking = as_rows([write._row() for write in redeemed])
        taken = db.later(LOCKS_SQL["take_over_holds"], taking | {"owner": writes[0]._owner})
        for write in redeemed:
            write._taken = taken
            claim = {"hold_id": write._asked.terms.hold_id, "body_hash": write._asked.body_hash}
            db.execute(LOCKS_SQL["claim_lock"], claim)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[RedeemLock]") -> None:
        amounts: dict[str, int] = {}
        for taken in {write._taken for write in writes if write._taken is not None}:
            amounts.update((hold_id, amount) for hold_id, amount in taken())
        for write in writes:
            if write._taken is not None:
                write._amount = amounts[write._asked.terms.hold_id]
            elif write._tried:
                terms = write._asked.terms
                values = which_lock(terms.account_id, terms.lock_id)
                write._found = found_in(db.execute(LOCKS_SQL["find_lock"], values).fetchall())

    def committed(self, stats: Stats) -> None:
        if self._amount is not None:
            stats.locks_used += 1
            if self.outcome.done():  # the caller went while the batch was being written
                self._submit(GiveUpLock(self._asked))
            else:
                self._succeed(self._hold(self._amount))
        elif self._tried:
            try:
                self._succeed(prior_use(self._found, self._asked.body_hash))
            except (LockNotFound, LockExpired, LockUsed) as failure:
                self._fail(failure)

    def failed(self, reason: str) -> None:
        if self._tried:  # nobody knows whether the store has it
            self._submit(GiveUpLock(self._asked))
        super().failed(reason)

    def unheard(self, result: Hold | PriorRequest) -> None:
        if isinstance(result, Hold):
            self._submit(GiveUpLock(self._asked))

    def _row(self) -> dict[str, str | int]:
        terms = self._asked.terms
        return {
            "lock_id": terms.lock_id,
            "account_id": terms.account_id,
            "hold_id": terms.hold_id,
            "used_by": self._asked.use_id,
            "deadline_ms": self._asked.deadline_ms,
        }

    def _hold(self, amount: int) -> Hold:
        terms = self._asked.terms
        return Hold(terms.hold_id, terms.account_id, amount, self._asked.deadline_ms, terms.key_id)


class GiveUpLock(Write):
    """Release the hold of a lock, if it was this very request that has used it. Kept until it is durable."""

    def __init__(self, asked: Redemption) -> None:
        self._asked = asked
        self._released = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self._asked.terms.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[GiveUpLock]") -> None:
        for write in writes:
            use = [{"lock_id": write._asked.terms.lock_id, "used_by": write._asked.use_id}]
            hold_ids = db.execute(LOCKS_SQL["holds_of_uses"], as_rows(use)).fetchall()
            write._released = release_holds(db, now_ms, [hold_id for (hold_id,) in hold_ids], HoldEnd.RELEASE)

    def committed(self, stats: Stats) -> None:
        stats.released += self._released


def which_lock(account_id: str, lock_id: int) -> dict[str, str | int]:
    """For the statement `find_lock`."""
    return {"account_id": account_id, "lock_id": lock_id}


def found_in(rows: Sequence[Row]) -> FoundLock | None:
    """Found by the statement `find_lock`."""
    if not rows:
        return None
    *terms, used_ms, state, body_hash, reply, kept_bytes = rows[0]
    return FoundLock(LockTerms(*terms), LockState(used_ms, state, body_hash, reply), kept_bytes)


def prior_use(found: FoundLock | None, body_hash: bytes) -> PriorRequest:
    """The request of that body which has used the lock. For a lock that is not free.

    Raises LockNotFound, LockExpired, or LockUsed: also where that request came to nothing.
    """
    if found is None:
        raise not_found()
    use = found.use
    if use.used_ms is None:
        raise LockExpired("This lock was not used in time, and its money is free again. Lock again.")
    if use.body_hash is None or use.body_hash != body_hash:
        raise LockUsed("Another request has used this lock, and each is for one. Lock again.")
    if use.state == HoldState.RELEASED.value:
        raise LockUsed("This lock was used by a request that failed, for which nothing was charged. Lock again.")
    return PriorRequest(use.body_hash, found.terms.hold_id, use.state, use.reply)


def not_found() -> LockNotFound:
    """The same words for a lock of another account, and for one that never was."""
    return LockNotFound(
        "This account has no lock of that id: lock again. Locks are forgotten some time after their end."
    )
