"""What tokens cost: the store's prices by model and account, or the catalogue's where the store has none."""

import asyncio
from contextlib import suppress

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import PRICES_SQL

READ_PRICES_S = 1.0  # a price that was set to begin later begins within this


class PriceList:
    """Implements the port `Prices`. Run `watch` while the gateway runs."""

    def __init__(self, reads: Reads, changes: Changes, clock: Clock) -> None:
        self._reads = reads
        self._clock = clock
        self._prices: dict[tuple[str, str | None], int] = {}
        self._changed = asyncio.Event()
        changes.on("prices", self._changed.set)

    def of(self, model: Model, account_id: str) -> int:
        """In nano-USD per million tokens."""
        prices = self._prices
        if not prices:
            return model.price
        for_all = prices.get((model.id, None), model.price)
        return prices.get((model.id, account_id), for_all)

    async def look(self) -> None:
        """Read them all. Raises StoreUnavailable; then they stay as they were."""
        rows = await self._reads.ask(PRICES_SQL["current_prices"], {"now_ms": self._clock.unix_ms()})
        self._prices = {(model, account_id): price for model, account_id, price, _ in rows}

    async def watch(self) -> None:
        """Read them again when they change, and every READ_PRICES_S. For ever; cancel it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_PRICES_S):
                    await self._changed.wait()
            self._changed.clear()
            with suppress(StoreUnavailable):
                await self.look()
