"""When a server of another make is probed. It may cost money each time, and it may have asked to be left alone.

While it is well, callers' requests show it; it is asked where there were none for a while. While it is not, it is asked
again after twice the time of before, up to a minute, or ten seconds where nobody is there: not together with others
that saw it fail, and not before it wants to be. Decides; never waits.
"""

from embedmesh.fleet.registry import Node
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Dice

FIRST_S, AGAIN_MAX_S = 0.5, 60.0  # between a failure and the next probe
NOBODY_MAX_S = 10.0  # the same where nobody is there: that costs nothing, and it may be starting
REFUSED_STEPS = 3  # doublings for a refusal: nobody mends a wrong token within a second
JITTER, JITTER_IDLE = 0.5, 0.1  # the part of a wait that is drawn by dice
STEPS_MAX = 16  # long past AGAIN_MAX_S
REFUSALS = (Check.ACCESS, Check.STATUS_4XX)


class Pace:
    """Of one server. Asked several times a second; times are on the monotonic clock, in seconds."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._drawn = dice.random()
        self.begin()

    def begin(self) -> None:
        """Know nothing of it: it is due at once."""
        self._probed_at = float("-inf")
        self._ill_since: float | None = float("-inf")  # as far as it was not probed since
        self._steps = 0  # doublings

    def due(self, node: Node, now: float) -> bool:
        """Whether it should be probed now."""
        if node.state is NodeState.READY and not node.doubt:
            self._ill_since = None
            since = max(self._probed_at, _when(node.last_right_answer))
            wait_s = node.probe_every_s * (1 - JITTER_IDLE * self._drawn)
            if now - _when(node.last_failed) >= AGAIN_MAX_S:
                self._steps = 0  # not sooner: whom callers make fail would be probed at each of their whims
        else:
            since = self._ill_since = now if self._ill_since is None else self._ill_since
            most_s = NOBODY_MAX_S if _last_check(node) is Check.CONNECT else AGAIN_MAX_S
            wait_s = min(FIRST_S * 2.0**self._steps, most_s) * (1 - JITTER * self._drawn)
        return now - since >= wait_s and now >= node.leave_alone_until

    def probed(self, node: Node, now: float) -> None:
        """It has been, when it was due: draw how long the next wait is."""
        if self._ill_since is not None:  # also where the probe was answered rightly: callers may go on making it fail
            refused = node.failures_in_a_row and _last_check(node) in REFUSALS
            self._steps = min(self._steps + (REFUSED_STEPS if refused else 1), STEPS_MAX)
        self._probed_at, self._ill_since = now, None
        self._drawn = self._dice.random()


def _last_check(node: Node) -> Check | None:
    return None if node.last_failure is None else node.last_failure.check


def _when(moment: float | None) -> float:
    return float("-inf") if moment is None else moment
