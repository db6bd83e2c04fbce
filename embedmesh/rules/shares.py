"""One room for many: however much one takes of it, others find some.

Dynamic thresholds (Choudhury and Hahne, 1998): one may have SHARE times what is free. Alone that is four fifths, of two
each gets four ninths. Whose a share is the caller says: an account's, a node's, an address's.
"""

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Clock

SHARE = 4


class Shares:
    """Units (requests, bytes, calls) that may be taken at one time. What was taken must be given back."""

    def __init__(self, units_max: int, full: str) -> None:
        """`full` is what somebody is told for whom there is no room."""
        self._full = full
        self._free = units_max
        self._of: dict[str, int] = {}
        self.taken = 0

    def take(self, whose: str, units: int = 1) -> None:
        """Raises Overloaded where there is no room; then nothing is taken."""
        if not units:
            return
        has = self._of.get(whose, 0)
        last = units - 1  # the threshold is that of taking one unit after another
        if has + last >= SHARE * (self._free - last):
            raise Overloaded(self._full)
        self._of[whose] = has + units
        self._free -= units
        self.taken += units

    def give_back(self, whose: str, units: int = 1) -> None:
        """Of what was taken."""
        if not units:
            return
        self._of[whose] -= units
        if not self._of[whose]:
            del self._of[whose]
        self._free += units
        self.taken -= units


class Pace:
    """So many in a span of time: a room that is empty again after each."""

    def __init__(self, units_max: int, span_s: float, clock: Clock, full: str) -> None:
        self._units_max = units_max
        self._full = full
        self._span_s = span_s
        self._clock = clock
        self._began = clock.monotonic()
        self._shares = Shares(units_max, full)

    def take(self, whose: str) -> None:
        """Raises Overloaded where there is none left of this span."""
        now = self._clock.monotonic()
        if now - self._began >= self._span_s:
            self._began, self._shares = now, Shares(self._units_max, self._full)
        self._shares.take(whose)
