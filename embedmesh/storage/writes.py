"""What can be written to the ledger, and what each write means.

A write is applied inside a batch's transaction, in its own savepoint, and learns later whether the batch became
durable. Its `apply` may run again in a later batch, if the first one failed: nothing of it was kept then.
"""

import asyncio
import logging
from typing import Protocol

import msgspec

from embedmesh.rules.errors import InsufficientQuota, InternalError, StoreUnavailable
from embedmesh.rules.holds import Charge, Hold, HoldEnd
from embedmesh.storage.connect import Db
from embedmesh.storage.sql import load

HOLDS = load("holds.sql")
ACCOUNTS = load("accounts.sql")
EXPIRED_HOLDS_MAX = 256  # a batch: about two milliseconds of the event loop
MS_PER_DAY = 86_400_000

logger = logging.getLogger(__name__)


class Stats(msgspec.Struct):
    """What became durable since the store was opened, and what was refused."""

    holds: int = 0
    holds_refused: int = 0  # the balance did not cover them
    captured: int = 0
    released: int = 0
    expired: int = 0
    recovered: int = 0  # found open at start
    late_captures: int = 0  # the hold had ended before: delivered, not charged
    broken_writes: int = 0  # the store's own rules refused them: a bug of ours
    commits: int = 0
    writes: int = 0  # over `commits`: the mean batch
    largest_batch: int = 0
    failed_batches: int = 0


class Write(Protocol):
    """One thing to write."""

    kept: bool  # whether it is written again after a batch that failed, until it is durable

    def apply(self, db: Db, now_ms: int) -> None:
        """Run the statements. Raises the driver's errors."""
        ...

    def committed(self, stats: Stats) -> None:
        """The batch is durable."""
        ...

    def failed(self, reason: str) -> None:
        """The batch is not durable, and this write is not kept."""
        ...

    def refused(self, error: Exception) -> None:
        """The store's rules refuse this very write, whenever it is tried."""
        ...


class PlaceHold:
    """Set money aside. `outcome` becomes whether the balance covered it, or StoreUnavailable."""

    kept = False

    def __init__(self, hold: Hold, owner: str) -> None:
        self.hold = hold
        self.owner = owner
        self.outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.covered = False

    def apply(self, db: Db, now_ms: int) -> None:
        if self.outcome.done():
            return  # whoever asked has gone: place nothing
        cursor = db.execute(
            HOLDS["place_hold"],
            {
                "hold_id": self.hold.hold_id,
                "account_id": self.hold.account_id,
                "amount": self.hold.amount_nanousd,
                "owner": self.owner,
                "now_ms": now_ms,
                "deadline_ms": self.hold.deadline_ms,
            },
        )
        self.covered = cursor.rowcount == 1

    def committed(self, stats: Stats) -> None:
        stats.holds += self.covered
        if self.outcome.done():
            return
        if self.covered:
            self.outcome.set_result(None)
        else:
            stats.holds_refused += 1
            self.outcome.set_exception(InsufficientQuota("Your balance does not cover this request: add credit."))

    def failed(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(InternalError("The ledger refused to hold money for this request."))


class _Kept:
    """A write that nobody waits for and that must not be lost."""

    kept = True

    def failed(self, reason: str) -> None:
        raise AssertionError("a kept write is tried until it is durable")

    def refused(self, error: Exception) -> None:
        """Counted and logged by the writer; the sweep will release the hold."""


class Capture(_Kept):
    """End an open hold by charging it: customer to revenue, and the node's share from there to the node."""

    def __init__(self, hold: Hold, charge: Charge) -> None:
        self.hold = hold
        self.charge = charge
        self.captured = False
        self.late = False

    def apply(self, db: Db, now_ms: int) -> None:
        hold_id, charge = self.hold.hold_id, self.charge
        cursor = db.execute(HOLDS["capture_hold"], {"hold_id": hold_id, "cost": charge.cost_nanousd, "now_ms": now_ms})
        self.captured = cursor.rowcount == 1
        if not self.captured:
            found = db.execute(HOLDS["hold_state"], {"hold_id": hold_id}).fetchone()
            self.late = found != ("captured",)
            return
        account_id = self.hold.account_id
        move = {"account_id": account_id, "amount": charge.cost_nanousd, "hold_id": hold_id, "now_ms": now_ms}
        db.execute(HOLDS["insert_charge"], move)
        for payable in charge.payables:
            node = f"node:{payable.node_id}"
            db.execute(ACCOUNTS["insert_account"], {"account_id": node, "kind": "node", "now_ms": now_ms})
            db.execute(HOLDS["insert_payable"], move | {"account_id": node, "amount": payable.nanousd})
        db.execute(
            HOLDS["insert_usage"],
            {
                "hold_id": hold_id,
                "account_id": account_id,
                "key_id": charge.key_id,
                "model": charge.model,
                "node_id": charge.node_id,
                "tokens": charge.tokens,
                "cost": charge.cost_nanousd,
                "payable": sum(payable.nanousd for payable in charge.payables),
                "user_hash": charge.user_hash,
                "day": now_ms // MS_PER_DAY,
            },
        )

    def committed(self, stats: Stats) -> None:
        stats.captured += self.captured
        if self.late:
            stats.late_captures += 1
            logger.warning("hold %s had ended before it was captured: delivered, not charged", self.hold.hold_id)


class Release(_Kept):
    """End an open hold without charging. Nothing happens to one that has ended."""

    def __init__(self, hold: Hold, why: HoldEnd) -> None:
        self.hold = hold
        self.why = why
        self.released = 0

    def apply(self, db: Db, now_ms: int) -> None:
        move = {"hold_id": self.hold.hold_id, "ended_by": self.why.value, "now_ms": now_ms}
        self.released = db.execute(HOLDS["release_hold"], move).rowcount

    def committed(self, stats: Stats) -> None:
        stats.released += self.released


class Expire:
    """Release holds past their deadline, up to EXPIRED_HOLDS_MAX of them. `outcome` becomes how many, once durable.

    Not kept: the next sweep finds the same holds.
    """

    kept = False

    def __init__(self, until_ms: int) -> None:
        self.until_ms = until_ms
        self.outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.expired = 0

    def apply(self, db: Db, now_ms: int) -> None:
        move = {"now_ms": self.until_ms, "holds_max": EXPIRED_HOLDS_MAX}
        self.expired = db.execute(HOLDS["expire_holds"], move).rowcount

    def committed(self, stats: Stats) -> None:
        stats.expired += self.expired
        if not self.outcome.done():
            self.outcome.set_result(self.expired)

    def failed(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        self.failed("The ledger refused the sweep.")
