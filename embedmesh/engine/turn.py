"""One batch at a time: a lock that can be taken without a coroutine, by who finds it free."""

import asyncio
from collections import deque


class Turn:
    """Held by one at a time, by `take` and `give_back` or by `async with`; those who wait get it as they came."""

    def __init__(self) -> None:
        self.taken: bool = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    def take(self) -> bool:
        """Take it if it is free."""
        if self.taken:
            return False
        self.taken = True
        return True

    def give_back(self) -> None:
        """Hand it to who has waited longest."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)  # it stays taken
                return
        self.taken = False

    async def __aenter__(self) -> None:
        if self.take():
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():  # it was handed to us, and we go
                self.give_back()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.give_back()
