"""The books of the store, asked from the event loop: they block, so they have one thread of their own."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

from embedmesh.rules.errors import Overloaded, SetupError, StoreUnavailable
from embedmesh.storage.books import Books

log = logging.getLogger("embedmesh.books")

WAITING_MAX = 64  # calls; each takes a few milliseconds
ANSWER_S = 5.0  # as long as a caller waits, its turn included

T = TypeVar("T")


class BooksThread:
    """One call at a time. The books are opened by the first call, and anew after the store did not do one."""

    def __init__(
        self, open_books: Callable[[], Books], *, answer_s: float = ANSWER_S, waiting_max: int = WAITING_MAX
    ) -> None:
        self._open = open_books
        self._answer_s = answer_s
        self._waiting_max = waiting_max
        self._books: Books | None = None  # this and the next are the thread's
        self._doubted = False
        self._turn = asyncio.Semaphore()
        self._waiting = 0
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, as no thread of an executor is: what hangs in the store must not keep the process from ending.
        threading.Thread(target=self._work_on, name="books", daemon=True).start()

    async def ask(self, do: Callable[[Books], T]) -> T:
        """What `do` makes of the books. Raises what it raises, Overloaded, and StoreUnavailable.

        A call that has begun ends in the thread, whether or not somebody waits for it still.
        """
        if self._waiting >= self._waiting_max:
            raise Overloaded("As many questions to the store are waiting as may. Try again shortly.")
        self._waiting += 1
        deadline = asyncio.timeout(self._answer_s)
        try:
            async with deadline:
                return await self._in_turn(do)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise StoreUnavailable(
                f"The store did not answer within {self._answer_s:g} s. What was asked may be done still: look "
                "before you ask for it again."
            ) from None
        finally:
            self._waiting -= 1

    async def close(self) -> None:
        """Let go of the store. What is under way is waited for, but not for long."""
        self._closed = True
        closing = self._begin(self._let_go)
        self._work.put(None)
        await asyncio.wait([closing], timeout=min(self._answer_s, ANSWER_S))

    async def _in_turn(self, do: Callable[[Books], T]) -> T:
        await self._turn.acquire()
        if self._closed:
            self._turn.release()
            raise StoreUnavailable("This gateway is stopping. Try again shortly.")
        running = self._begin(lambda: self._do(do))
        running.add_done_callback(lambda _: self._turn.release())  # not before: the thread may be long about it
        return await asyncio.shield(running)

    def _begin(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Have it done by the thread."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - whoever waits gets it
                done.set_exception(error)

        self._work.put(run)
        return asyncio.wrap_future(done)

    def _work_on(self) -> None:
        while (run := self._work.get()) is not None:
            run()

    def _do(self, do: Callable[[Books], T]) -> T:
        try:
            return do(self._opened())
        except (SetupError, StoreUnavailable) as error:
            # These words may name a path or an address, which are for the log only.
            log.warning("the books will be opened anew: %s", error)
            self._doubted = True
            raise StoreUnavailable("The store did not do it. Try again shortly.") from None

    def _opened(self) -> Books:
        """Books, new ones after a failure; the old ones where there are none: what only reads may go on."""
        if self._books is not None and not self._doubted:
            return self._books
        try:
            fresh = self._open()
        except (SetupError, StoreUnavailable):
            if self._books is None:
                raise
            return self._books
        self._let_go()
        self._books, self._doubted = fresh, False
        return fresh

    def _let_go(self) -> None:
        books, self._books = self._books, None
        if books is not None:
            books.close()
