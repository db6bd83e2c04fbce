"""How many attempts beyond the first a gateway may make: enough to hide a broken node, too few to double the load."""

from collections import deque

from embedmesh.rules.ports import Clock

SPAN_S = 10  # whole seconds
RETRY_SHARE = 0.10  # of the requests in that span
RETRIES_A_SECOND_MIN = 10  # so that a quiet gateway may retry at all


class RetryBudget:
    """Counts requests and further attempts over the last SPAN_S seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._seconds: deque[list[int]] = deque()  # [second, requests, retries], the newest last; at most SPAN_S
        self._requests = 0
        self._retries = 0

    def request(self) -> None:
        """A request came."""
        self._now()[1] += 1
        self._requests += 1

    def take(self, share: float = 1.0) -> bool:
        """Take one more attempt if the budget allows. Attempts that are not necessary may use only a `share` of it."""
        if not self.left(share):
            return False
        self._now()[2] += 1
        self._retries += 1
        return True

    def left(self, share: float = 1.0) -> bool:
        """Whether `take` would say yes."""
        self._now()
        return self._retries < share * max(RETRY_SHARE * self._requests, RETRIES_A_SECOND_MIN * SPAN_S)

    def _now(self) -> list[int]:
        second = int(self._clock.monotonic())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        while self._seconds[0][0] <= second - SPAN_S:
            _, requests, retries = self._seconds.popleft()
            self._requests -= requests
            self._retries -= retries
        return self._seconds[-1]
