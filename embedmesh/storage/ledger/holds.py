"""Placing holds, and ending them: by a charge, by a release, or because nobody did.

Who asks for money and finds none is told why: the account, or one of the key's own limits.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

import msgspec

from embedmesh.rules.errors import Failure, InsufficientQuota, InternalError, RateLimited, StoreUnavailable
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd, HoldState, PriorRequest
from embedmesh.rules.money import format_usd
from embedmesh.storage.cached.rate_limits import OF_ANOTHER
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.writes import Stats, as_rows
from embedmesh.storage.sql import load

HOLDS = load("holds.sql")
CLAIMS = load("claims.sql")
EXPIRED_HOLDS_MAX = 256  # a batch: about two milliseconds
MS_PER_DAY = 86_400_000
CLAIM_S = 86_400  # as long as an Idempotency-Key stands for its reply
REVENUE = "revenue"
CONCURRENCY_AGAIN_S = 1.0  # a request of the same key ends in about that time, or later

logger = logging.getLogger(__name__)


class PlaceHold:
    """Set money aside. `outcome` becomes None once that is durable, the prior that answers already, or the refusal."""

    kept = False
    rank = 2

    def __init__(self, hold: Hold, owner: str, claim: Claim | None, give_back: Callable[[Hold], None]) -> None:
        """`give_back` ends a hold that nobody waits for any more, should it have become durable."""
        self.hold = hold
        self.outcome: asyncio.Future[PriorRequest | None] = asyncio.get_running_loop().create_future()
        self._owner = owner
        self._claim = claim
        self._give_back = give_back
        self._placed: Callable[[], Sequence[Row]] | None = None  # what the store says of it and of others
        self._covered = False
        self._twin: PriorRequest | None = None
        self._refusal: Failure | None = None

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self.hold.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[PlaceHold]") -> None:
        placing: list[PlaceHold] = []
        claimed: dict[tuple[str, bytes], PriorRequest] = {}  # by this batch: their holds are not there yet
        for write in writes:
            write._placed, write._covered, write._twin, write._refusal = None, False, None, None
            if write.outcome.done():
                continue  # whoever asked has gone: place nothing
            write._twin = write._find_twin(db, now_ms, claimed)
            if write._twin is None:
                placing.append(write)
        if not placing:
            return
        rows = as_rows([write._row() for write in placing])
        placed = db.later(HOLDS["place_holds"], rows | {"owner": writes[0]._owner, "now_ms": now_ms})
        for write in placing:
            write._placed = placed
        if any(write._claim is not None for write in placing):
            db.execute(CLAIMS["drop_claims"], rows)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[PlaceHold]") -> None:
        covered: dict[int, set[str]] = {}
        known: dict[tuple[str, str | None], Any] = {}
        for write in writes:
            if (placed := write._placed) is None:
                continue
            if id(placed) not in covered:
                covered[id(placed)] = {hold_id for (hold_id,) in placed()}
            write._covered = write.hold.hold_id in covered[id(placed)]
            if not write._covered:
                write._refusal = write._why_not(db, now_ms, known)

    def committed(self, stats: Stats) -> None:
        stats.holds += self._covered
        if self.outcome.done():
            if self._covered:  # it was given up while the batch was being written
                self._give_back(self.hold)
        elif self._refusal is not None:
            stats.holds_refused += 1
            self.outcome.set_exception(self._refusal)
        else:
            self.outcome.set_result(self._twin)

    def failed(self, reason: str) -> None:
        if self._placed is not None:  # nobody knows whether the store has it
            self._give_back(self.hold)
        if not self.outcome.done():
            self.outcome.set_exception(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(InternalError("The ledger refused to hold money for this request."))

    def _row(self) -> dict[str, Any]:
        return {
            "hold_id": self.hold.hold_id,
            "account_id": self.hold.account_id,
            "key_id": self.hold.key_id,
            "amount": self.hold.amount_nanousd,
            "deadline_ms": self.hold.deadline_ms,
        }

    def _find_twin(self, db: Db, now_ms: int, claimed: dict[tuple[str, bytes], PriorRequest]) -> PriorRequest | None:
        """The request that has the same Idempotency-Key already; None where this one has it now, or there is none."""
        if self._claim is None:
            return None
        place = self.hold.account_id, self._claim.key_hash
        if place in claimed:
            return claimed[place]
        claim = {
            "account_id": self.hold.account_id,
            "key_hash": self._claim.key_hash,
            "body_hash": self._claim.body_hash,
            "hold_id": self.hold.hold_id,
            "now_ms": now_ms,
            "kept_from_ms": now_ms - CLAIM_S * 1000,
        }
        if db.execute(CLAIMS["claim"], claim).fetchall():
            claimed[place] = PriorRequest(self._claim.body_hash, self.hold.hold_id, HoldState.OPEN.value, None)
            return None
        row = db.execute(CLAIMS["find_claim"], claim).fetchone()
        assert row is not None
        return PriorRequest(*row)

    def _why_not(self, db: Db, now_ms: int, known: dict[tuple[str, str | None], Any]) -> Failure:
        """What to say to a caller whose hold was not placed. `known` saves asking the same twice in a batch."""
        who = self.hold.account_id, self.hold.key_id
        if who not in known:
            asked = dict(zip(("account_id", "key_id"), who, strict=True))
            days = {"day": now_ms // MS_PER_DAY, "month_day": first_day_of_month(now_ms)}
            known[who] = db.execute(HOLDS["why_no_room"], asked | days).fetchall()
        if not known[who]:
            return InsufficientQuota("This account cannot be charged.")
        amount = self.hold.amount_nanousd
        available = known[who][0][0]
        for _, key_id, *limits in known[who]:
            whose = "This API key" if key_id == self.hold.key_id else OF_ANOTHER
            if (failure := _no_room_of(whose, amount, *limits)) is not None:
                return failure
        if available >= amount:  # another gateway has ended something since
            return RateLimited(
                "There was no room for this request a moment ago, and there is now. Try again.",
                retry_after_s=CONCURRENCY_AGAIN_S,
            )
        return InsufficientQuota(
            f"The account's balance does not cover this request: it needs {format_usd(amount)}, and "
            f"{format_usd(max(0, available))} is available. Add credit."
        )


def _no_room_of(
    whose: str,
    amount: int,
    concurrency: int | None,
    in_use: int,
    budget_day: int | None,
    spent_day: int,
    budget_month: int | None,
    spent_month: int,
    held: int,
) -> Failure | None:
    """What to say where a key's own limits have no room for so many nano-USD more; None where they have."""
    if concurrency is not None and in_use >= concurrency:
        return RateLimited(
            f"{whose} has {concurrency} requests under way, which is all it may. Wait for one of them.",
            retry_after_s=CONCURRENCY_AGAIN_S,
        )
    for budget, spent, period in ((budget_day, spent_day, "day"), (budget_month, spent_month, "month")):
        if budget is not None and spent + held + amount > budget:
            return InsufficientQuota(
                f"{whose} has a budget of {format_usd(budget)} a {period} (UTC), which does not cover this request: "
                f"{format_usd(max(0, budget - spent - held))} is left."
            )
    return None


