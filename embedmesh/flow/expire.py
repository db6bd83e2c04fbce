"""What happens to holds whose request is lost: released once their deadline has passed."""

import asyncio
import logging
from typing import Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock

log = logging.getLogger("embedmesh.flow")

SWEEP_EVERY_S = 5.0  # a hold is never older than its deadline by more than this and a commit


class Expiring(Protocol):
    """What the sweep needs of the ledger."""

    async def expire(self, now_ms: int) -> int:
        """Release every open hold whose deadline is before `now_ms`; how many. Raises StoreUnavailable."""
        ...


async def expire(ledger: Expiring, clock: Clock) -> None:
    """Sweep for ever; cancel it."""
    while True:
        try:
            released = await ledger.expire(clock.unix_ms())
        except StoreUnavailable:
            released = 0  # the next sweep tries again; the store itself says when it is well
        if released:
            log.warning("released %d holds past their deadline", released)
        await asyncio.sleep(SWEEP_EVERY_S)
