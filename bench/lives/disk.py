"""What runs in threads in production, and the disk under it: late, full, broken. Here it happens at drawn moments.

A call is made at one moment, and what came of it is known at a later one: a process may die between the two.
"""

import asyncio
import errno
import os
import random
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from bench.lives.loop import Loop
from embedmesh.storage.sqlite.driver import driver

COMMIT_S = 0.004  # the most that a COMMIT takes as a rule
LATE_ODDS, LATE_S_MAX = 0.01, 2.2  # longer than a caller waits for its hold


class Disk:
    """The disk under one store, and `Loop.threads`. `trouble_until` is when it is well again."""

    def __init__(self, loop: Loop, dice: random.Random, broken_odds: float) -> None:
        self.seen: Counter[str] = Counter()
        self._loop = loop
        self._dice = dice
        self._broken_odds = broken_odds
        self._full_until = 0.0
        self._lost = False  # what was written last: the kernel will say so once
        loop.threads = self.run

    def fill(self, seconds: float) -> None:
        """Nothing can be written for a while."""
        self._full_until = self._loop.now + seconds

    def mend(self) -> None:
        """It is a good disk from now on, though a slow one."""
        self._broken_odds = self._full_until = 0.0

    def run(self, thread: Any, call: Callable[[], Any], future: "asyncio.Future[Any]") -> None:
        """Make the call soon, or fail, or be late."""
        dice = self._dice
        kind = _kind(call)
        late = kind == "commit" and dice.random() < LATE_ODDS
        if late:
            self.seen["late commits"] += 1
        done_s = dice.random() * (LATE_S_MAX if late else COMMIT_S)
        made = _Once(partial(self._make, kind, call, future, dice.random() * done_s))
        if isinstance(thread, Thread):
            thread.calls.append(made)
        self._loop.call_later(dice.random() * done_s, made)

    def _make(self, kind: str, call: Callable[[], Any], future: "asyncio.Future[Any]", known_s: float) -> None:
        error: BaseException | None = None
        found = None
        try:
            found = self._try(kind, call)
        except Exception as raised:  # noqa: BLE001 - raised where it is awaited
            error = raised
        self._loop.call_later(known_s, _settle, future, found, error)

    def _try(self, kind: str, call: Callable[[], Any]) -> Any:
        if kind == "sync":
            lost, self._lost = self._lost, False
            if lost:
                raise OSError(errno.EIO, "the disk is broken")
            return None
        if kind == "commit":
            if self._loop.now < self._full_until:
                self.seen["commits on a full disk"] += 1
                raise disk_error("SQLITE_FULL")
            if self._dice.random() < self._broken_odds:
                self._lost = self._dice.random() < 0.3
                if self._lost and self._dice.random() < 0.5:
                    call()  # it is durable all the same, which the gateway cannot know
                self.seen["commits lost" if self._lost else "commits that failed"] += 1
                raise disk_error("SQLITE_IOERR_FSYNC" if self._lost else "SQLITE_IOERR_WRITE")
        return call()


class Thread:
    """In place of a gateway's thread for commits: `shutdown` makes the calls that are left."""

    def __init__(self) -> None:
        self.calls: list[_Once] = []

    def shutdown(self, wait: bool = True) -> None:
        """Make the calls that were not made yet."""
        for call in self.calls:
            call()
        self.calls.clear()


class _Once:
    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def __call__(self) -> None:
        call, self._call = self._call, None
        if call is not None:
            call()


def disk_error(name: str) -> Exception:
    """As the driver raises it."""
    error: Exception = driver.OperationalError("disk I/O error")
    error.sqlite_errorname = name  # type: ignore[attr-defined]
    return error


def _kind(call: Callable[[], Any]) -> str:
    if isinstance(call, partial) and call.func is os.fdatasync:
        return "sync"
    return "commit" if getattr(call, "__name__", "") == "commit" else "call"


def _settle(future: "asyncio.Future[Any]", found: Any, error: BaseException | None) -> None:
    with suppress(asyncio.InvalidStateError):
        if error is None:
            future.set_result(found)
        else:
            future.set_exception(error)
