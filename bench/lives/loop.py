"""An event loop in virtual time: it never waits, and dice choose which of the callbacks that are ready runs next.

Whatever runs belongs to the process (of the simulation) whose context it was made in. Nothing of a dead process ever
runs again, so that a process may die between any two steps: at every await.
"""

import asyncio
import contextvars
import heapq
import itertools
import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

STEP_S = 20e-6  # what each step takes
STALL_ODDS = 0.0005  # a step that takes long: a collection of garbage, a machine that is busy with something else
STALL_S_MAX = 0.4
STEPS_MAX = 400_000  # of one world: more is a loop that does not end


class SimProcess(Protocol):
    """What may die."""

    alive: bool

    def stepped(self) -> None:
        """One of its callbacks has run."""
        ...


PROCESS: contextvars.ContextVar[SimProcess | None] = contextvars.ContextVar("process", default=None)


class Task(asyncio.Task[Any]):
    """A task whose order in a set does not depend on where in memory it is."""

    numbers = itertools.count()

    def __init__(self, *args: Any, **more: Any) -> None:
        self._hash = next(Task.numbers)
        super().__init__(*args, **more)

    def __hash__(self) -> int:
        return self._hash


class Loop(asyncio.BaseEventLoop):
    """One world's time. `disorder` is how often the next callback is drawn, and not the first that was ready.

    A busy loop sees only every `turn_s` what has become ready: then much is ready at once. 0.0: it is not busy.
    """

    def __init__(self, dice: random.Random, disorder: float, turn_s: float = 0.0) -> None:
        super().__init__()
        self._turn_s = turn_s
        self.now = 0.0
        self.steps = 0
        self.threads: Callable[[Any, Callable[[], Any], asyncio.Future[Any]], None]  # runs what would run in threads
        self.complaints: list[str] = []  # uncaught exceptions
        self._dice = dice
        self._disorder = disorder
        self._tasks: list[Task] = []  # kept: a task that is forgotten would be closed in the middle of the world
        self._generators: list[Any] = []  # the same: nobody knows when one would be collected
        Task.numbers = itertools.count()
        self.set_task_factory(self._make_task)
        self.set_exception_handler(self._complain)

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, *args: Any, **more: Any) -> asyncio.TimerHandle:  # type: ignore[override]
        if self._turn_s:
            when = math.ceil(when / self._turn_s) * self._turn_s
        return super().call_at(when, *args, **more)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]
        future = self.create_future()
        self.threads(executor, (lambda: func(*args)) if args else func, future)
        return future

    def bury(self) -> None:
        """End all tasks: nothing of them runs on. Call it when the loop is not running."""
        self.complaints = []
        for task in self._tasks:
            if not task.done():
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                coroutine: Any = task.get_coro()
                with suppress(RuntimeError):  # it awaits something in the end
                    coroutine.close()
        self._ready.clear()  # type: ignore[attr-defined]
        self._scheduled.clear()  # type: ignore[attr-defined]
        self.close()

    def _run_once(self) -> None:
        scheduled, ready = self._scheduled, self._ready  # type: ignore[attr-defined]
        if not ready:
            if not scheduled:
                raise AssertionError("every task waits, and nothing will happen")
            self.now = max(self.now, scheduled[0]._when)
        while scheduled and scheduled[0]._when <= self.now:
            timer = heapq.heappop(scheduled)
            timer._scheduled = False
            if not timer._cancelled:
                ready.append(timer)
        if not ready:
            return
        at = 0
        if len(ready) > 1 and self._dice.random() < self._disorder:
            at = int(self._dice.random() * len(ready))
        handle = ready[at]
        del ready[at]
        process = handle._context.get(PROCESS)
        if handle._cancelled or (process is not None and not process.alive):
            return
        self.steps += 1
        if self.steps > STEPS_MAX:
            raise AssertionError("this world does not end")
        self.now += STEP_S
        if self._dice.random() < STALL_ODDS:
            self.now += self._dice.random() * STALL_S_MAX
        handle._run()
        if process is not None:
            process.stepped()

    def _asyncgen_firstiter_hook(self, agen: Any) -> None:
        self._generators.append(agen)

    def _make_task(self, loop: asyncio.AbstractEventLoop, coro: Any, /, **more: Any) -> Task:
        task = Task(coro, loop=loop, **more)
        self._tasks.append(task)
        return task

    def _complain(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        self.complaints.append(f"{context['message']}: {type(error).__name__}: {error}")

    def _write_to_self(self) -> None:
        """Nobody sleeps."""

    def _process_events(self, event_list: Any) -> None:
        """There are none."""


class Clock:
    """The loop's time, and what time of day that is. Implements the port `Clock`."""

    def __init__(self, loop: Loop, start_ms: int) -> None:
        self._loop = loop
        self._start_ms = start_ms

    def monotonic(self) -> float:
        return 1_000.0 + self._loop.now

    def unix_ms(self) -> int:
        return self._start_ms + int(self._loop.now * 1000)
