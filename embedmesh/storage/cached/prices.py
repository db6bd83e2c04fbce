"""What tokens cost: prices of the store, by model and account; the catalogue's where it has none."""

import asyncio

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock
from embedmesh.storage.cached.changes import PRICES, Topics
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import load

CURRENT = load("prices.sql")["current_prices"]
LOOK_S = 1.0  # a price that was set to begin later does so within this


class PriceList:
    """Implements the port `Prices`. Run `watch` as long as the gateway runs."""

    def __init__(self, reads: Reads, topics: Topics, clock: Clock) -> None:
        self._reads = reads
        self._clock = clock
        self._prices: dict[tuple[str, str | None], int] = {}
        self._changed = asyncio.Event()
        topics.on(PRICES, self._changed.set)

    def of(self, model: Model, account_id: str) -> int:
        """In nano-USD per million tokens."""
        price = self._prices.get((model.id, account_id))
        if price is None:
            price = self._prices.get((model.id, None))
        return model.price if price is None else price

    async def look(self) -> None:
        """Read them all. Raises StoreUnavailable; then they stay as they were."""
        rows = await self._reads.ask(CURRENT, {"now_ms": self._clock.unix_ms()})
        self._prices = {(model, account_id): price for model, account_id, price, _ in rows}

    async def watch(self) -> None:
        """Read them anew when they change, and now and then. For ever; cancel it."""
        while True:
            try:
                async with asyncio.timeout(LOOK_S):
                    await self._changed.wait()
            except TimeoutError:
                pass
            self._changed.clear()
            try:
                await self.look()
            except StoreUnavailable:
                continue
