"""Extending holds: they last longer, and what their streams have delivered is noted beside them."""

import logging
from collections.abc import Callable, Sequence

from embedmesh.rules.holds import StreamNote
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.lost_holds import note_text
from embedmesh.storage.ledger.writes import Stats, WaitedWrite, as_rows, later_ids
from embedmesh.storage.sql import HOLDS_SQL

logger = logging.getLogger(__name__)


class ExtendHolds(WaitedWrite[frozenset[str]]):
    """Note what some streams have delivered, and move the deadlines of their holds on.

    `outcome` becomes the ids of those that are open, once that is durable. What is captured or released in the same
    batch has ended, and what would expire in it has not. A note that its hold does not cover is a bug of ours: it is
    left out, so that the others are written.
    """

    def __init__(self, notes: Sequence[StreamNote]) -> None:
        super().__init__()
        self._notes = {note.hold.hold_id: note for note in notes if note.charge.is_sound(note.hold.amount_nanousd)}
        self._wrong = len(notes) - sum(note.hold.hold_id in self._notes for note in notes)
        self.weight = len(notes)
        self._extended_ids: Callable[[], frozenset[str]] = frozenset
        self._extended: frozenset[str] = frozenset()

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        """No money moves; but nobody else shall end these holds meanwhile."""
        return {note.hold.account_id for note in self._notes.values()}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[ExtendHolds]") -> None:
        latest: dict[str, StreamNote] = {}
        for write in writes:
            latest |= write._notes
        if not latest:
            return
        noted = [
            {"hold_id": hold_id, "cost": note.charge.cost_nanousd, "charge": note_text(note.charge)}
            for hold_id, note in latest.items()
        ]
        extended_ids = later_ids(db, HOLDS_SQL["note_holds"], as_rows(noted) | {"now_ms": now_ms})
        lasting = [{"hold_id": hold_id, "deadline_ms": note.deadline_ms} for hold_id, note in latest.items()]
        db.execute(HOLDS_SQL["extend_holds"], as_rows(lasting))
        for write in writes:
            write._extended_ids = extended_ids

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: "Sequence[ExtendHolds]") -> None:
        for write in writes:
            write._extended = write._extended_ids() & write._notes.keys()

    def committed(self, stats: Stats) -> None:
        stats.holds_extended += len(self._extended)
        if self._wrong:
            stats.broken_writes += self._wrong
            logger.error("%d notes of streams were not written: their holds do not cover them", self._wrong)
        self._succeed(self._extended)
