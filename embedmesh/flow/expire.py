"""Holds whose request is lost, or never came to use their lock, are ended once their deadline has passed."""

import asyncio
import logging
from typing import Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock

log = logging.getLogger("embedmesh.flow")

SWEEP_EVERY_S = 5.0  # a hold is never older than its deadline by more than this and a commit


class Expiring(Protocol):
    """The part of the ledger that the sweep needs."""

    async def expire(self, now_ms: int) -> int:
        """End every open hold whose deadline is before `now_ms`: charged at its note if it has one, else released.

        Returns their number. Raises StoreUnavailable.
        """
        ...


async def expire(ledger: Expiring, clock: Clock) -> None:
    """Sweep until cancelled."""
    while True:
        try:
            ended = await ledger.expire(clock.unix_ms())
        except StoreUnavailable:
            ended = 0  # the next sweep tries again
        if ended:
            log.info("ended %d holds past their deadline", ended)  # locks that nobody uses are an everyday matter
        await asyncio.sleep(SWEEP_EVERY_S)
