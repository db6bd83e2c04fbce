"""A second look at the queue by the clock: no event tells that a node is nearly free, or silent for too long."""

from collections.abc import Callable, Sequence

from embedmesh.fleet.candidates import Candidate
from embedmesh.rules.ports import Clock

LOOK_AGAIN_MIN_S, LOOK_AGAIN_MAX_S = 0.001, 0.02  # for a node that will soon be free, and for one that says nothing

CallLater = Callable[[float, Callable[[], None]], object]
"""Seconds from now, what to do. The loop's `call_later`, or a simulator's."""


class LookAgain:
    """One timer for all queues."""

    def __init__(self, clock: Clock, call_later: CallLater, assign: Callable[[], None]) -> None:
        self._clock = clock
        self._call_later = call_later
        self._assign = assign
        self._at = float("inf")

    def look(self, candidates: Sequence[Candidate], *, some_hidden: bool) -> None:
        """Assign again when the first of these is expected to have room; soon, if others may be idle already."""
        now = self._clock.monotonic()
        full = [candidate.room_in_s for candidate in candidates if not candidate.room(False)]  # no idle slow ones
        soonest_s = 0.0 if some_hidden else min(full, default=LOOK_AGAIN_MAX_S)
        at = now + min(max(soonest_s, LOOK_AGAIN_MIN_S), LOOK_AGAIN_MAX_S)
        if at >= self._at > now:
            return
        self._at = at

        def assign() -> None:
            if self._at == at:
                self._at = float("inf")
                self._assign()

        self._call_later(at - now, assign)
