"""The books of the store block, so the event loop calls them in a thread of their own.

A gateway has one thread for operators and one for callers. While an operator's call waits, no caller's call begins: a
flood of callers' calls delays an operator by at most the one call that is under way. Viewers, who may only look at what
is the operators', use the operators' thread: they wait in a room of their own, and an operator's call is before theirs.
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

from embedmesh.rules.acts import Actor
from embedmesh.rules.errors import SetupError, StoreUnavailable
from embedmesh.rules.limits import BOOKS_ANSWER_S, BOOKS_WAITING_MAX
from embedmesh.rules.shares import Room
from embedmesh.storage.books import Books

OPERATORS = ""  # in place of an account

log = logging.getLogger("embedmesh.books")

T = TypeVar("T")


class BooksThread:
    """Runs one call at a time, accounts in turn. Opens the books at the first call and after a failure."""

    def __init__(
        self,
        open_books: Callable[[], Books],
        *,
        answer_s: float = BOOKS_ANSWER_S,
        waiting_max: int = BOOKS_WAITING_MAX,
        first: "BooksThread | None" = None,
    ) -> None:
        """No call begins while a call of `first` waits."""
        self._open = open_books
        self._answer_s = answer_s
        self._first = first
        self._books: Books | None = None  # this and the next are the thread's
        self._doubted = False
        self._turns = _Turns()
        self._waiting = Room(
            waiting_max,
            f"At most {waiting_max} calls to the store wait at a time, shared among accounts. Try again shortly.",
        )
        viewing_max = max(1, waiting_max // 2)
        self._viewing = Room(
            viewing_max, f"At most {viewing_max} calls of viewers wait at a time, shared among keys. Try again shortly."
        )
        self._idle = asyncio.Event()  # while no call waits; those of viewers do not count
        self._idle.set()
        self._closed = False
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # A daemon, unlike an executor's thread: a call that hangs in the store must not keep the process from ending.
        threading.Thread(target=self._work_on, name="books", daemon=True).start()

    async def ask(self, do: Callable[[Books], T], account_id: str = "", by: Actor | None = None, viewer: str = "") -> T:
        """The result of `do`, in the account's turn; operators have no account. Without `by`, `do` can change nothing.

        `viewer` is the key of somebody who may see what operators see, and no more: it has turns as an account has.

        Raises what `do` raises, Overloaded, and StoreUnavailable. A call that has begun runs to its end in the thread,
        even if nobody waits for it any more.
        """
        room, whose = (self._viewing, viewer) if viewer else (self._waiting, account_id)
        room.take(whose)
        if not viewer:
            self._idle.clear()
        deadline = asyncio.timeout(self._answer_s)
        try:
            async with deadline:
                return await self._in_turn(do if by is None else lambda books: books.by(by, do), whose)
        except TimeoutError:
            if not deadline.expired():
                raise
            raise StoreUnavailable(
                f"The store did not answer within {self._answer_s:g} s. The change may still happen: look before you "
                "try again."
            ) from None
        finally:
            room.give_back(whose)
            if not self._waiting.taken:
                self._idle.set()

    async def close(self) -> None:
        """Close the books. Waits for the call that is under way, but not for long."""
        self._closed = True
        closing = self._begin(self._let_go)
        self._work.put(None)
        await asyncio.wait([closing], timeout=min(self._answer_s, BOOKS_ANSWER_S))

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
        running.add_done_callback(lambda _: self._turns.end())  # even if nobody waits for the thread
        return await asyncio.shield(running)

    def _begin(self, work: Callable[[], T]) -> "asyncio.Future[T]":
        """Run `work` in the thread."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001 - the waiting call gets it
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
            # The error may name a path or an address: for the log only.
            log.warning("the books will be opened again: %s", error)
            self._doubted = True
            raise StoreUnavailable("The store failed. Try again shortly.") from None

    def _opened(self) -> Books:
        """The books, opened again after a failure; if that fails, too, the old ones, which may still read."""
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
    """One call at a time: operators first, accounts in turn, calls of one account in their order."""

    def __init__(self) -> None:
        self._taken = False
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by account; the next account is first

    async def take(self, account_id: str) -> None:
        """Wait for a turn, which the caller has to end."""
        if not self._taken:
            self._taken = True
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(account_id, deque()).append(turn)
        try:
            await turn
        except BaseException:
            if not turn.cancelled():  # its turn came at the moment of its cancellation
                self.end()
            elif (queue := self._waiting.get(account_id)) is not None:
                with suppress(ValueError):
                    queue.remove(turn)
                if not queue:
                    del self._waiting[account_id]
            raise

    def end(self) -> None:
        """End a turn: the next one begins."""
        while self._waiting:
            account_id = OPERATORS if OPERATORS in self._waiting else next(iter(self._waiting))
            queue = self._waiting.pop(account_id)
            turn = queue.popleft()
            if queue:
                self._waiting[account_id] = queue
            if not turn.done():
                turn.set_result(None)
                return
        self._taken = False
