"""Ending holds: by a charge (customer to revenue, and the nodes' shares from there), by a release, or by expiry."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from embedmesh.rules.holds import Charge, Hold, HoldEnd
from embedmesh.rules.tabs import TabState
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.open_tab import end_tabs
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, Write, as_rows, later_ids
from embedmesh.storage.sql import CLAIMS_SQL, HOLDS_SQL, TABS_SQL
from embedmesh.storage.times import MS_PER_DAY

EXPIRED_HOLDS_MAX = 256  # a batch: about two milliseconds
REVENUE = "revenue"

logger = logging.getLogger(__name__)


class EndHold(Write):
    """End an open hold: by charging it, or without. A hold that has ended stays as it is.

    Kept until it is durable: nobody waits for it, and it must not be lost. If the store refuses it, the sweep will
    release the hold.
    """

    def __init__(self, hold: Hold, why: HoldEnd, charge: Charge | None = None, reply: bytes | None = None) -> None:
        """`reply` is kept for later requests with the same Idempotency-Key."""
        self.hold = hold
        self.why = why
        self.charge = charge
        self.reply = reply
        self._ended_ids: Callable[[], frozenset[str]] | None = None  # of all holds that ended with this one
        self._ended = False
        self._late = False

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        if self.charge is None:
            return {self.hold.account_id}
        return {self.hold.account_id, REVENUE, *(node_account(payable.node_id) for payable in self.charge.payables)}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[EndHold]") -> None:
        first: dict[str, EndHold] = {}
        for write in writes:
            write._ended = write._late = False
            write._ended_ids = None
            first.setdefault(write.hold.hold_id, write)  # a hold ends once: the first write says how
        if released := [write for write in first.values() if write.charge is None]:
            rows = as_rows([{"hold_id": write.hold.hold_id, "ended_by": write.why.value} for write in released])
            ended_ids = later_ids(db, HOLDS_SQL["release_holds"], rows | {"now_ms": now_ms})
            for write in released:
                write._ended_ids = ended_ids
        if captured := [(write, write.charge) for write in first.values() if write.charge is not None]:
            ended_ids = _charge(db, now_ms, [(write.hold, charge) for write, charge in captured])
            for write, _ in captured:
                write._ended_ids = ended_ids
                if write.reply is not None:
                    db.execute(CLAIMS_SQL["keep_reply"], {"hold_id": write.hold.hold_id, "reply": write.reply})

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[EndHold]") -> None:
        for write in writes:
            write._ended = write._ended_ids is not None and write.hold.hold_id in write._ended_ids()
            if write.charge is not None and not write._ended:
                state = db.execute(HOLDS_SQL["hold_state"], {"hold_id": write.hold.hold_id}).fetchone()
                write._late = state != ("captured",)

    def committed(self, stats: Stats) -> None:
        if self.charge is None:
            stats.released += self._ended
            return
        stats.captured += self._ended
        if self._late:
            stats.late_captures += 1
            logger.warning("hold %s had ended before it was captured: delivered, not charged", self.hold.hold_id)


class Expire(WaitedWrite[int]):
    """Release holds and end tabs past their deadline, at most EXPIRED_HOLDS_MAX of each.

    `outcome` becomes how many, once durable. Whatever is captured in the same batch comes before.
    """

    rank = 1

    def __init__(self, until_ms: int) -> None:
        super().__init__()
        self._until_ms = until_ms
        self._overdue: list[str] = []
        self._overdue_tabs: list[str] = []
        self._expired = 0
        self._ended_tab_ids: Callable[[], frozenset[str]] = frozenset
        self._expired_tabs = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        limits = {"now_ms": self._until_ms, "holds_max": EXPIRED_HOLDS_MAX}
        rows = db.execute(HOLDS_SQL["overdue_holds"], limits).fetchall()
        self._overdue = [hold_id for hold_id, _ in rows]
        tabs = db.execute(
            TABS_SQL["overdue_tabs"], {"now_ms": self._until_ms, "tabs_max": EXPIRED_HOLDS_MAX}
        ).fetchall()
        self._overdue_tabs = [tab_id for tab_id, _ in tabs]
        return {account_id for _, account_id in (*rows, *tabs)}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        for write in writes:
            write._expired = write._expire_holds(db, now_ms)
            write._ended_tab_ids = end_tabs(db, now_ms, write._overdue_tabs, TabState.EXPIRED)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        for write in writes:
            write._expired_tabs = len(write._ended_tab_ids())

    def committed(self, stats: Stats) -> None:
        stats.expired += self._expired
        stats.tabs_expired += self._expired_tabs
        self._succeed(max(len(self._overdue), len(self._overdue_tabs)))

    def _expire_holds(self, db: Db, now_ms: int) -> int:
        if not self._overdue:
            return 0
        rows = as_rows([(hold_id,) for hold_id in self._overdue])
        until = {"now_ms": now_ms, "until_ms": self._until_ms}
        return len(db.execute(HOLDS_SQL["expire_holds"], rows | until).fetchall())


def release_holds(db: Db, now_ms: int, hold_ids: Sequence[str], why: HoldEnd) -> int:
    """Release those of some holds that are open; how many that were."""
    if not hold_ids:
        return 0
    rows = as_rows([{"hold_id": hold_id, "ended_by": why.value} for hold_id in hold_ids])
    return len(db.execute(HOLDS_SQL["release_holds"], rows | {"now_ms": now_ms}).fetchall())


def node_account(node_id: str) -> str:
    """The account of what a node has earned."""
    return f"node:{node_id}"


def _charge(db: Db, now_ms: int, charges: Sequence[tuple[Hold, Charge]]) -> Callable[[], frozenset[str]]:
    """Capture those of some holds that are open, and record all that follows; nothing for the others.

    Returns which were captured. No statement needs what another has found, so that they are sent together.
    """
    captures = as_rows([{"hold_id": hold.hold_id, "cost": charge.cost_nanousd} for hold, charge in charges])
    captured_ids = later_ids(db, HOLDS_SQL["capture_holds"], captures | {"now_ms": now_ms})
    transfers, usage, nodes = [], [], set()
    for hold, charge in charges:
        transfers.append(_transfer("charge", hold.account_id, REVENUE, charge.cost_nanousd, hold))
        for payable in charge.payables:
            nodes.add(node := node_account(payable.node_id))
            transfers.append(_transfer("payable", REVENUE, node, payable.nanousd, hold))
        usage.append(_usage(hold, charge))
    if nodes:
        made = as_rows([{"account_id": node} for node in sorted(nodes)])
        db.execute(HOLDS_SQL["insert_nodes"], made | {"now_ms": now_ms})
    db.execute(HOLDS_SQL["insert_transfers"], as_rows(transfers) | {"now_ms": now_ms})
    db.execute(HOLDS_SQL["insert_usage"], as_rows(usage) | {"day": now_ms // MS_PER_DAY})
    return captured_ids


def _transfer(kind: str, source: str, target: str, amount: int, hold: Hold) -> dict[str, Any]:
    return {"kind": kind, "source_id": source, "target_id": target, "amount": amount, "hold_id": hold.hold_id}


def _usage(hold: Hold, charge: Charge) -> dict[str, Any]:
    return {
        "hold_id": hold.hold_id,
        "account_id": hold.account_id,
        "key_id": charge.key_id,
        "model": charge.model,
        "node_id": charge.node_id,
        "tokens": charge.tokens,
        "price": charge.price,
        "cost": charge.cost_nanousd,
        "payable": sum(payable.nanousd for payable in charge.payables),
        "user_hash": charge.user_hash,
        "meters": msgspec.json.encode(charge.meters).decode() if charge.meters else None,
    }
