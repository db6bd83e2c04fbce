"""The queue of one model: which requests wait for nodes, and in which order.

The order is start-time fair queueing (Goyal, Vin and Cheng, 1996), served by finish tags. A *flow* is one account's
requests of like size. A request's start tag is its flow's last finish tag, or the queue's own time if the flow was
idle; its finish tag lies its tokens further on. The smallest finish tag is served first, so that short requests pass
long ones, and one account's many requests do not keep out another's few (an account with several flows in the queue
divides its share among them). The queue's time moves on with all that is served, so that a request which has waited
long enough comes first, however large it is.
"""

import heapq
from dataclasses import dataclass

from embedmesh.fleet.queued import QueuedRequest

REQUEST_TOKENS = 16  # what a request costs besides its tokens, in tokens, so that tiny ones are not free
FLOW_BASE = 2  # requests are of like size when their tokens have as many digits to this base
FLOWS_MAX = 10_000  # remembered while the queue is not empty; the longest idle ones are forgotten first


@dataclass(slots=True)
class Backlog:
    """What one account has in the queue."""

    remainders: int = 0
    tokens: int = 0


class FairQueue:
    """One model's queue."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, QueuedRequest]] = []
        self.tokens = 0
        self.remainders = 0
        self.now = 0.0  # the queue's own time: the largest start tag that was served
        self._flows: dict[tuple[str, int], float] = {}  # the finish tag of the last request of each
        self._backlogs: dict[str, dict[int, Backlog]] = {}  # by account and size; none that is empty

    def add(self, request: QueuedRequest, tokens: int) -> None:
        """One remainder of a request waits."""
        self.tokens += tokens
        self.remainders += 1
        backlog = self._backlogs.setdefault(request.account_id, {}).setdefault(request.size, Backlog())
        backlog.remainders += 1
        backlog.tokens += tokens

    def remove(self, request: QueuedRequest, tokens: int, remainders: int) -> None:
        """Some of its tokens, and of its remainders, wait no more."""
        self.tokens -= tokens
        self.remainders -= remainders
        sizes = self._backlogs[request.account_id]
        backlog = sizes[request.size]
        backlog.remainders -= remainders
        backlog.tokens -= tokens
        if not backlog.remainders:
            del sizes[request.size]
            if not sizes:
                del self._backlogs[request.account_id]

    def ahead_of(self, account_id: str, tokens: int) -> Backlog:
        """What an account has in the queue that a new request with these tokens would not pass."""
        size = size_of(tokens)
        before = [each for other, each in self._backlogs.get(account_id, {}).items() if other <= size]
        return Backlog(sum(each.remainders for each in before), sum(each.tokens for each in before))

    def accounts_with(self, account_id: str) -> int:
        """How many accounts have something in the queue, counting this one."""
        return len(self._backlogs) + (account_id not in self._backlogs)

    def tag(self, request: QueuedRequest, tokens: int) -> None:
        """Give a new request its tags, after it was added."""
        if len(self._flows) >= FLOWS_MAX:
            self._flows = {flow: tag for flow, tag in self._flows.items() if tag > self.now}
        flow = (request.account_id, request.size)
        cost = (REQUEST_TOKENS + tokens) * len(self._backlogs[request.account_id])
        request.start_tag = max(self.now, self._flows.get(flow, 0.0))
        request.finish_tag = self._flows[flow] = request.start_tag + cost

    def push(self, request: QueuedRequest) -> None:
        """Put a request in, or back, by its tags."""
        heapq.heappush(self.heap, (request.finish_tag, request.number, request))

    def pop(self) -> QueuedRequest:
        """The next request."""
        return heapq.heappop(self.heap)[2]


def size_of(tokens: int) -> int:
    """The number of digits of `tokens`: requests with the same number are of like size."""
    digits = 0
    while tokens:
        tokens //= FLOW_BASE
        digits += 1
    return digits
