"""Time that passes only when it is told to, for a gateway under a tracer: on its loop, and on its clock.

Else timers would come while it works, the more of them the slower the machine, and no two counts would be alike.
"""

import heapq
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context
from typing import Any

import uvloop

from embedmesh.rules import clock as clock_module
from embedmesh.rules.clock import SystemClock


class StillTimer:
    """As asyncio.TimerHandle."""

    def __init__(self, when: float, callback: Callable[[], object], context: Context | None) -> None:
        self._when, self._callback, self._context = when, callback, context
        self._cancelled = False

    def when(self) -> float:
        """On the loop's clock."""
        return self._when

    def cancel(self) -> None:
        """It will not run."""
        self._cancelled = True

    def cancelled(self) -> bool:
        """Whether it will not."""
        return self._cancelled

    def run_on(self, loop: "StillLoop") -> None:
        """Now, or rather with what the loop does next."""
        if not self._cancelled:
            loop.call_soon(self._callback, context=self._context)


class StillLoop(uvloop.Loop):
    """A loop whose time stands still between `stand_still` and `go_on`."""

    def __init__(self) -> None:
        super().__init__()
        self._now_s: float | None = None
        self._timers: list[tuple[float, int, StillTimer]] = []
        self._numbers = itertools.count()

    def stand_still(self) -> None:
        """From now on time passes by `passes`, and timers that are made run by it alone."""
        self._now_s = super().time()

    def go_on(self) -> None:
        """Timers that have not run never do."""
        self._now_s = None

    def passes(self, seconds: float) -> None:
        """So much later: what is due by then runs."""
        assert self._now_s is not None
        until_s = self._now_s + seconds
        while self._timers and self._timers[0][0] <= until_s:
            when, _, timer = heapq.heappop(self._timers)
            self._now_s = max(self._now_s, when)
            timer.run_on(self)
        self._now_s = until_s

    def next_timer_s(self, at_most: float) -> float:
        """How long until the next one, or `at_most`."""
        while self._timers and self._timers[0][2].cancelled():
            heapq.heappop(self._timers)
        return min(max(self._timers[0][0] - self.time(), 0.0), at_most) if self._timers else at_most

    def time(self) -> float:
        return super().time() if self._now_s is None else self._now_s

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        if self._now_s is None:
            return super().call_at(when, callback, *args, context=context)
        timer = StillTimer(when, (lambda: callback(*args)) if args else callback, context)
        heapq.heappush(self._timers, (when, next(self._numbers), timer))
        return timer

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Any:
        if self._now_s is None:
            return super().call_later(delay, callback, *args, context=context)
        return self.call_at(self._now_s + delay, callback, *args, context=context)

    async def pause(self, seconds: float) -> None:
        """Wait, really."""
        over = self.create_future()
        super().call_later(seconds, over.set_result, None)
        await over


class StillClock(SystemClock):
    """The loop's time."""

    def __init__(self, loop: StillLoop) -> None:
        self.monotonic = loop.time


class _StillModule:
    """In place of the module `time` under SystemClock."""

    def __init__(self, loop: StillLoop) -> None:
        self._loop = loop
        self._ahead_s = time.time() - loop.time()

    def time_ns(self) -> int:
        return int((self._loop.time() + self._ahead_s) * 1e9)


@contextmanager
def still_clock(loop: StillLoop) -> Iterator[SystemClock]:
    """A clock for a gateway, which costs it what the real one does."""
    names = vars(clock_module)
    real, names["time"] = names["time"], _StillModule(loop)
    try:
        yield StillClock(loop)
    finally:
        names["time"] = real
