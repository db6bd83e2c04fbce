"""What a store needs now and then: the chain extended, old records deleted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ids import first_id
from embedmesh.rules.limits import IDEMPOTENCY_KEY_S
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.writes import WriteDurably, as_rows
from embedmesh.storage.sql import CLAIMS_SQL, FACTS_SQL, LEASES_SQL, LOCKS_SQL, RETENTION_SQL, SLOTS_SQL
from embedmesh.storage.times import MS_PER_DAY, MS_PER_MINUTE

EXTEND_EVERY_S = 5.0  # as long as a transfer may be without a block
FORGET_EVERY_S = 60.0
ROWS_A_BATCH = 256  # about two milliseconds
BATCHES_MAX = 64  # at one time: the rest waits for the next
MINUTES_KEPT = 2
UNUSED_LOCK_S = 3_600  # as long as a lock that nobody has used is told from one that never was


log = logging.getLogger("embedmesh.storage")


class Retention(msgspec.Struct, frozen=True):
    """How long records are kept. None is for ever."""

    usage_days: int | None = None
    reply_s: int = IDEMPOTENCY_KEY_S

    async def apply(self, write: WriteDurably, clock: Clock) -> int:
        """Delete what is older, a batch at a time; how many rows. Raises StoreUnavailable."""
        now_ms = clock.unix_ms()
        over = {"minute": now_ms // MS_PER_MINUTE - MINUTES_KEPT}
        await write(lambda db, _: db.execute(LEASES_SQL["forget_minutes"], over).rowcount)
        ended = {"now_ms": now_ms - MS_PER_MINUTE}  # a gateway that has only come late may still take it up
        await write(lambda db, _: db.execute(SLOTS_SQL["forget_slots"], ended).rowcount)
        unused = {"ended_ms": now_ms - UNUSED_LOCK_S * 1000, "rows_max": ROWS_A_BATCH}
        forgotten = await _batches(write, lambda db, _: _forget_unused_locks(db, unused))
        kept = {"kept_from_ms": now_ms - self.reply_s * 1000, "rows_max": ROWS_A_BATCH}
        forgotten += await _batches(write, lambda db, _: _forget_claims(db, kept))
        if self.usage_days is not None:
            day = now_ms // MS_PER_DAY - self.usage_days
            old = {"day": day, "before_id": first_id("req", day * MS_PER_DAY), "rows_max": ROWS_A_BATCH}

            def forget_usage(db: Db, _: int) -> int:
                if db.execute(RETENTION_SQL["old_usage"], old).fetchone() is None:
                    return 0
                db.execute(FACTS_SQL["set_fact"], {"name": "usage_kept_from_day", "value": str(day)})
                return db.execute(RETENTION_SQL["forget_usage"], old).rowcount

            forgotten += await _batches(write, forget_usage)
        return forgotten


async def upkeep(
    extend_chain: Callable[[], Awaitable[int]], forget: Callable[[], Awaitable[int]], clock: Clock
) -> None:
    """For ever; cancel it."""
    forgot = clock.monotonic()
    while True:
        await asyncio.sleep(EXTEND_EVERY_S)
        try:
            await extend_chain()
            if clock.monotonic() - forgot > FORGET_EVERY_S:
                forgot = clock.monotonic()
                await forget()
        except StoreUnavailable:
            log.info("the store cannot be written: its upkeep waits")


def _forget_unused_locks(db: Db, unused: dict[str, int]) -> int:
    hold_ids = db.execute(LOCKS_SQL["forget_unused_locks"], unused).fetchall()
    db.execute(LOCKS_SQL["forget_their_claims"], as_rows(hold_ids))
    return len(hold_ids)


def _forget_claims(db: Db, kept: dict[str, int]) -> int:
    db.execute(LOCKS_SQL["forget_used_locks"], kept)
    return db.execute(CLAIMS_SQL["forget_claims"], kept).rowcount


async def _batches(write: WriteDurably, delete: Callable[[Db, int], int]) -> int:
    total = 0
    for _ in range(BATCHES_MAX):
        total += (deleted := await write(delete))
        if deleted < ROWS_A_BATCH:
            break
    return total
