"""The books of the store, asked from the event loop: they block, so they have a thread of their own.

A gateway has one for operators and one for callers. While an operator waits for the one, no call of the other begins:
what a caller asks for without end delays an operator by the call that is under way, no more.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import SimpleQueue
from typing import TypeVar

from embedmesh.rules.errors import SetupError, StoreUnavailable
from embedmesh.rules.shares import Room
from embedmesh.storage.books import Books

log = logging.getLogger("embedmesh.books")

WAITING_MAX = 64  # calls; each takes a few milliseconds
ANSWER_S = 5.0  # as long as a caller waits, its turn included

T = TypeVar("T")


class BooksThread:
    """One call at a time, accounts in turn. The books are opened by the first call, and anew after the store did not
    do one.
    """

    def __init__(
        self,
        open_books: Callable[[], Books],
        *,
        answer_s: float = ANSWER_S,
        waiting_max: int = WAITING_MAX,
        first: "BooksThread | None" = None,
    ) -> None:
        """No call begins while one of those who come `first` waits."""
        self._open = open_books
        self._answer_s = answer_s
        self._first = first
        self._books: Books | None = None  # this and the next are the thread's
        self._doubted = False
        self._turns = _Turns()
        self._waiting = Room(
            waiting_max,
            f"At most {waiting_max} questions to the store wait, of each account a share of that. Try again shortly.",
        )
        self._idle = asyncio.Event()  # nobody waits
        self._idle.set()
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, as no thread of an executor is: what hangs in the store must not keep the process from ending.
        threading.Thread(target=self._work_on, name="books", daemon=True).start()

    async def ask(self, do: Callable[[Books], T], account_id: str = "") -> T:
        """What `do` makes of the books, in the turn of that account; operators have none.

        Raises what it raises, Overloaded, and StoreUnavailable. A call that has begun ends in the thread, whether or
        not somebody waits for it still.
        """
        self._waiting.take(account_id)
        self._idle.clear()
        deadline = asyncio.timeout(self._answer_s)
        try:
            async with deadline:
                return await self._in_turn(do, account_id)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise StoreUnavailable(
                f"The store did not answer within {self._answer_s:g} s. What was asked may be done still: look "
                "before you ask for it again."
            ) from None
        finally:
            self._waiting.give_back(account_id)
            if not self._waiting.taken:
                self._idle.set()

    async def close(self) -> None:
        """Let go of the store. What is under way is waited for, but not for long."""
        self._closed = True
        closing = self._begin(self._let_go)
        self._work.put(None)
        await asyncio.wait([closing], timeout=min(self._answer_s, ANSWER_S))

    async def _in_turn(self, do: Callable[[Books], T], account_id: str) -> T:
        await self._turns.take(account_id)
        try:
            while self._first is not None and not self._first._idle.is_set():
                await self._first._idle.wait()
            if self._closed:
                raise StoreUnavailable("This gateway is stopping. Try again shortly.")
        except BaseException:
            self._turns.end()
            raise
        running = self._begin(lambda: self._do(do))
        running.add_done_callback(lambda _: self._turns.end())  # not before: the thread may be long about it
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


class _Turns:
    """One at a time: accounts in turn, and what one account wants in the order in which it came."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by account, whose turn is next first

    async def take(self, account_id: str) -> None:
        """Returns when it is its turn, which has to be ended."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account_id, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if not turn.cancelled():  # it was given the turn at the moment at which it went
                self.end()
            elif (queue := self._waiting.get(account_id)) is not None:
                with suppress(ValueError):
                    queue.remove(turn)
                if not queue:
                    del self._waiting[account_id]
            raise

    def end(self) -> None:
        """Of a turn: the next one begins."""
        while self._waiting:
            account_id = next(iter(self._waiting))
            queue = self._waiting.pop(account_id)
            turn = queue.popleft()
            if queue:
                self._waiting[account_id] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
