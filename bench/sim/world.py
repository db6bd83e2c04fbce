"""Virtual time: what is to happen, in order. Implements the port `Clock`, and the scheduler's `CallLater`."""

import heapq
from collections.abc import Callable, Sequence
from itertools import count

from bench.sim.workload import Request


class World:
    """Nothing in it knows the real time, and equal moments keep their order: the same seed gives the same figures."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def monotonic(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)

    def call_at(self, when: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when, next(self._numbers), what))

    def call_later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._numbers), what))

    def run(self, requests: Sequence[Request], arrive: Callable[[Request], None]) -> None:
        """All requests, each at its time, until nothing is left to happen."""
        events = self._events
        for request in requests:
            while events and events[0][0] <= request.at:
                self.now, _, what = heapq.heappop(events)
                what()
            self.now = request.at
            arrive(request)
        while events:
            self.now, _, what = heapq.heappop(events)
            what()
