"""Leasing slots: how many requests of a key a gateway may have under way, without asking the store for each.

Every write says all that a gateway has of a place, so that one that came twice, or whose outcome nobody heard, does no
harm: the next one puts it right.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from embedmesh.storage.db import Db
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, as_rows
from embedmesh.storage.sql import SLOTS_SQL


class Leased(NamedTuple):
    """What a gateway has of a place. `others` is what the other gateways have; `asked_ms` when one last asked for more.

    `answers_due`: whether one of them has not answered that, and may have slots to spare.
    """

    slots: int
    others: int
    asked_ms: int
    answers_due: bool


class _Place:
    """What is leased of one place, as this batch finds and changes it."""

    def __init__(self, place_id: str, asks: int, asked_ms: int) -> None:
        self.place_id = place_id
        self.asks, self.asked_ms = asks, asked_ms
        self.others: dict[str, tuple[int, int]] = {}  # by gateway: its slots, and which ask it has answered
        self.answered = asks  # by us: one that had no slots had none to spare
        self.asked = self.has_answered = False  # with this batch

    def news(self) -> dict[str, Any]:
        """What the other gateways have to hear of."""
        news = {"asks": int(self.asked), "asked_ms": self.asked_ms, "answers": int(self.has_answered)}
        return news | {"place_id": self.place_id}


class LeaseSlots(WaitedWrite[Leased]):
    """Keep `kept` slots of a place and lease up to `more`, until `until_ms`; all gateways together at most `limit`."""

    rank = 1

    def __init__(
        self, place_id: str, owner: str, *, limit: int, kept: int, more: int, until_ms: int, ask: bool, answer: bool
    ) -> None:
        """`ask`: if none can be had, ask the others. `answer`: what is kept is in use, so there is none to spare."""
        super().__init__()
        self.place_id = place_id
        self._owner = owner
        self._limit = limit
        self._kept, self._more = kept, more
        self._until_ms = until_ms
        self._ask, self._answer = ask, answer
        self._leased: Leased | None = None

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[LeaseSlots]") -> None:
        live = [write for write in writes if not write.outcome.done()]
        if not live:
            return
        owner = live[0]._owner
        places = _read(db, now_ms, owner, sorted({write.place_id for write in live}))
        last = {write.place_id: write._decide(places[write.place_id], now_ms) for write in live}
        if has := [row for row in last.values() if row["slots"]]:
            db.execute(SLOTS_SQL["set_slots"], as_rows(has) | {"owner": owner})
        if has_none := [row for row in last.values() if not row["slots"]]:
            db.execute(SLOTS_SQL["drop_slots"], as_rows(has_none) | {"owner": owner})
        if news := [place.news() for place in places.values() if place.asked or place.has_answered]:
            db.execute(SLOTS_SQL["ask_and_answer"], as_rows(news))

    def committed(self, stats: Stats) -> None:
        if self._leased is not None:
            self._succeed(self._leased)

    def _decide(self, place: _Place, now_ms: int) -> dict[str, Any]:
        """What is written down of the place for this gateway."""
        others = sum(slots for slots, _ in place.others.values())
        granted = max(0, min(self._more, self._limit - others - self._kept))
        if self._ask and self._more and others and not granted and not place.asked:
            place.asked = True
            place.asks, place.asked_ms = place.asks + 1, now_ms
        if self._answer and place.answered < place.asks:
            place.answered, place.has_answered = place.asks, True
        due = any(answered < place.asks for _, answered in place.others.values())
        self._leased = Leased(self._kept + granted, others, place.asked_ms, due)
        return {
            "place_id": self.place_id,
            "slots": self._leased.slots,
            "until_ms": self._until_ms,
            "answered": place.answered,
        }


def _read(db: Db, now_ms: int, owner: str, place_ids: Sequence[str]) -> dict[str, _Place]:
    """They are locked in the order of their ids."""
    rows = as_rows([{"place_id": place_id} for place_id in place_ids])
    places = {place_id: _Place(place_id, *asks) for place_id, *asks in db.execute(SLOTS_SQL["lock_places"], rows)}
    for place_id, of, slots, answered in db.execute(SLOTS_SQL["read_slots"], rows | {"now_ms": now_ms}).fetchall():
        if of == owner:
            places[place_id].answered = answered
        else:
            places[place_id].others[of] = slots, answered
    return places