class EndHold:
    """End an open hold: by charging it (customer to revenue, and the nodes' shares from there), or without.

    Nothing happens to one that has ended. Kept until it is durable: nobody waits for it, and it must not be lost.
    """

    kept = True
    rank = 0

    def __init__(self, hold: Hold, why: HoldEnd, charge: Charge | None = None, reply: bytes | None = None) -> None:
        """`reply` is kept for those who ask again with the same Idempotency-Key."""
        self.hold = hold
        self.why = why
        self.charge = charge
        self._reply = reply
        self._captured: Callable[[], Sequence[Row]] | None = None  # which holds were captured with this one
        self._released: Callable[[], Sequence[Row]] | None = None
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
            write._captured = write._released = None
            first.setdefault(write.hold.hold_id, write)  # a hold ends once: whoever came first says how
        charged = {hold_id: write for hold_id, write in first.items() if write.charge is not None}
        others = [write for write in first.values() if write.charge is None]
        if others:
            rows = [{"hold_id": write.hold.hold_id, "ended_by": write.why.value} for write in others]
            released = db.later(HOLDS["release_holds"], as_rows(rows) | {"now_ms": now_ms})
            for write in others:
                write._released = released
        if charged:
            _charge(db, now_ms, charged)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[EndHold]") -> None:
        found: dict[int, set[str]] = {}
        for write in writes:
            ended = write._captured or write._released
            if ended is not None:
                if id(ended) not in found:
                    found[id(ended)] = {hold_id for (hold_id,) in ended()}
                write._ended = write.hold.hold_id in found[id(ended)]
            if write.charge is not None and not write._ended:
                state = db.execute(HOLDS["hold_state"], {"hold_id": write.hold.hold_id}).fetchone()
                write._late = state != ("captured",)

    def committed(self, stats: Stats) -> None:
        if self.charge is None:
            stats.released += self._ended
            return
        stats.captured += self._ended
        if self._late:
            stats.late_captures += 1
            logger.warning("hold %s had ended before it was captured: delivered, not charged", self.hold.hold_id)

    def failed(self, reason: str) -> None:
        raise AssertionError("a kept write is tried until it is durable")

    def refused(self, error: Exception) -> None:
        """Counted and logged by the batch; the sweep will release the hold."""


