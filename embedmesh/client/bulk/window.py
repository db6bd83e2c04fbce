"""How many requests of a run are in flight: more while that brings more, fewer when the server is too busy.

Throughput is measured over rounds of requests. While a round brings GAIN times what the one before has brought, the
next has half as many more in flight; when it does not, the number goes back, stays for STEADY_ROUNDS and is tried
again. A refusal for load (429, 503) halves it, and nothing is sent before the time that the server has asked for. What
was sent before a cut and is refused after it is of the same crowd, and cuts no more.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

AUTO_CONCURRENCY_FIRST = 4  # two keep one node and the network both busy; four feed a second node
AUTO_CONCURRENCY_MAX = 64  # of "auto"; each holds its texts and its vectors here, and a connection
GROWTH = 1.5
GAIN = 1.05  # less is noise
STEADY_ROUNDS = 16
ROUND_REQUESTS_MIN = 8
ROUND_S_MIN = 0.1  # a shorter time measures the machine's whims

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class CongestionWindow:
    """Decides; it neither waits nor looks at a clock. Times are of any monotonic clock, in seconds."""

    def __init__(self, fixed: int | None = None, *, most: int = AUTO_CONCURRENCY_MAX) -> None:
        """`fixed`: that number, whatever it brings; only refusals make it smaller, for a while."""
        self._fixed = fixed
        self._most = fixed or most
        self.size = min(fixed or AUTO_CONCURRENCY_FIRST, self._most)
        self.not_before = 0.0
        self._cut_at = float("-inf")
        self._tries_more = fixed is None
        self._rate = 0.0  # work a second that the window before has brought
        self._size_before = self.size
        self._rounds = 0  # since the window is what it is
        self._warming = 1  # replies that are not measured: they were asked for with another number in flight
        self._restart(0.0)

    def bound(self, most: int) -> None:
        """Never more than that from now on: replies are larger than was thought."""
        self._most = max(1, min(self._most, most))
        self.size = min(self.size, self._most)

    def replied(self, work: float, full: bool, now: float) -> None:
        """A request was answered. `work` is its size in any unit; `full`: as many as may be were in flight."""
        if not full:
            self._restart(now)  # the source of texts is slower: this tells nothing
            return
        if self._warming > 0:
            self._warming -= 1
            self._restart(now)
            return
        self._count += 1
        self._work += work
        if self._count >= max(ROUND_REQUESTS_MIN, 2 * self.size) and now - self._began >= ROUND_S_MIN:
            self._end_round(self._work / (now - self._began))
            self._restart(now)

    def refused(self, sent_at: float, wait_s: float, now: float) -> None:
        """A request was refused because there are too many."""
        self.not_before = max(self.not_before, now + wait_s)
        if sent_at <= self._cut_at:
            return
        self._cut_at = now
        self._tries_more, self._rate = False, 0.0
        self._use(max(1, self.size // 2))

    def _end_round(self, rate: float) -> None:
        self._rounds += 1
        if self._tries_more:
            if rate >= GAIN * self._rate:
                self._rate, self._size_before = rate, self.size
                self._more()
            else:
                self._tries_more = False
                self._use(self._size_before)
        elif self._rounds >= STEADY_ROUNDS:
            self._rate, self._size_before = rate, self.size
            self._tries_more = self._fixed is None
            self._more()

    def _more(self) -> None:
        more = min(self._most, max(self.size + 1, int(self.size * GROWTH)))
        if more == self.size:
            self._tries_more = False
        self._use(more)

    def _use(self, size: int) -> None:
        self.size, self._rounds, self._warming = size, 0, size

    def _restart(self, now: float) -> None:
        self._count, self._work, self._began = 0, 0.0, now


class Gate:
    """Lets requests pass as the window allows; those that are sent again first. For one event loop."""

    def __init__(self, window: CongestionWindow, clock: Clock, sleep: Sleep) -> None:
        self.window = window
        self.running = 0
        self._clock = clock
        self._sleep = sleep
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def passed(self, *, again: bool) -> AsyncIterator[None]:
        """While one request is in flight."""
        await self._enter(again)
        try:
            while (early_s := self.window.not_before - self._clock()) > 0:
                await self._sleep(early_s)  # in its place: nobody else may send, either
            yield
        finally:
            self.running -= 1
            self._open()

    async def _enter(self, again: bool) -> None:
        if not self._waiting and self.running < self.window.size:
            self.running += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if again else self._waiting.append)(waiter)
        self._open()
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():  # it was let pass in this very moment
                self.running -= 1
                self._open()
            raise

    def _open(self) -> None:
        """Let those pass that may."""
        while self._waiting and self.running < self.window.size:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else it was cancelled
                self.running += 1
                waiter.set_result(None)
