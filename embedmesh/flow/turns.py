"""Work that would block the event loop, in threads of its own, in turns by account.

A work is a generator that yields now and then; its result is what it returns. After TURN_S the next account has its
turn. So a large work of one account delays others by moments, and every account has its share, however many works one
sends. Nothing else runs in these threads.
"""

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

from embedmesh.rules.errors import Overloaded

T = TypeVar("T")

THREADS = 2  # most of the work needs the interpreter's lock: more would only contend for it
TURN_S = 0.01  # of CPU time: what each account that comes first costs the next
ACCOUNT_WORKS_MAX = 64  # waiting, each with a body of at most 4 MiB: what one account may keep here

Work = Generator[None, None, T]


class _Queued(Generic[T]):
    def __init__(self, work: Work[T]) -> None:
        self.work = work
        self.outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()


class Turns:
    """The threads, and the works that wait for them. Used on one event loop."""

    def __init__(self, threads: int = THREADS) -> None:
        self._free = threads
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="count")
        self._waiting: OrderedDict[str, deque[_Queued[Any]]] = OrderedDict()  # by account; the next turn comes first

    async def run(self, account_id: str, work: Work[T]) -> T:
        """Run a work and return its result. Raises what it raises, and Overloaded if the account has too many waiting.

        A work that is cancelled ends with its turn.
        """
        queued = _Queued(work)
        if len(self._waiting.get(account_id, ())) >= ACCOUNT_WORKS_MAX:
            raise Overloaded(f"This account has {ACCOUNT_WORKS_MAX} large requests waiting here. Try again shortly.")
        self._waiting.setdefault(account_id, deque()).append(queued)
        self._next()
        try:
            return await queued.outcome
        finally:
            del queued  # or it, what it raised, and every frame on the way with its body would hold each other

    async def call(self, account_id: str, function: Callable[..., T], *given: Any) -> T:
        """Run a function that takes no longer than about a turn."""
        return await self.run(account_id, _once(function, *given))

    def _next(self) -> None:
        while self._free and self._waiting:
            account_id, works = self._waiting.popitem(last=False)
            queued = works.popleft()
            if works:
                self._waiting[account_id] = works
            if queued.outcome.done():  # the caller has gone
                continue
            self._free -= 1
            turn = asyncio.get_running_loop().run_in_executor(self._threads, _turn, queued.work)
            turn.add_done_callback(partial(self._ended, account_id, queued))

    def _ended(self, account_id: str, queued: _Queued[Any], turn: "asyncio.Future[tuple[bool, Any]]") -> None:
        self._free += 1
        if not queued.outcome.done():
            if (error := turn.exception()) is not None:
                queued.outcome.set_exception(error)
            elif turn.result()[0]:
                queued.outcome.set_result(turn.result()[1])
            else:
                self._waiting.setdefault(account_id, deque()).appendleft(queued)
        self._next()


def _turn(work: Work[T]) -> tuple[bool, T | None]:
    """Whether the work is done now, and its result."""
    until = time.thread_time() + TURN_S
    try:
        while time.thread_time() < until:
            next(work)
    except StopIteration as end:
        return True, end.value
    return False, None


def _once(function: Callable[..., T], *given: Any) -> Work[T]:
    yield from ()
    return function(*given)