class Expire:
    """Release holds past their deadline, up to EXPIRED_HOLDS_MAX of them. `outcome` becomes how many, once durable.

    Not kept: the next sweep finds the same holds.
    """

    kept = False
    rank = 0

    def __init__(self, until_ms: int) -> None:
        self.outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._until_ms = until_ms
        self._overdue: list[str] = []
        self._expired = 0

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        asked = {"now_ms": self._until_ms, "holds_max": EXPIRED_HOLDS_MAX}
        rows = db.execute(HOLDS["overdue_holds"], asked).fetchall()
        self._overdue = [hold_id for hold_id, _ in rows]
        return {account_id for _, account_id in rows}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        for write in writes:
            rows = [{"hold_id": hold_id, "ended_by": HoldEnd.EXPIRE.value} for hold_id in write._overdue]
            write._expired = len(end_holds(db, now_ms, rows))

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[Expire]") -> None:
        """Known already."""

    def committed(self, stats: Stats) -> None:
        stats.expired += self._expired
        if not self.outcome.done():
            self.outcome.set_result(len(self._overdue))

    def failed(self, reason: str) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        self.failed("The ledger refused the sweep.")


def end_holds(db: Db, now_ms: int, rows: list[dict[str, str]]) -> list[str]:
    """Release those of some holds that are open (rows of `hold_id` and `ended_by`); which they were."""
    if not rows:
        return []
    ended = db.execute(HOLDS["release_holds"], as_rows(rows) | {"now_ms": now_ms}).fetchall()
    return [hold_id for (hold_id,) in ended]


def node_account(node_id: str) -> str:
    """The account of what a node has earned."""
    return f"node:{node_id}"


def first_day_of_month(now_ms: int) -> int:
    """Of the month that a moment is in, UTC, in days since 1970."""
    start = datetime.fromtimestamp(now_ms / 1000, UTC).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return int(start.timestamp()) * 1000 // MS_PER_DAY


def _charge(db: Db, now_ms: int, writes: dict[str, EndHold]) -> None:
    """Capture those of some holds that are open, and write down all that follows from it; for the others nothing.

    None of these statements waits for what another has found: they are sent together.
    """
    wanted = [{"hold_id": hold_id, "cost": _of(write).cost_nanousd} for hold_id, write in writes.items()]
    captured = db.later(HOLDS["capture_holds"], as_rows(wanted) | {"now_ms": now_ms})
    transfers, usage, nodes = [], [], set()
    for hold_id, write in writes.items():
        write._captured = captured
        charge, account_id = _of(write), write.hold.account_id
        nodes |= {node_account(payable.node_id) for payable in charge.payables}
        transfers.append(_transfer("charge", account_id, REVENUE, charge.cost_nanousd, hold_id))
        transfers += [
            _transfer("payable", REVENUE, node_account(payable.node_id), payable.nanousd, hold_id)
            for payable in charge.payables
        ]
        usage.append(
            {
                "hold_id": hold_id,
                "account_id": account_id,
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
        )
        if write._reply is not None:
            db.execute(CLAIMS["keep_reply"], {"hold_id": hold_id, "reply": write._reply})
    if nodes:
        made = as_rows([{"account_id": node} for node in sorted(nodes)])
        db.execute(HOLDS["insert_nodes"], made | {"now_ms": now_ms})
    db.execute(HOLDS["insert_transfers"], as_rows(transfers) | {"now_ms": now_ms})
    db.execute(HOLDS["insert_usage"], as_rows(usage) | {"day": now_ms // MS_PER_DAY})


def _of(write: EndHold) -> Charge:
    assert write.charge is not None
    return write.charge


def _transfer(kind: str, source: str, target: str, amount: int, hold_id: str) -> dict[str, Any]:
    return {"kind": kind, "source_id": source, "target_id": target, "amount": amount, "hold_id": hold_id}


def available_nanousd(db: Db, now_ms: int, account_id: str, key_id: str) -> int:
    """The most that a hold for a key could be now: what the account has, or what is left of a budget."""
    asked = {"account_id": account_id, "key_id": key_id, "day": now_ms // MS_PER_DAY}
    rows = db.execute(HOLDS["why_no_room"], asked | {"month_day": first_day_of_month(now_ms)}).fetchall()
    most = rows[0][0] if rows else 0
    for row in rows:
        budget_day, spent_day, budget_month, spent_month, held = row[-5:]
        for budget, spent in ((budget_day, spent_day), (budget_month, spent_month)):
            if budget is not None:
                most = min(most, budget - spent - held)
    return int(most)
