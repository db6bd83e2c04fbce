"""Refusals of what could not be opened: none leaves before the others, whatever was wrong."""

import asyncio
import math
from collections.abc import Awaitable, Callable

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Clock

REFUSAL_S = 0.05  # opening and counting the largest request take less; one that took more leaves at the next multiple
REFUSALS_WAITING_MAX = 1_024  # at one time, about 2 kB each: 20,000 a second, more than a node reads


class Refusals:
    """Those that wait for their time."""

    def __init__(self, clock: Clock, sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:
        self._clock = clock
        self._sleep = sleep
        self._waiting = 0

    def check_room(self) -> None:
        """Raises Overloaded where as many wait as may."""
        if self._waiting >= REFUSALS_WAITING_MAX:
            raise Overloaded("This node is refusing as many requests as it may at one time.")

    async def wait(self, arrived: float) -> None:
        """Until the refusal of a call may leave that came then, on the monotonic clock."""
        self._waiting += 1
        try:
            took_s = self._clock.monotonic() - arrived
            await self._sleep(REFUSAL_S * (math.floor(took_s / REFUSAL_S) + 1) - took_s)
        finally:
            self._waiting -= 1
