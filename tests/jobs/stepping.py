"""Workers that are stopped at any await: for a while, or for ever, as by a crash.

A worker is a coroutine of its own task. It goes on for a number of steps, each to the next await that has to wait. One
that has crashed is never resumed, and nothing of it is cleaned up: no `finally` runs, as in a process that was killed.
What it had asked of the store or the disk may still be done.
"""

import asyncio
import ctypes
from collections.abc import Coroutine, Generator
from typing import Any


class Stepped:
    """One worker. `steps` are those that it has made."""

    def __init__(self, work: Coroutine[Any, Any, object]) -> None:
        self._work = work
        self._left = 0
        self._crashed = False
        self._gate = asyncio.Event()
        self._parked = asyncio.Event()
        self.steps = 0
        self._task = asyncio.get_running_loop().create_task(self._run())

    @property
    def over(self) -> bool:
        """Whether it has come to its end, or has crashed."""
        return self._task.done()

    async def go_on(self, steps: int) -> bool:
        """Let it make some steps; whether it is over."""
        if not self.over:
            self._left = steps
            self._parked.clear()
            self._gate.set()
            parked = asyncio.ensure_future(self._parked.wait())
            await asyncio.wait({self._task, parked}, return_when=asyncio.FIRST_COMPLETED)
            parked.cancel()
        if self.over:
            self._task.result()
        return self.over

    async def crash(self) -> None:
        """It makes no more steps."""
        self._crashed = True
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._work))  # never collected: that would run its `finally`
        self._gate.set()
        await self._task

    async def _run(self) -> None:
        await self

    def __await__(self) -> Generator[Any, None, None]:
        error: BaseException | None = None
        while True:
            while not self._left and not self._crashed:
                self._parked.set()
                self._gate.clear()
                try:
                    yield from self._gate.wait().__await__()
                except asyncio.CancelledError as cancelled:
                    error = cancelled
            if self._crashed:
                return
            self._left -= 1
            self.steps += 1
            try:
                waits_for = self._work.send(None) if error is None else self._work.throw(error)
            except StopIteration:
                return
            error = None
            try:
                yield waits_for
            except BaseException as raised:  # noqa: BLE001 - it is the worker's
                error = raised
