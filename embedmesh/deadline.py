"""A deadline for a wait that nearly always ends before: a fifth of the cost of `asyncio.timeout`, and coarser.

All such waits of an event loop share one timer, which looks every TICK_S at those that are due.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from weakref import WeakKeyDictionary

TICK_S = 0.02  # how late a deadline may be noticed; the shortest that we set is a second


class within:
    """What is awaited inside is cancelled after so many seconds, and TimeoutError is raised in its place.

    When they have passed `more` is asked for how many it may have in addition; it is cancelled when that is none.
    """

    __slots__ = ("_cancelling", "_late", "_loop", "_more", "_seconds", "_task", "_tick", "_watch")

    def __init__(self, seconds: float, more: Callable[[], float] | None = None) -> None:
        self._seconds = seconds
        self._more = more

    def __enter__(self) -> None:
        loop = asyncio.get_running_loop()
        task = asyncio.current_task(loop)
        assert task is not None
        self._task, self._cancelling, self._late, self._loop = task, task.cancelling(), False, loop
        watch = _watches.get(loop)
        if watch is None:
            watch = _watches[loop] = _Watch()
        self._watch = watch
        self._tick = watch.add(self, self._seconds, loop)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._watch.drop(self, self._tick)
        if self._late and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise TimeoutError from error

    def end(self) -> None:
        """Its time has come."""
        if self._more is not None and (seconds := self._more()) > 0:
            self._tick = self._watch.add(self, seconds, self._loop)
            return
        self._late = True
        self._task.cancel()


class _Watch:
    """The deadlines of one event loop, by the tick at which they are due. Holds nothing that would keep the loop."""

    def __init__(self) -> None:
        self._due: dict[int, dict[within, None]] = {}  # who came first is told first
        self._next = 0  # the tick at which the timer comes; 0 while there is none

    def add(self, one: within, seconds: float, loop: asyncio.AbstractEventLoop) -> int:
        now = loop.time()
        tick = int((now + seconds) / TICK_S) + 1
        due = self._due.get(tick)
        if due is None:
            due = self._due[tick] = {}
        due[one] = None
        if not self._next or tick < self._next:
            self._wake_at(tick, now, loop)
        return tick

    def drop(self, one: within, tick: int) -> None:
        if (due := self._due.get(tick)) is not None:
            due.pop(one, None)

    def _wake_at(self, tick: int, now: float, loop: asyncio.AbstractEventLoop) -> None:
        self._next = tick
        loop.call_later(max(tick * TICK_S - now, 0.0), self._wake, tick, loop)

    def _wake(self, tick: int, loop: asyncio.AbstractEventLoop) -> None:
        if tick != self._next:
            return  # an earlier one took its place
        now = loop.time()
        for passed in [each for each, due in self._due.items() if each * TICK_S <= now or not due]:
            for one in self._due.pop(passed):
                one.end()
        self._next = 0
        if self._due:
            self._wake_at(min(self._due), now, loop)


_watches: WeakKeyDictionary[asyncio.AbstractEventLoop, _Watch] = WeakKeyDictionary()
