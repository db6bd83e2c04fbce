"""Opening locks: hold, claim and lock become durable together, if the key and the account may have one more."""

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import RateLimited
from embedmesh.rules.holds import Claim, Hold
from embedmesh.rules.limits import LOCKS_OF_ACCOUNT_MAX, LOCKS_OF_KEY_MAX
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.writes import Stats
from embedmesh.storage.sql import LOCKS_SQL

Ends = tuple[str, int]
"""Of an unused lock: its key, and when it ends."""


class OpenLock(PlaceHold):
    """Set money aside, and remember what for. `outcome` as that of PlaceHold."""

    def __init__(
        self, terms: LockTerms, hold: Hold, owner: str, claim: Claim, give_back: Callable[[Hold], None]
    ) -> None:
        super().__init__(hold, owner, claim, give_back)
        self._terms = terms
        self._one_too_many: RateLimited | None = None

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        unused: dict[str, list[Ends]] = {}  # by account; with those of this batch, whether they are placed or not
        for write in writes:
            terms, write._one_too_many = write._terms, None
            if write.outcome.done():
                continue
            if terms.account_id not in unused:
                unused[terms.account_id] = read_unused(db, now_ms, terms.account_id)
            write._one_too_many = one_too_many(unused[terms.account_id], terms.key_id, now_ms)
            if write._one_too_many is None:
                unused[terms.account_id].append((terms.key_id, terms.expires_ms))
        super().apply_all(db, now_ms, writes)
        for write in writes:
            if write._placed_ids is not None:
                db.execute(LOCKS_SQL["open_lock"], msgspec.structs.asdict(write._terms) | {"now_ms": now_ms})

    def committed(self, stats: Stats) -> None:
        stats.locks_opened += self._placed
        if self._one_too_many is not None:
            self._fail(self._one_too_many)
        else:
            super().committed(stats)

    def _is_wanted(self) -> bool:
        return self._one_too_many is None and super()._is_wanted()


def values_of_unused(now_ms: int, account_id: str) -> dict[str, str | int]:
    """For the statement `unused_locks`."""
    return {"account_id": account_id, "now_ms": now_ms, "rows_max": LOCKS_OF_ACCOUNT_MAX}


def read_unused(db: Db, now_ms: int, account_id: str) -> list[Ends]:
    """The locks of an account that may be used yet."""
    return unused_of(db.execute(LOCKS_SQL["unused_locks"], values_of_unused(now_ms, account_id)).fetchall())


def unused_of(rows: Sequence[Row]) -> list[Ends]:
    """Found by the statement `unused_locks`."""
    return [(key_id, expires_ms) for key_id, expires_ms in rows]


def one_too_many(unused: Sequence[Ends], key_id: str, now_ms: int) -> RateLimited | None:
    """What to say where a key, or its account, has as many unused locks as it may; None where it may have one more."""
    of_key = [expires_ms for key, expires_ms in unused if key == key_id]
    if len(of_key) >= LOCKS_OF_KEY_MAX:
        whose, most, ends_ms = "A key", LOCKS_OF_KEY_MAX, min(of_key)
    elif len(unused) >= LOCKS_OF_ACCOUNT_MAX:
        whose, most, ends_ms = "An account", LOCKS_OF_ACCOUNT_MAX, min(expires_ms for _, expires_ms in unused)
    else:
        return None
    words = f"{whose} may have {most} unused locks at one time. Use one, or wait until the first of them ends."
    return RateLimited(words, retry_after_s=max(0.0, (ends_ms - now_ms) / 1000))
