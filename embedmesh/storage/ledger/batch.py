"""How several writes become one transaction.

Writes of one kind are applied together: a few statements for all of them. If the store refuses one of them, the batch
begins again with each write in a savepoint of its own, so that only that one is refused. A write may be applied again
if nothing was kept of what it did before. Either way all is locked in one order, the same in every gateway.
"""

import logging
from collections import deque

from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Db, name_of, refusals
from embedmesh.storage.ledger.writes import Write
from embedmesh.storage.sql import FACTS_SQL

BATCH_WRITES_MAX = 128  # requests: about 3 ms of work; to make it durable takes as long


logger = logging.getLogger(__name__)


class WriteBatch:
    """The `writes` that become durable together; `applied` are those that the store did not refuse.

    It takes them from the queue once its transaction has begun. All methods raise `errors()`, and may run in a thread:
    the event loop does not touch the batch meanwhile.
    """

    def __init__(self, queue: deque[Write], clock: Clock, *, probe: bool) -> None:
        """`probe`: write a row of no meaning, too. A batch that changes nothing says nothing of the disk."""
        self._queue = queue
        self._clock = clock
        self._probe = probe
        self._now_ms = 0
        self._kinds: list[tuple[type[Write], list[Write]]] = []
        self.writes: list[Write] = []
        self.applied: list[Write] = []
        self.refused = 0

    def apply(self, db: Db) -> None:
        """Run the statements. After one of `refusals()`, `apply_again` is called in a new transaction."""
        room = BATCH_WRITES_MAX
        while self._queue and room > 0:
            self.writes.append(write := self._queue.popleft())
            room -= write.weight
        self._now_ms = self._clock.unix_ms()
        if self._probe:
            db.execute(FACTS_SQL["write_probe"], {"now_ms": self._now_ms})
        self._kinds = _by_kind(self.writes)
        self._lock(db)
        for kind, writes in self._kinds:
            kind.apply_all(db, self._now_ms, writes)
        self.applied = self.writes

    def apply_again(self, db: Db) -> None:
        """Run them one by one, and leave out what the store refuses; `refused` is how many that were."""
        self.refused = 0
        self._lock(db)
        self.applied = []
        for kind, writes in self._kinds:
            db.execute("SAVEPOINT one_kind")
            others = len(self.applied)
            for write in writes:
                self._apply_one(db, write)
            try:
                kind.conclude_all(db, self._now_ms, self.applied[others:])
            except refusals() as error:
                db.execute("ROLLBACK TO one_kind")
                for write in self.applied[others:]:
                    self._refuse(write, error)
                del self.applied[others:]
            db.execute("RELEASE one_kind")

    def _apply_one(self, db: Db, write: Write) -> None:
        """With all that it did undone where the store refuses it; then its parts are tried."""
        db.execute("SAVEPOINT one_write")
        try:
            write.apply_alone(db, self._now_ms)
        except refusals() as error:
            db.execute("ROLLBACK TO one_write")
            parts = write.parts()
            if not parts:
                self._refuse(write, error)
        else:
            parts = ()
            self.applied.append(write)
        db.execute("RELEASE one_write")
        for part in parts:
            self._apply_one(db, part)

    def _refuse(self, write: Write, error: Exception) -> None:
        logger.error("the store refused a %s: %s", type(write).__name__, name_of(error))
        self.refused += 1
        write.refused(error)

    def settle(self, db: Db) -> None:
        """The batch is durable: find out what became of each write."""
        for kind, writes in self._kinds if self.applied is self.writes else _by_kind(self.applied):
            kind.settle_all(db, self._now_ms, writes)

    def _lock(self, db: Db) -> None:
        accounts: set[str] = set()
        for kind, writes in self._kinds:
            accounts |= kind.prepare_all(db, self._now_ms, writes)
        if accounts:
            db.lock_accounts(accounts)


def _by_kind(batch: list[Write]) -> list[tuple[type[Write], list[Write]]]:
    """In the order of their ranks; those of one kind in the order in which they came."""
    kinds: dict[type[Write], list[Write]] = {}
    for write in batch:
        kinds.setdefault(type(write), []).append(write)
    return sorted(kinds.items(), key=lambda kind: (kind[0].rank, kind[0].__name__))
