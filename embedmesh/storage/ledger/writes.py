"""What can be written to a store: see batch for how several writes become one transaction."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.db import Db

T = TypeVar("T")


class Stats(msgspec.Struct):
    """What became durable since the store was opened, and what was refused."""

    holds: int = 0
    holds_refused: int = 0  # the account did not cover them, or the key had no room
    captured: int = 0  # requests, under holds of their own and under tabs
    captured_under_tabs: int = 0
    captured_at_notes: int = 0  # streams that their gateway did not end, also found open at start
    holds_extended: int = 0  # each time anew
    released: int = 0
    expired: int = 0
    recovered: int = 0  # found open at start
    units_finished: int = 0  # of batches: whatever their lines came to
    locks_opened: int = 0
    locks_used: int = 0
    locks_expired: int = 0  # unused
    tabs_opened: int = 0
    tabs_recalled: int = 0  # closed before their time, because a hold needed what they had left
    tabs_closed: int = 0  # by this gateway
    tabs_expired: int = 0
    tabs_recovered: int = 0  # found live at start
    late_captures: int = 0  # the hold or the tab had ended before: delivered, not charged
    broken_writes: int = 0  # refused by the store's own rules: a bug of ours
    commits: int = 0
    writes: int = 0  # over `commits`: the mean batch
    largest_batch: int = 0
    failed_batches: int = 0


class WriteDurably(Protocol):
    """Runs a function of the connection and the time with the next batch; its result comes once that is durable.

    It may run again if the batch has to. `accounts` are those whose money it moves, or that it locks. The function must
    raise nothing but the driver's errors.
    """

    def __call__(self, write: Callable[[Db, int], T], accounts: frozenset[str] = ...) -> Awaitable[T]: ...


class SubmitWrite(Protocol):
    """Queues a write. Raises StoreUnavailable for one that is not kept, where it could not be written soon."""

    def __call__(self, write: "Write") -> None: ...


class Write:
    """One thing to write. Methods that are not overridden do nothing."""

    kept = True  # whether it is written again after a batch that failed, until it is durable
    weight = 1  # how much of a batch it takes
    rank = 0  # of its kind: the lower are applied first, so that money is free before it is held again

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        """Look at what is to be done; the accounts whose money it moves. Nothing is written yet."""
        return set()

    @classmethod
    def prepare_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> set[str]:
        """The same for some writes of this kind."""
        return {account_id for write in writes for account_id in write.prepare(db, now_ms)}

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """Run the statements of some writes of this kind, in their order. Raises the drivers' errors."""

    def apply_alone(self, db: Db, now_ms: int) -> None:
        """The same for this one, where each may be refused by itself; then `conclude_all` comes."""
        self.apply_all(db, now_ms, [self])

    @classmethod
    def conclude_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """After `apply_alone` of some: what comes after all of them. Raises the drivers' errors."""

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """The batch is durable: find out what became of some writes of this kind. Raises the drivers' errors."""

    def committed(self, stats: Stats) -> None:
        """The batch is durable, and what became of this write is known."""

    def failed(self, reason: str) -> None:
        """The batch is not durable, or nobody knows, and this write is not kept."""
        raise AssertionError("a kept write is tried until it is durable")

    def parts(self) -> Sequence["Write"]:
        """Smaller writes that do the same together: the store may refuse only some of them."""
        return ()

    def refused(self, error: Exception) -> None:
        """The store's rules refuse this very write, whenever it is tried."""


def as_rows(rows: Sequence[dict[str, Any] | tuple[Any, ...] | msgspec.Struct]) -> dict[str, str]:
    """Values for a statement that takes several rows."""
    return {"rows": msgspec.json.encode(rows).decode()}


def later_ids(db: Db, statement: str, values: dict[str, Any]) -> Callable[[], frozenset[str]]:
    """Run a statement that returns ids; ask for them after the transaction, as often as needed."""
    found = db.later(statement, values)
    return cache(lambda: frozenset(row_id for (row_id,) in found()))


class WaitedWrite(Write, Generic[T]):
    """A write that a caller waits for: `outcome`. It is not kept, because the caller may try again."""

    kept = False

    def __init__(self) -> None:
        self.outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()

    def failed(self, reason: str) -> None:
        self._fail(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        self.failed("The store refused the change.")

    def left(self) -> None:
        """The caller waits no longer. It may not have heard of an outcome that there is already."""
        if self.outcome.done() and not self.outcome.cancelled() and self.outcome.exception() is None:
            self.unheard(self.outcome.result())

    def unheard(self, result: T) -> None:
        """It is durable, and its caller does not know."""

    def _succeed(self, result: T) -> None:
        if not self.outcome.done():
            self.outcome.set_result(result)

    def _fail(self, failure: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)


class Change(WaitedWrite[T]):
    """Any function of the connection and the time."""

    rank = 2

    def __init__(self, write: Callable[[Db, int], T], accounts: frozenset[str] = frozenset()) -> None:
        """`accounts` are those whose money it moves, or that it locks."""
        super().__init__()
        self._write = write
        self._accounts = accounts
        self._result: T

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return set(self._accounts)

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[Change[Any]]") -> None:
        for one in writes:
            one._result = one._write(db, now_ms)

    def committed(self, stats: Stats) -> None:
        self._succeed(self._result)


class KeptChange(Write):
    """Any function of the connection and the time; nobody waits for it, and it is tried until it is durable."""

    rank = 3  # after a `Change` that it undoes

    def __init__(self, write: Callable[[Db, int], None], accounts: frozenset[str]) -> None:
        self._write = write
        self._accounts = accounts

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        return set(self._accounts)

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: "Sequence[KeptChange]") -> None:
        for one in writes:
            one._write(db, now_ms)
