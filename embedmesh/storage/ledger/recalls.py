"""Before a request is refused for want of money, the tabs of its account are closed, here and at other gateways.

What a tab has left cannot be had elsewhere. So a hold that found too little while tabs of its account are open has them
recalled, waits until some are closed, and tries again; it is refused only when none is open, or its time is over. All
holds of an account share one recall, so that a caller without money makes no more work than that.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.ports import Clock
from embedmesh.storage.ledger.room import Recall
from embedmesh.storage.ledger.tab_keeper import TabKeeper

QUIET_S = 2.0  # a key whose tab was recalled gets no new one: longer than a hold waits
FIRST_PAUSE_S, PAUSE_S_MAX = 0.005, 0.05  # between two looks at what is open; it doubles
EACH_PAUSE_S = 0.005  # the least pause for each recall of an account: together they look two hundred times a second
SOME_S = 0.2  # for the last tabs is waited so long, where others have been closed


class Recalls:
    """The recalls that holds of one gateway wait for, and those that others ask of it. Run `hear` all the time."""

    def __init__(
        self,
        recall: Callable[[Recall], Awaitable[int]],
        own_tabs: Callable[[str], Awaitable[Collection[str]]],
        keeper: TabKeeper,
        clock: Clock,
    ) -> None:
        """`recall` asks for tabs in the store, and returns how many have not ended; `own_tabs` finds some of ours, by
        the name of a statement. Both raise StoreUnavailable."""
        self._recall = recall
        self._own_tabs = own_tabs
        self._keeper = keeper
        self._clock = clock
        self._heard = asyncio.Event()
        self._keys_changed = False
        self._running: dict[Recall, asyncio.Task[None]] = {}

    async def wait(self, what: Recall, until_s: float) -> bool:
        """Wait until a hold may find more than before. False: `until_s` on the monotonic clock came first."""
        running = self._running.get(what)
        if running is None:
            running = asyncio.get_running_loop().create_task(self._run(what, until_s), name="recall of tabs")
            self._running[what] = running
            running.add_done_callback(lambda _: self._running.pop(what, None))
        await asyncio.wait([running], timeout=max(until_s - self._clock.monotonic(), 0.0))
        return self._clock.monotonic() < until_s

    def tabs_changed(self) -> None:
        """Somebody asks for tabs, or some that were asked for have ended."""
        self._heard.set()

    def keys_changed(self) -> None:
        """Keys may have been revoked, or have other limits."""
        self._keys_changed = True
        self._heard.set()

    async def hear(self) -> None:
        """Close tabs that are asked for, and those of keys with limits when keys have changed. For ever; cancel it."""
        while True:
            await self._heard.wait()
            self._heard.clear()
            keys_changed, self._keys_changed = self._keys_changed, False
            try:
                await self._close_recalled()
                if keys_changed:
                    self._keeper.close_these(frozenset(await self._own_tabs("tabs_with_budgets")))
            except StoreUnavailable:
                self._keys_changed |= keys_changed
                self._heard.set()
                await asyncio.sleep(PAUSE_S_MAX)

    async def end(self) -> None:
        """Nobody waits any more."""
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    async def _run(self, what: Recall, until_s: float) -> None:
        began_s, pause_s, first = self._clock.monotonic(), FIRST_PAUSE_S, None
        try:
            while (now_s := self._clock.monotonic()) < until_s:
                live = await self._recall(what)
                first = live if first is None else first
                if not live or (live < first and now_s > began_s + SOME_S):
                    return
                await self._close_recalled()
                of_account = sum(each.account_id == what.account_id for each in self._running)
                await asyncio.sleep(max(pause_s, of_account * EACH_PAUSE_S))
                pause_s = min(2 * pause_s, PAUSE_S_MAX)
        except StoreUnavailable:
            return  # the hold says so

    async def _close_recalled(self) -> None:
        if tab_ids := await self._own_tabs("recalled_tabs"):
            self._keeper.close_recalled(frozenset(tab_ids), QUIET_S)
