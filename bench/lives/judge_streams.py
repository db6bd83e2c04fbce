"""What must be true of streams after a world: each is charged once, for what its caller was handed, or nothing.

Caller or node have decided the end: the input and what was handed over, one event more or less. The node has failed:
nothing, unless the model charges for a part. The gateway has died: what it had noted last, never more than was handed
over. No hold ends by itself while its gateway lives.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bench.lives.journal import Journal, Noted, Speech, Streamed
from bench.lives.talking import terms_of

IN_FLIGHT_S_MAX = 30.0  # a capture is durable in milliseconds, or after the disk's trouble
CLOSED_S_MAX = 0.1 + 0.4 + 0.06  # until a node is stopped whose caller has gone: one stall, one turn of a busy loop
BY_OTHERS = ("recover", "expire", "recover_noted", "expire_noted")


class Ended(NamedTuple):
    """The end of a stream's hold."""

    state: str
    ended_by: str
    captured: int


NOBODY = Speech("")


class StreamJudge:
    """Looks at the streams of one world. `holds` are those of the ledger: state, what has ended it, amount captured."""

    def __init__(self, journal: Journal, holds: dict[str, Ended]) -> None:
        self._journal = journal
        self._died = journal.died
        self.holds = {hold_id: holds[hold_id] for hold_id in journal.streams.keys() | journal.notes.keys()}

    def count(self, state: str) -> int:
        """How many have such an end, and not by their gateway."""
        return sum(hold.ended_by in BY_OTHERS and hold.state == state for hold in self.holds.values())

    def count_by(self, end: str) -> int:
        """How many were ended by that."""
        return sum(hold.ended_by == end for hold in self.holds.values())

    def wrong(self) -> Iterator[str]:
        """Everything that is not as it must be."""
        for hold_id, hold in self.holds.items():
            seen = self._journal.streams.get(hold_id)
            notes = self._journal.notes.get(hold_id, [])
            if hold.ended_by in BY_OTHERS:
                found = self._lost(hold, seen, notes, self._said(hold_id))
            elif seen is None:
                found = iter(() if hold.state == "released" else ("was charged before it began",))
            else:
                found = self._ended(hold, seen, self._said(hold_id))
            yield from (f"{hold_id} {each} ({hold}, {seen}, {notes})" for each in found)
            if seen is not None:
                yield from (f"{hold_id} {each} ({seen})" for each in self._right(seen, self._said(hold_id)))

    def _said(self, hold_id: str) -> Speech:
        speeches = self._journal.speeches.get(hold_id)
        return speeches[-1] if speeches else NOBODY

    def _ended(self, hold: Ended, seen: Streamed, speech: Speech) -> Iterator[str]:
        """By its gateway."""
        terms = terms_of(seen.errand)
        if seen.end == "cancelled" or (seen.failed and not terms.model.charge_partial):
            if hold.state == "captured":
                yield "was charged, and we broke it off, or its node did"
            return
        if not seen.end:
            if hold.state == "captured":
                yield "was charged before its end"
            return
        least, most = _handed(seen), len(speech.said)
        if seen.end != "whole" or seen.failed:
            most = _silent(speech, _next(speech, least))
        else:
            least = most
        if hold.state != "captured":
            if seen.handed or (seen.end == "whole" and not seen.failed):
                yield f"was handed over, and never charged ({hold.ended_by})"
            return
        costs = {terms.owed(speech.said[:each]) for each in range(least, most + 1)}
        if not most or hold.captured not in costs:
            yield f"was charged {hold.captured}, not {sorted(costs)}"
        if seen.end == "whole" and seen.usage is not None and terms.cost(seen.usage) != hold.captured:
            yield f"was charged {hold.captured}, its caller was told {seen.usage}"

    def _lost(self, hold: Ended, seen: Streamed | None, notes: Sequence[Noted], speech: Speech) -> Iterator[str]:
        """Its gateway did not end it."""
        gateways = {note.gateway for note in notes} | ({seen.gateway} if seen else set())
        died = max(self._died.get(each, -1.0) for each in gateways)
        if died < 0:
            yield "ended by itself while its gateway lived"
            return
        if seen is not None and seen.end and not seen.ended <= died <= seen.ended + IN_FLIGHT_S_MAX:
            yield f"ended at {seen.ended:.3f}, and its gateway had time to write that"
        last = max((at for at, note in enumerate(notes) if note.durable), default=-1)
        if hold.state == "released":
            if last >= 0:
                yield "was noted, and nothing was charged"
            return
        may = {note.cost for note in notes[max(0, last) :]}
        if hold.captured not in may:
            yield f"was charged {hold.captured}, and {sorted(may)} was noted last"
        if hold.captured and seen is not None:
            terms = terms_of(seen.errand)
            upto = _silent(speech, _handed(seen))
            costs = {terms.owed(speech.said[:each]) for each in range(1, upto + 1)}
            if hold.captured not in costs:
                yield f"was charged {hold.captured}, more than was handed over: {sorted(costs)}"
        elif hold.captured:
            yield "was charged, and nothing was handed over"

    def _right(self, seen: Streamed, speech: Speech) -> Iterator[str]:
        handed = _handed(seen)
        if seen.text_bytes != sum(each.text_bytes for each in speech.said[:handed]):
            yield f"gave its caller {seen.text_bytes} bytes of text, not what its node said: {speech.said[:handed]}"
        noticed = seen.noticed
        if noticed is None or seen.gateway in self._died or not speech.gateway:  # no node was asked
            return
        if speech.over is None or speech.over - noticed > CLOSED_S_MAX:
            yield f"has a node that was not stopped in time: {speech.over}"


def _handed(seen: Streamed) -> int:
    """How much its node had said when its caller had the last event that it got."""
    return seen.handed[-1][1] if seen.handed else 0


def _next(speech: Speech, at: int) -> int:
    """After how many events the next one for the caller was said."""
    for number, each in enumerate(speech.said[at:], at + 1):
        if each.shown:
            return number
    return len(speech.said)


def _silent(speech: Speech, at: int) -> int:
    """The same with all that follow and are not for the caller."""
    while at < len(speech.said) and not speech.said[at].shown:
        at += 1
    return at
