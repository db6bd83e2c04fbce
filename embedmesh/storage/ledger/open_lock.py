"""Opening locks: hold, claim and lock become durable together, if the key and the account may have one more."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import msgspec

from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import RateLimited
from embedmesh.rules.holds import Claim, Hold, HoldEnd
from embedmesh.rules.limits import LOCKS_OF_ACCOUNT_MAX, LOCKS_OF_KEY_MAX
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.end_hold import release_holds
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.writes import Stats, Write, as_rows
from embedmesh.storage.sql import LOCKS_SQL


class UnusedLocks(NamedTuple):
    """How many locks of a key a request may use yet, and when the first of them ends."""

    number: int
    first_ends_ms: int


class OpenLock(PlaceHold):
    """Set money aside, and remember what for. `outcome` as that of PlaceHold; no other request has the claim."""

    def __init__(self, terms: LockTerms, hold: Hold, owner: str, claim: Claim, submit: Callable[[Write], None]) -> None:
        super().__init__(hold, owner, None, lambda hold: submit(DropLock(hold)))
        self._terms = terms
        self._of_lock = {"key_hash": claim.key_hash, "body_hash": claim.body_hash} | msgspec.structs.asdict(terms)
        self._one_too_many: RateLimited | None = None

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        unused: dict[str, dict[str, UnusedLocks]] = {}  # by account and key; with those of this batch, placed or not
        for write in writes:
            write._one_too_many = None
            if write.outcome.done():
                continue
            terms = write._terms
            if terms.account_id not in unused:
                values = values_of_unused(now_ms, terms.account_id)
                unused[terms.account_id] = unused_of(db.execute(LOCKS_SQL["unused_locks"], values).fetchall())
            of_account = unused[terms.account_id]
            write._one_too_many = one_too_many(of_account, terms.key_id, now_ms)
            if write._one_too_many is None:
                number, first_ends_ms = of_account.get(terms.key_id, (0, terms.expires_ms))
                of_account[terms.key_id] = UnusedLocks(number + 1, min(first_ends_ms, terms.expires_ms))
        super().apply_all(db, now_ms, writes)
        for write in writes:
            if write._placed_ids is not None:
                of_lock = write._of_lock | {"now_ms": now_ms}
                db.execute(LOCKS_SQL["claim_unused"], of_lock)
                db.execute(LOCKS_SQL["open_lock"], of_lock)

    def committed(self, stats: Stats) -> None:
        stats.locks_opened += self._placed
        if self._one_too_many is not None:
            self._fail(self._one_too_many)
        else:
            super().committed(stats)

    def _is_wanted(self) -> bool:
        return self._one_too_many is None and super()._is_wanted()


class DropLock(Write):
    """A lock was opened, or nobody knows, and its caller does not hear of it: it was never there."""

    def __init__(self, hold: Hold) -> None:
        self._hold = hold
        self._released = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self._hold.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[DropLock]") -> None:
        for write in writes:
            hold_id = write._hold.hold_id
            write._released = release_holds(db, now_ms, [hold_id], HoldEnd.RELEASE)
            db.execute(LOCKS_SQL["delete_lock"], {"hold_id": hold_id})
            db.execute(LOCKS_SQL["forget_their_claims"], as_rows([(hold_id,)]))

    def committed(self, stats: Stats) -> None:
        stats.released += self._released


def values_of_unused(now_ms: int, account_id: str) -> dict[str, str | int]:
    """For the statement `unused_locks`."""
    return {"account_id": account_id, "now_ms": now_ms}


def unused_of(rows: Sequence[Row]) -> dict[str, UnusedLocks]:
    """Found by the statement `unused_locks`: by key."""
    return {key_id: UnusedLocks(number, ends_ms) for key_id, number, ends_ms in rows}


def one_too_many(unused: dict[str, UnusedLocks], key_id: str, now_ms: int) -> RateLimited | None:
    """What to say where a key, or its account, has as many unused locks as it may; None where it may have one more."""
    of_key = unused.get(key_id)
    if of_key is not None and of_key.number >= LOCKS_OF_KEY_MAX:
        whose, most, ends_ms = "A key", LOCKS_OF_KEY_MAX, of_key.first_ends_ms
    elif sum(each.number for each in unused.values()) >= LOCKS_OF_ACCOUNT_MAX:
        whose, most = "An account", LOCKS_OF_ACCOUNT_MAX
        ends_ms = min(each.first_ends_ms for each in unused.values())
    else:
        return None
    words = f"{whose} may have {most} unused locks at one time. Use one, or wait until the first of them ends."
    return RateLimited(words, retry_after_s=max(0.0, (ends_ms - now_ms) / 1000))
