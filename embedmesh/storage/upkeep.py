"""What a store needs now and then: expired holds released, the chain extended, old records deleted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import msgspec

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.holds import CLAIM_S, MS_PER_DAY
from embedmesh.storage.sql import load

EXTEND_EVERY_S = 5.0  # as long as a transfer may be without a block
FORGET_EVERY_S = 60.0
ROWS_A_BATCH = 256  # about two milliseconds
BATCHES_MAX = 64  # at one time: what is left waits for the next
MINUTES_KEPT = 2

CLAIMS = load("claims.sql")
FACTS = load("facts.sql")
LIMITS = load("limits.sql")
OLD = load("retention.sql")

log = logging.getLogger("embedmesh.storage")

Written = Callable[[Callable[[Db, int], Any]], Awaitable[Any]]


class Upkept(Protocol):
    """A store."""

    async def extend_chain(self) -> int: ...
    async def forget(self) -> int: ...


class Retention(msgspec.Struct, frozen=True):
    """How long records are kept. None is for ever."""

    usage_days: int | None = None
    reply_s: int = CLAIM_S

    async def apply(self, written: Written, clock: Clock) -> int:
        """Delete what is older, a batch at a time; how many rows. Raises StoreUnavailable."""
        now_ms = clock.unix_ms()
        await written(lambda db, _: db.execute(LIMITS["forget_minutes"], {"minute": now_ms // 60_000 - MINUTES_KEPT}))
        kept = {"kept_from_ms": now_ms - self.reply_s * 1000, "rows_max": ROWS_A_BATCH}
        forgotten = await _batches(written, lambda db, _: db.execute(CLAIMS["forget_claims"], kept).rowcount)
        if self.usage_days is not None:
            day = now_ms // MS_PER_DAY - self.usage_days
            old = {"day": day, "rows_max": ROWS_A_BATCH}

            def forget_usage(db: Db, _: int) -> int:
                if db.execute(OLD["old_usage"], old).fetchone() is None:
                    return 0
                db.execute(FACTS["set_fact"], {"name": "usage_kept_from_day", "value": str(day)})
                return db.execute(OLD["forget_usage"], old).rowcount

            forgotten += await _batches(written, forget_usage)
        return forgotten


async def upkeep(store: Upkept, clock: Clock) -> None:
    """For ever; cancel it."""
    forgot = clock.monotonic()
    while True:
        await asyncio.sleep(EXTEND_EVERY_S)
        try:
            await store.extend_chain()
            if clock.monotonic() - forgot > FORGET_EVERY_S:
                forgot = clock.monotonic()
                await store.forget()
        except StoreUnavailable:
            log.info("the store is not well: its upkeep waits")


async def _batches(written: Written, delete: Callable[[Db, int], int]) -> int:
    total = 0
    for _ in range(BATCHES_MAX):
        deleted: int = await written(delete)
        total += deleted
        if deleted < ROWS_A_BATCH:
            break
    return total
