"""Placing holds: money is set aside, or the caller hears why not, or which prior request has its Idempotency-Key."""

from collections.abc import Callable, Sequence

from embedmesh.rules.errors import InternalError
from embedmesh.rules.holds import Claim, Hold, HoldState, PriorRequest
from embedmesh.rules.limits import IDEMPOTENCY_KEY_S
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.room import Lacks, LiveTabs, NoRoom, Recall, Room, count_live_tabs, read_room, refusal
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, as_rows, later_ids
from embedmesh.storage.sql import CLAIMS_SQL, HOLDS_SQL


class PlaceHold(WaitedWrite[PriorRequest | None]):
    """Set money aside. `outcome` becomes None once that is durable, or the prior request, or the refusal is raised."""

    rank = 3

    def __init__(self, hold: Hold, owner: str, claim: Claim | None, give_back: Callable[[Hold], None]) -> None:
        """`give_back` ends a hold that became durable after its caller had gone."""
        super().__init__()
        self.hold = hold
        self._owner = owner
        self._claim = claim
        self._give_back = give_back
        self._placed_ids: Callable[[], frozenset[str]] | None = None  # of all holds placed with this one
        self._placed = False
        self._prior: PriorRequest | None = None
        self._refusal: NoRoom | None = None
        self.may_fit_now = False  # once it was refused: something was given back since
        self.recall: Recall | None = None  # or tabs have some of what it needs

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return {self.hold.account_id}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[PlaceHold]") -> None:
        placing: list[PlaceHold] = []
        claimed: dict[tuple[str, bytes], PriorRequest] = {}  # by this batch: their holds are not in the store yet
        for write in writes:
            write._placed_ids, write._placed, write._prior, write._refusal = None, False, None, None
            if not write._is_wanted():
                continue
            write._prior = write._find_prior(db, now_ms, claimed)
            if write._prior is None:
                placing.append(write)
        if not placing:
            return
        rows = as_rows([write.hold for write in placing])
        placed_ids = later_ids(db, HOLDS_SQL["place_holds"], rows | {"owner": writes[0]._owner, "now_ms": now_ms})
        for write in placing:
            write._placed_ids = placed_ids
        if any(write._claim is not None for write in placing):
            db.execute(CLAIMS_SQL["drop_claims"], rows)

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[PlaceHold]") -> None:
        rooms: dict[tuple[str, str | None], tuple[LiveTabs, Room]] = {}  # read once a batch
        for write in writes:
            if write._placed_ids is None:
                continue
            write._placed = write.hold.hold_id in write._placed_ids()
            if not write._placed:
                who = write.hold.account_id, write.hold.key_id
                if who not in rooms:  # tabs first: what one of them gives back in between is seen
                    rooms[who] = count_live_tabs(db, *who), read_room(db, now_ms, *who)
                tabs, room = rooms[who]
                write._refusal = refused = refusal(write.hold, room)
                write.may_fit_now = refused.lacks is Lacks.NOTHING
                write.recall = tabs.to_recall(refused.lacks, *who)

    def committed(self, stats: Stats) -> None:
        stats.holds += self._placed
        if self.outcome.done():
            if self._placed:  # the caller went while the batch was being written
                self._give_back(self.hold)
        elif self._refusal is not None:
            self._fail(self._refusal.failure)
        else:
            self._succeed(self._prior)

    def failed(self, reason: str) -> None:
        if self._placed_ids is not None:  # nobody knows whether the store has it
            self._give_back(self.hold)
        super().failed(reason)

    def unheard(self, result: PriorRequest | None) -> None:
        if result is None:
            self._give_back(self.hold)

    def refused(self, error: Exception) -> None:
        self._fail(InternalError("The ledger refused to hold money for this request."))

    def _is_wanted(self) -> bool:
        """Else its caller has gone: place nothing."""
        return not self.outcome.done()

    def _find_prior(self, db: Db, now_ms: int, claimed: dict[tuple[str, bytes], PriorRequest]) -> PriorRequest | None:
        """The request that has the Idempotency-Key already; None where this one has it now, or has no such key."""
        if self._claim is None:
            return None
        key = self.hold.account_id, self._claim.key_hash
        if key in claimed:
            return claimed[key]
        claim = {
            "account_id": self.hold.account_id,
            "key_hash": self._claim.key_hash,
            "body_hash": self._claim.body_hash,
            "hold_id": self.hold.hold_id,
            "now_ms": now_ms,
            "kept_from_ms": now_ms - IDEMPOTENCY_KEY_S * 1000,
        }
        if db.execute(CLAIMS_SQL["claim"], claim).fetchall():
            claimed[key] = PriorRequest(self._claim.body_hash, self.hold.hold_id, HoldState.OPEN.value, None)
            return None
        row = db.execute(CLAIMS_SQL["find_claim"], claim).fetchone()
        assert row is not None
        return PriorRequest(*row)
