"""What can be written to a store, and how several writes become one transaction.

Writes of one kind are applied together: a few statements for all of them. If the store refuses one of them, the batch
begins again with each write in a savepoint of its own, so that only that one is refused. Writes learn later whether the
transaction became durable; a write may be applied again if nothing was kept of what it did before.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.db import Db, name_of, refusals

T = TypeVar("T")

logger = logging.getLogger(__name__)


class Stats(msgspec.Struct):
    """What became durable since the store was opened, and what was refused."""

    holds: int = 0
    holds_refused: int = 0  # the account did not cover them, or the key had no room
    captured: int = 0
    released: int = 0
    expired: int = 0
    recovered: int = 0  # found open at start
    late_captures: int = 0  # the hold had ended before: delivered, not charged
    broken_writes: int = 0  # refused by the store's own rules: a bug of ours
    commits: int = 0
    writes: int = 0  # over `commits`: the mean batch
    largest_batch: int = 0
    failed_batches: int = 0


class WriteDurably(Protocol):
    """Runs a function of the connection and the time with the next batch; its result comes once that is durable."""

    def __call__(self, write: Callable[[Db, int], T]) -> Awaitable[T]: ...


class Write(Protocol):
    """One thing to write."""

    kept: bool  # whether it is written again after a batch that failed, until it is durable
    rank: int  # of its kind: the lower are applied first, so that money is free before it is held again

    def prepare(self, db: Db, now_ms: int) -> set[str]:
        """Look at what is to be done; the accounts whose money it moves. Nothing is written yet."""
        ...

    @classmethod
    def apply_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """Run the statements of some writes of this kind, in their order. Raises the drivers' errors."""
        ...

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """The batch is durable: find out what became of some writes of this kind. Raises the drivers' errors."""
        ...

    def committed(self, stats: Stats) -> None:
        """The batch is durable, and what became of this write is known."""
        ...

    def failed(self, reason: str) -> None:
        """The batch is not durable, or nobody knows, and this write is not kept."""
        ...

    def refused(self, error: Exception) -> None:
        """The store's rules refuse this very write, whenever it is tried."""
        ...


def apply_batch(db: Db, now_ms: int, batch: Sequence[Write]) -> None:
    """Apply a batch inside the transaction that is open. Raises the drivers' errors."""
    _lock(db, now_ms, batch)
    for kind, writes in _by_kind(batch):
        kind.apply_all(db, now_ms, writes)


def apply_each(db: Db, now_ms: int, batch: Sequence[Write]) -> list[Write]:
    """The same where one of them is refused: each in a savepoint. Returns those that were not refused."""
    _lock(db, now_ms, batch)
    applied = []
    for kind, writes in _by_kind(batch):
        for write in writes:
            db.execute("SAVEPOINT one_write")
            try:
                kind.apply_all(db, now_ms, [write])
            except refusals() as error:
                db.execute("ROLLBACK TO one_write")
                logger.error("the store refused a %s: %s", kind.__name__, name_of(error))
                write.refused(error)
            else:
                applied.append(write)
            db.execute("RELEASE one_write")
    return applied


def settle_batch(db: Db, now_ms: int, batch: Sequence[Write]) -> None:
    """Once it is durable, find out what became of each. Raises the drivers' errors."""
    for kind, writes in _by_kind(batch):
        kind.settle_all(db, now_ms, writes)


def _lock(db: Db, now_ms: int, batch: Sequence[Write]) -> None:
    if accounts := {account for write in batch for account in write.prepare(db, now_ms)}:
        db.lock_accounts(accounts)


def _by_kind(batch: Sequence[Write]) -> list[tuple[type[Write], list[Write]]]:
    """In the order of their ranks; those of one kind in the order in which they came."""
    in_order = sorted(batch, key=lambda write: (write.rank, type(write).__name__))
    return [(kind, list(writes)) for kind, writes in groupby(in_order, key=type)]


def as_rows(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
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

    @classmethod
    def settle_all(cls, db: Db, now_ms: int, writes: Sequence[Any]) -> None:
        """Nothing more to find out."""

    def failed(self, reason: str) -> None:
        self._fail(StoreUnavailable(reason))

    def refused(self, error: Exception) -> None:
        self.failed("The store refused the change.")

    def _succeed(self, result: T) -> None:
        if not self.outcome.done():
            self.outcome.set_result(result)

    def _fail(self, failure: Exception) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)


class Change(WaitedWrite[T]):
    """Any function of the connection and the time."""

    rank = 1

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
