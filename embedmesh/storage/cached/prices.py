"""What tokens, images and searches cost: the store's prices by model, meter and account, else the catalogue's."""

import asyncio
from contextlib import suppress

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.holds import NOT_TOKENS, Meter
from embedmesh.rules.meters import SEARCHES, images_of
from embedmesh.rules.models import Model
from embedmesh.rules.money import TOKENS_PER_PRICE_UNIT
from embedmesh.rules.ports import Clock
from embedmesh.storage.cached.changes import Changes
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import PRICES_SQL

INPUT = Meter.INPUT.value
READ_PRICES_S = 1.0  # a price that was set to begin later begins within this


class PriceList:
    """Implements the port `Prices`. Run `watch` while the gateway runs."""

    def __init__(self, reads: Reads, changes: Changes, clock: Clock) -> None:
        self._reads = reads
        self._clock = clock
        self._prices: dict[tuple[str, str | None], int] = {}  # of input
        self._metered: dict[tuple[str, str, str | None], int] = {}  # of all else
        self._changed = asyncio.Event()
        changes.on("prices", self._changed.set)

    def of(self, model: Model, account_id: str) -> int:
        """Of input, in nano-USD per million tokens. A step of every request: kept apart from the other prices."""
        prices = self._prices
        if not prices:
            return model.price
        for_all = prices.get((model.id, None), model.price)
        return prices.get((model.id, account_id), for_all)

    def meter(self, model: Model, account_id: str, meter: Meter) -> int:
        """Of input, cached input or output, in nano-USD per million tokens.

        Cached input costs what other input does where there is no price for it, and never more: what is set aside for
        input covers it, however much of it turns out to be cached.
        """
        if meter is Meter.OUTPUT:
            return self._set(model, account_id, meter.value, model.output_price)
        assert meter not in NOT_TOKENS, "`image` and `search` have other prices"
        price = self.of(model, account_id)
        if meter is Meter.INPUT:
            return price
        catalogues = price if model.cached_price is None else model.cached_price
        return min(price, self._set(model, account_id, meter.value, catalogues))

    def image(self, model: Model, account_id: str, size: str) -> int:
        """Of images of a size, in nano-USD per million: a price is written down for one. Raises KeyError."""
        return TOKENS_PER_PRICE_UNIT * self._set(model, account_id, images_of(size), model.image_prices[size])

    def search(self, model: Model, account_id: str) -> int:
        """Of searches, in nano-USD per million: a price is written down for one."""
        assert model.search_price is not None, "its tokens are paid"
        return TOKENS_PER_PRICE_UNIT * self._set(model, account_id, SEARCHES, model.search_price)

    def _set(self, model: Model, account_id: str, meter: str, catalogues: int) -> int:
        """The price that was set for the account, else for all, else the catalogue's."""
        for_all = self._metered.get((model.id, meter, None), catalogues)
        return self._metered.get((model.id, meter, account_id), for_all)

    async def look(self) -> None:
        """Read them all. Raises StoreUnavailable; then they stay as they were."""
        rows = await self._reads.ask(PRICES_SQL["current_prices"], {"now_ms": self._clock.unix_ms()})
        prices, metered = {}, {}
        for model, meter, account_id, price, _ in rows:
            if meter == INPUT:
                prices[model, account_id] = price
            else:
                metered[model, meter, account_id] = price
        self._prices, self._metered = prices, metered

    async def watch(self) -> None:
        """Read them again when they change, and every READ_PRICES_S. For ever; cancel it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(READ_PRICES_S):
                    await self._changed.wait()
            self._changed.clear()
            with suppress(StoreUnavailable):
                await self.look()
