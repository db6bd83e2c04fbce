"""A deadline for a wait that nearly always ends in time: a fifth of the cost of `asyncio.timeout`, and coarser.

All such deadlines of an event loop share one timer, which ends those that are due every TICK_S.
"""

import asyncio
from collections.abc import Callable
from types import TracebackType
from weakref import WeakKeyDictionary

TICK_S = 0.02  # how late a deadline may be noticed; our shortest is a second


class within:
    """Cancels what is awaited inside after `seconds`, and raises TimeoutError in its place.

    After `seconds`, `more` may grant further seconds; 0 cancels.
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
        """The deadline has passed."""
        if self._more is not None and (seconds := self._more()) > 0:
            self._tick = self._watch.add(self, seconds, self._loop)
            return
        self._late = True
        self._task.cancel()


class _Watch:
    """The deadlines of one event loop, by the tick at which they are due. Holds no reference to the loop."""

    def __init__(self) -> None:
        self._due: dict[int, dict[within, None]] = {}  # in order of arrival
        self._next = 0  # the tick at which the timer fires; 0 if there is none

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
