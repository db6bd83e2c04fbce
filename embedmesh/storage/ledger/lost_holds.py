"""Ending holds that their gateway ends no more: captured at the note of their stream, or released where there is none.

They are found first, which tells whose money moves, and ended once these accounts are locked. What has changed between
(the hold was ended, taken over by a request, or its stream noted anew) is left as it is.
"""

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from embedmesh.rules.holds import NOTED, Charge, Hold, HoldEnd
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.charge_holds import accounts_of, charge_holds
from embedmesh.storage.ledger.writes import as_rows, later_ids
from embedmesh.storage.sql import HOLDS_SQL

WHENEVER_MS = AMOUNT_MAX_NANOUSD  # after every deadline

logger = logging.getLogger(__name__)


class _Noted(NamedTuple):
    hold: Hold
    charge: Charge
    text: str  # of the charge, as it was found


class EndedHolds(NamedTuple):
    """Ask for the ids of those that were `captured` at their note, and `released`, once the transaction is over."""

    captured: Callable[[], frozenset[str]] = frozenset
    released: Callable[[], frozenset[str]] = frozenset


class LostHolds:
    """Some open holds with their notes, as they were found. `accounts` are those whose money their end moves."""

    def __init__(self, rows: Sequence[Row]) -> None:
        """Rows of a statement that finds open holds: `overdue_holds`, `open_holds` or `holds_of_owner`."""
        self.accounts: set[str] = set()
        self._noted: list[_Noted] = []
        self._broken: list[tuple[str, str]] = []  # notes that nothing can be charged for, with their holds' ids
        self._others: list[str] = []
        for hold_id, account_id, amount, deadline_ms, cost, text in rows:
            self.accounts.add(account_id)
            hold = Hold(hold_id, account_id, amount, deadline_ms)
            charge = None if text is None else charge_of_note(text, cost, amount)
            if charge is not None:
                self._noted.append(_Noted(hold, charge, text))
                self.accounts |= accounts_of(hold, charge)
                continue
            self._others.append(hold_id)
            if text is not None:
                self._broken.append((hold_id, text))

    def __len__(self) -> int:
        return len(self._noted) + len(self._others)

    def end(self, db: Db, now_ms: int, why: HoldEnd, until_ms: int = WHENEVER_MS) -> EndedHolds:
        """End those whose deadline is before `until_ms`. `why` is EXPIRE or RECOVER; NOTED has its form for notes."""
        captured = released = EndedHolds().captured
        if self._noted:
            captured = self._capture(db, now_ms, NOTED[why], until_ms)
        if self._broken:
            logger.error("%d notes of streams cannot be charged, and were deleted: see the ledger", len(self._broken))
            db.execute(HOLDS_SQL["drop_broken_notes"], as_rows(self._broken))
        if self._others:
            values = {"ended_by": why.value, "now_ms": now_ms, "until_ms": until_ms}
            rows = as_rows([(hold_id,) for hold_id in self._others])
            released = later_ids(db, HOLDS_SQL["release_lost_holds"], rows | values)
        return EndedHolds(captured, released)

    def _capture(self, db: Db, now_ms: int, why: HoldEnd, until_ms: int) -> Callable[[], frozenset[str]]:
        found = as_rows([{"hold_id": each.hold.hold_id, "charge": each.text} for each in self._noted])
        values = {"ended_by": why.value, "now_ms": now_ms, "until_ms": until_ms}
        captured_ids = later_ids(db, HOLDS_SQL["capture_at_notes"], found | values)
        charge_holds(db, now_ms, [(each.hold, each.charge) for each in self._noted])
        drop_notes(db, [each.hold.hold_id for each in self._noted])
        return captured_ids


def note_text(charge: Charge) -> str:
    """A charge as it is noted."""
    return msgspec.json.encode(charge).decode()


def charge_of_note(text: str, cost: int, amount: int) -> Charge | None:
    """A charge that was noted, with its cost; None if nobody can read it, or capture a hold of that amount for it."""
    try:
        charge = msgspec.json.decode(text, type=Charge)
    except msgspec.MsgspecError:
        return None
    return charge if charge.cost_nanousd == cost and charge.is_sound(amount) else None


def drop_notes(db: Db, hold_ids: Sequence[str]) -> None:
    """Delete the notes of those of some holds that have ended."""
    db.execute(HOLDS_SQL["drop_notes"], as_rows([(hold_id,) for hold_id in hold_ids]))
