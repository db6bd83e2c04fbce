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

IN_FLIGHT_FIRST = 4  # two keep one node and the network both busy; four feed a second node
IN_FLIGHT_MAX = 64  # of "auto"; each holds its texts and its vectors here, and a connection
GROWTH = 1.5
GAIN = 1.05  # less is noise
STEADY_ROUNDS = 16
ROUND_REQUESTS_MIN = 8
ROUND_S_MIN = 0.1  # a shorter time measures the machine's whims

Clock = Callable[[], float]
Sleep = Callable[[float], Awaitable[None]]


class Pace:
    """Decides; it neither waits nor looks at a clock. Times are of any monotonic clock, in seconds."""

    def __init__(self, fixed: int | None = None, *, most: int = IN_FLIGHT_MAX) -> None:
        """`fixed`: so many at most, whatever they bring; only refusals make it fewer, for a while."""
        self._fixed = fixed
        self._most = fixed or most
        self.window = min(fixed or IN_FLIGHT_FIRST, self._most)
        self.not_before = 0.0
        self._cut_at = float("-inf")
        self._tries_more = fixed is None
        self._rate = 0.0  # work a second that the window before has brought
        self._window_before = self.window
        self._rounds = 0  # since the window is what it is
        self._warming = 0
        self._count, self._work, self._began = 0, 0.0, float("nan")

    def bound(self, most: int) -> None:
        """Never more than that from now on: replies are larger than was thought."""
        self._most = max(1, min(self._most, most))
        self.window = min(self.window, self._most)

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
        if self._count >= max(ROUND_REQUESTS_MIN, 2 * self.window) and now - self._began >= ROUND_S_MIN:
            self._end_round(self._work / (now - self._began))
            self._restart(now)

    def refused(self, sent_at: float, wait_s: float, now: float) -> None:
        """A request was refused because there are too many."""
        self.not_before = max(self.not_before, now + wait_s)
        if sent_at <= self._cut_at:
            return
        self._cut_at = now
        self._tries_more, self._rate = False, 0.0
        self._use(max(1, self.window // 2))

    def _end_round(self, rate: float) -> None:
        self._rounds += 1
        if self._tries_more:
            if rate >= GAIN * self._rate:
                self._rate, self._window_before = rate, self.window
                self._more()
            else:
                self._tries_more = False
                self._use(self._window_before)
        elif self._rounds >= STEADY_ROUNDS:
            self._rate, self._window_before = rate, self.window
            self._tries_more = self._fixed is None
            self._more()

    def _more(self) -> None:
        more = min(self._most, max(self.window + 1, int(self.window * GROWTH)))
        if more == self.window:
            self._tries_more = False
        self._use(more)

    def _use(self, window: int) -> None:
        self.window, self._rounds, self._warming = window, 0, window

    def _restart(self, now: float) -> None:
        self._count, self._work, self._began = 0, 0.0, now


class Gate:
    """Lets requests pass as the pace allows; those that are sent again first. For one event loop."""

    def __init__(self, pace: Pace, clock: Clock, sleep: Sleep) -> None:
        self.pace = pace
        self.running = 0
        self._clock = clock
        self._sleep = sleep
        self._waiting: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def passed(self, *, again: bool) -> AsyncIterator[None]:
        """While one request is in flight."""
        await self._enter(again)
        try:
            while (early_s := self.pace.not_before - self._clock()) > 0:
                await self._sleep(early_s)  # in its place: nobody else may send, either
            yield
        finally:
            self.running -= 1
            self._open()

    async def _enter(self, again: bool) -> None:
        if not self._waiting and self.running < self.pace.window:
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
        while self._waiting and self.running < self.pace.window:
            waiter = self._waiting.popleft()
            if not waiter.done():  # else it was cancelled
                self.running += 1
                waiter.set_result(None)
