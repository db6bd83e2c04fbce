"""When an upstream server is probed. Each probe may cost money, and the server may have sent Retry-After.

While callers' requests show that it works, it is probed only after a quiet time. After failures the wait doubles up to
a minute, or to ten seconds where the server cannot be reached. The waits are jittered, so that gateways which saw it
fail together do not probe it together. Decides; never waits.
"""

from embedmesh.fleet.registry import Node
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Dice

PROBE_WAIT_FIRST_S, PROBE_WAIT_MAX_S = 0.5, 60.0  # between a failure and the next probe
UNREACHABLE_WAIT_MAX_S = 10.0  # the same for an unreachable server: a probe costs nothing, and it may be starting
REFUSED_STEPS = 3  # doublings for a refusal: nobody corrects a wrong token within a second
JITTER, JITTER_IDLE = 0.5, 0.1  # the random part of a wait
STEPS_MAX = 16  # long past PROBE_WAIT_MAX_S
REFUSALS = (Check.ACCESS, Check.STATUS_4XX)


class ProbePace:
    """The pace of one server's probes. Times are on the monotonic clock, in seconds."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice
        self._drawn = dice.random()
        self.begin()

    def begin(self) -> None:
        """Forget everything: a probe is due at once."""
        self._probed_at = float("-inf")
        self._ill_since: float | None = float("-inf")  # None once it was probed
        self._steps = 0  # doublings

    def due(self, node: Node, now: float) -> bool:
        """Whether a probe is due."""
        if node.state is NodeState.READY and not node.doubt:
            self._ill_since = None
            since = max(self._probed_at, _when(node.last_right_answer))
            wait_s = node.probe_every_s * (1 - JITTER_IDLE * self._drawn)
            if now - _when(node.last_failed) >= PROBE_WAIT_MAX_S:
                self._steps = 0  # not sooner: callers who make it fail could cause a probe at each request
        else:
            since = self._ill_since = now if self._ill_since is None else self._ill_since
            most_s = UNREACHABLE_WAIT_MAX_S if _last_check(node) is Check.CONNECT else PROBE_WAIT_MAX_S
            wait_s = min(PROBE_WAIT_FIRST_S * 2.0**self._steps, most_s) * (1 - JITTER * self._drawn)
        return now - since >= wait_s and now >= node.leave_alone_until

    def probed(self, node: Node, now: float) -> None:
        """A probe that was due has ended: draw the next wait."""
        if self._ill_since is not None:  # also after a right answer: callers' requests may go on failing
            refused = node.failures_in_a_row and _last_check(node) in REFUSALS
            self._steps = min(self._steps + (REFUSED_STEPS if refused else 1), STEPS_MAX)
        self._probed_at, self._ill_since = now, None
        self._drawn = self._dice.random()


def _last_check(node: Node) -> Check | None:
    return None if node.last_failure is None else node.last_failure.check


def _when(moment: float | None) -> float:
    return float("-inf") if moment is None else moment
