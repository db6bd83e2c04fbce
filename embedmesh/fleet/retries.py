"""Whether inputs whose part failed, or is late, go to another node.

The budget allows enough attempts beyond the first to hide a broken node, and too few to double the load.
"""

from collections import deque

from embedmesh.fleet.candidates import Candidate
from embedmesh.fleet.queued import QueuedRequest, Remainder
from embedmesh.fleet.registry import Registry
from embedmesh.rules.errors import NodeBusy, NodeFailure, NodeUnreachable, UpstreamRefused
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import ATTEMPTS_MAX
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Clock

RETRY_SPAN_S = 10  # whole seconds
RETRY_SHARE = 0.10  # of the requests in that span
RETRIES_A_SECOND_MIN = 10  # so that a quiet gateway may retry at all
REFUSALS_MAX = 8  # of one part, by nodes that are full or gone: a few requests find out, not all of them
HEDGE_TOKENS_MAX = 256  # larger work is not done twice
HEDGE_BUDGET = 0.5  # of the retry budget: when many parts are late, failed ones still need retries
HEDGE_LATE, HEDGE_AFTER_S = 2.0, 0.02  # a short request is late after this multiple of its expected time, plus this


class _Second:
    """What came in one second of the monotonic clock."""

    __slots__ = ("end", "requests", "retries")

    def __init__(self, end: int) -> None:
        self.end = end
        self.requests = self.retries = 0


class RetryBudget:
    """Counts requests and further attempts over the last RETRY_SPAN_S seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.newest = _Second(0)  # whose requests may be counted without `request` until its end
        self._seconds = deque([self.newest])  # the newest last; at most RETRY_SPAN_S

    def request(self, now: float) -> None:
        """A request came."""
        self._at(now).requests += 1

    def recent(self, now: float) -> int:
        """Requests of the last RETRY_SPAN_S seconds."""
        self._at(now)
        return sum(each.requests for each in self._seconds)

    def take(self, share: float = 1.0) -> bool:
        """Take one more attempt if the budget allows. Attempts that are not necessary may use only a `share` of it."""
        if not self.left(share):
            return False
        self.newest.retries += 1
        return True

    def left(self, share: float = 1.0) -> bool:
        """Whether `take` would say yes."""
        self._at(self._clock.monotonic())
        requests = sum(each.requests for each in self._seconds)
        retries = sum(each.retries for each in self._seconds)
        return retries < share * max(RETRY_SHARE * requests, RETRIES_A_SECOND_MIN * RETRY_SPAN_S)

    def _at(self, now: float) -> _Second:
        end = int(now) + 1
        if self.newest.end != end:
            self.newest = _Second(end)
            self._seconds.append(self.newest)
        while self._seconds[0].end <= end - RETRY_SPAN_S:
            self._seconds.popleft()
        return self.newest


class Retries:
    """The rules for attempts beyond the first. With `hedge`, an idle node also gets a short part that is late."""

    def __init__(self, registry: Registry, clock: Clock, *, hedge: bool) -> None:
        self._registry = registry
        self._clock = clock
        self._hedge = hedge
        self.budget = RetryBudget(clock)

    def use(self, *, hedge: bool) -> None:
        """For parts that are given out from now on."""
        self._hedge = hedge

    def may_retry(self, request: QueuedRequest, part: Part, remainder: Remainder, failure: NodeFailure) -> bool:
        """Whether another node may get the inputs of a failed part."""
        if not self._another_can(request, part, remainder):
            return False
        if not had_begun(failure):
            return remainder.refusals + 1 < REFUSALS_MAX
        if remainder.attempts + 1 >= ATTEMPTS_MAX:
            return False
        node = self._registry.find(part.node_id)
        lost = node is None or node.state is not NodeState.READY  # with its node: at most what that had in flight
        refused = isinstance(failure, UpstreamRefused)  # before it began: such texts must not use up the others' budget
        return lost or refused or self.budget.take()

    def may_ask_another(self, request: QueuedRequest, part: Part) -> bool:
        """Whether a late part would get another attempt elsewhere. Where it would not, it is waited for."""
        remainder = request.taken.get(part)
        if remainder is None or request.left or remainder.attempts + 1 >= ATTEMPTS_MAX:
            return False
        return self._another_can(request, part, remainder) and self.budget.left()

    def hedge_after_s(self, part: Part) -> float | None:
        """How long to wait for a part before an idle node gets it, too; None to wait for this one only."""
        if not self._hedge or part.tokens > HEDGE_TOKENS_MAX:
            return None
        return HEDGE_LATE * part.expected_s + HEDGE_AFTER_S

    def hedge(self, request: QueuedRequest, part: Part) -> tuple[Remainder, Candidate] | None:
        """The inputs of a late part, and an idle node for them, if there is one and the budget allows it."""
        taken = request.taken.get(part)
        if taken is None or request.left:
            return None
        remainder = taken.after(part)
        now = self._clock.monotonic()
        idle = [
            Candidate(node, now)
            for node in self._registry.ready(request.model_id)
            if not node.load.parts and node.start(now, True)[1] and request.can(node, remainder)
        ]
        if not idle or not self.budget.take(HEDGE_BUDGET):
            return None
        return remainder, min(idle, key=lambda candidate: candidate.finish_s(part.tokens, True))

    def _another_can(self, request: QueuedRequest, part: Part, remainder: Remainder) -> bool:
        other = remainder.after(part)
        return any(request.can(node, other) for node in self._registry.ready(request.model_id))


def had_begun(failure: NodeFailure) -> bool:
    """Whether the node may have worked on it."""
    return not isinstance(failure, NodeBusy | NodeUnreachable)
