"""The tabs of one gateway: opened beside exact holds, spent from in memory, settled in batches, closed.

What is left of a tab is its amount, minus what was captured of it (settled or not), minus what is in flight. `spend`
takes from that, `capture` gives back what a request did not cost, `release` all of it; so what a tab owes and may owe
is never more than its amount, and the store's own conditions hold whatever happens here. Delivered requests are settled
at most FLUSH_S later. A tab that admits nothing more is closed once nothing of it is in flight: always after its last
settlement, because the writer keeps the order.

Only the event loop touches a keeper. Where it dies, what its tabs have left is given back by its next start, or by any
gateway after their deadline.
"""

import asyncio
import logging
from collections.abc import Callable, Collection
from functools import partial

from msgspec.structs import replace

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import Clock
from embedmesh.rules.spending import (
    RENEW_S,
    RENEW_SHARE,
    TAB_S,
    UNUSED_S,
    Spending,
    TabSize,
    is_ordinary,
    tab_deadline_ms,
    tab_size,
)
from embedmesh.rules.tabs import Tab
from embedmesh.storage.ledger.batch import BATCH_WRITES_MAX
from embedmesh.storage.ledger.group_commit import Writer
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab
from embedmesh.storage.ledger.settle_tab import Delivered, SettleTab
from embedmesh.storage.ledger.writes import Stats

FLUSH_S = 0.008  # a capture commits in the first batch after delivery, at most 10 ms later
TABS_LOOK_S = 0.1  # how late a store that does not answer, and a tab whose time is over, may be noticed
KEYS_MAX = 4_096  # whose spending is noted; the quietest is forgotten first
TABS_MAX = 4_096  # of one gateway, some 2 MB
REFUSED_S = 1.0  # until a key is offered a tab again, after there was no money for one
QUIET_LOOK_S = 0.5  # between two looks for quiet tabs: a millisecond for the most that there may be
FORGET_MS = 60_000  # after a tab's deadline: whatever was in flight is lost, and the store has ended the tab

logger = logging.getLogger(__name__)


class OpenedTab:
    """An open tab as its gateway has it in memory. Seconds are on the monotonic clock."""

    __slots__ = (
        "account_id", "amount", "deadline_ms", "delivered", "flight", "key_id", "left", "low", "opened_s",
        "quiet_since_s", "requests", "seen", "tab_id",
    )  # fmt: skip

    def __init__(self, tab: Tab, amount: int, now_s: float) -> None:
        self.tab_id, self.account_id, self.key_id = tab.tab_id, tab.account_id, tab.key_id
        self.deadline_ms = tab.deadline_ms  # of the tab: no hold under it may last longer
        self.amount = self.left = amount
        self.low = amount // RENEW_SHARE  # with less left the next one is opened; -1 once it was asked for
        self.flight: dict[str, int] = {}  # hold id -> amount
        self.delivered: list[Delivered] = []  # and not given to the writer yet
        self.requests = self.seen = 0  # spent from it, now and when somebody looked
        self.opened_s = self.quiet_since_s = now_s


Spendable = dict[str | None, OpenedTab]


class TabKeeper:
    """Spends, captures and releases holds that are parts of tabs. Tabs are opened only while `watch` runs."""

    def __init__(
        self,
        writer: Writer,
        clock: Clock,
        owner: str,
        stats: Stats,
        exact: Callable[[Hold, Charge, bytes | None], None],
    ) -> None:
        """`exact` captures holds that are no part of a tab."""
        self._writer = writer
        self._clock = clock
        self._owner = owner
        self._stats = stats
        self._exact = exact
        self._open: Spendable = {}  # by key id: tabs that admit requests, the oldest first
        self._spendable: Spendable = {}  # the same, or nothing while the store is not healthy
        self._tabs: dict[str, OpenedTab] = {}  # by tab id: all of them
        self._closing: dict[str, OpenedTab] = {}  # by tab id: those that admit nothing more
        self._spending: dict[str, Spending] = {}  # by key id, the one noted last at the end
        self._opening: dict[str, OpenTab] = {}  # by key id
        self._asked: list[OpenTab] = []  # of these, what the writer was not given yet
        self._quiet: dict[str, float] = {}  # keys that get no tab, and until when
        self._settling: list[OpenedTab] = []  # those with requests that the writer was not given yet
        self._flush_timer: asyncio.TimerHandle | None = None
        self._watching = False
        self._look_for_quiet_s = 0.0
        writer.on_health(self._look_at_health)

    # -- one request: on the path of all that are served

    def has_tab(self, key_id: str) -> bool:
        """Whether a request of the key may be a part of one."""
        return key_id in self._spendable

    def spend(self, hold: Hold) -> Hold | None:
        """The hold as a part of an open tab of its key, or None: then an exact hold decides."""
        tab = self._spendable.get(hold.key_id)
        if tab is None or hold.deadline_ms > tab.deadline_ms:
            return None
        left = tab.left - hold.amount_nanousd
        if left < 0:
            return None
        tab.left = left
        tab.flight[hold.hold_id] = hold.amount_nanousd
        tab.requests += 1
        if left < tab.low:
            self._renew(tab)
        return replace(hold, tab_id=tab.tab_id)

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        """End a hold by charging it. A part of a tab is given to the writer FLUSH_S later.

        The writer keeps it until it is durable. A `reply` is kept for a claim, which parts of tabs have none of.
        """
        hold_id, tab_id = hold.hold_id, hold.tab_id
        if tab_id is None:
            self._exact(hold, charge, reply)
            return
        assert reply is None, "what has a claim has a hold of its own"
        tab = self._tabs.get(tab_id)
        if tab is None:  # it has ended: the store says so, and it is counted
            self._writer.submit(SettleTab(tab_id, hold.account_id, [(hold_id, charge)]))
            return
        amount, cost = tab.flight.pop(hold_id, -1), charge.cost_nanousd
        if amount < cost:
            self._refuse(tab, hold, amount)
            return
        if amount != cost:
            tab.left += amount - cost
        if not tab.delivered:
            self._settling.append(tab)
            self._flush_soon()
        tab.delivered.append((hold_id, charge))

    def release(self, hold: Hold) -> None:
        """End a part of a tab without charging. Harmless after a capture."""
        tab = self._tabs.get(hold.tab_id or "")
        if tab is not None:
            tab.left += tab.flight.pop(hold.hold_id, 0)
            if not tab.flight and tab.tab_id in self._closing:
                self._flush_soon()

    def _refuse(self, tab: OpenedTab, hold: Hold, amount: int) -> None:
        """A charge of more than was set aside, or of what has ended: a bug of ours, for which nobody pays."""
        tab.left += max(amount, 0)
        self._stats.broken_writes += 1
        words = "hold %s of tab %s cannot be charged: it had ended, or was too small"
        logger.error(words, hold.hold_id, tab.tab_id, extra={"request_id": hold.hold_id})

    # -- opening

    def note(self, hold: Hold) -> None:
        """An exact hold was placed: if its key spends more than now and then, it gets a tab."""
        key_id, now_s = hold.key_id, self._clock.monotonic()
        if key_id is None or not self._watching or not is_ordinary(hold.deadline_ms, self._clock.unix_ms()):
            return
        spending = self._spending.pop(key_id, None) or Spending(now_s)
        while len(self._spending) >= KEYS_MAX:
            del self._spending[next(iter(self._spending))]
        self._spending[key_id] = spending
        spending.note(hold.amount_nanousd, now_s)
        tab = self._open.get(key_id)
        if tab is not None and tab.left >= tab.low > 0:
            return  # it has one; this request was no part of it for another reason
        if (size := spending.tab_size(now_s)) is not None:
            self._want(hold.account_id, key_id, size)

    def _renew(self, tab: OpenedTab) -> None:
        """A tab is nearly spent, or its time is over soon: the next is opened if the key still spends."""
        tab.low = -1
        if tab.requests > 1:
            spent = tab.amount - tab.left
            self._want(
                tab.account_id, tab.key_id, tab_size(spent, tab.requests, self._clock.monotonic() - tab.opened_s)
            )

    def _want(self, account_id: str, key_id: str, size: TabSize) -> None:
        full = len(self._tabs) + len(self._opening) >= TABS_MAX
        if full or key_id in self._opening or key_id in self._quiet or not self._watching:
            return
        tab = Tab(new_id("tab", self._clock), account_id, key_id, tab_deadline_ms(self._clock.unix_ms()))
        self._opening[key_id] = write = OpenTab(tab, self._owner, size.wanted, size.least)
        self._asked.append(write)
        write.outcome.add_done_callback(partial(self._opened, tab, self._clock.monotonic()))
        self._flush_soon()

    def _opened(self, tab: Tab, asked_s: float, outcome: "asyncio.Future[int]") -> None:
        del self._opening[tab.key_id]
        if outcome.cancelled() or outcome.exception() is not None:
            self._writer.submit(CloseTab(tab.tab_id, tab.account_id))  # nobody knows whether the store has it
            return
        now_s = self._clock.monotonic()
        if not (amount := outcome.result()):
            if (spending := self._spending.get(tab.key_id)) is not None:
                spending.not_before_s = now_s + REFUSED_S
            return
        opened = self._tabs[tab.tab_id] = OpenedTab(tab, amount, asked_s)
        if (before := self._open.pop(tab.key_id, None)) is not None:
            self._close(before)
        if self._watching and tab.key_id not in self._quiet:
            self._open[tab.key_id] = opened
        else:
            self._close(opened)

    # -- settling and closing

    def close_recalled(self, tab_ids: Collection[str], quiet_s: float) -> None:
        """A hold needs what these have left: they admit nothing more, and their keys get no new ones for a while."""
        until_s = self._clock.monotonic() + quiet_s
        ours = [(tab.tab_id, tab.key_id) for tab in self._open.values()]
        ours += [(write.tab.tab_id, key_id) for key_id, write in self._opening.items()]
        self._quiet |= {key_id: until_s for tab_id, key_id in ours if tab_id in tab_ids}
        self._stats.tabs_recalled += self.close_these(tab_ids)

    def close_these(self, tab_ids: Collection[str]) -> int:
        """Some tabs admit nothing more; how many of them did until now."""
        return self._close_all([tab for tab in self._open.values() if tab.tab_id in tab_ids])

    def flush(self) -> None:
        """Give the writer, in one batch, what was delivered, what is no longer needed, and what is to be opened."""
        if self._flush_timer is not None:
            self._flush_timer.cancel()
            self._flush_timer = None
        settling, self._settling = self._settling, []
        for tab in settling:
            delivered, tab.delivered = tab.delivered, []
            for at in range(0, len(delivered), BATCH_WRITES_MAX):
                part = delivered[at : at + BATCH_WRITES_MAX]
                self._writer.submit(SettleTab(tab.tab_id, tab.account_id, part))
        for tab in [tab for tab in self._closing.values() if not tab.flight]:
            self._forget(tab)
            self._writer.submit(CloseTab(tab.tab_id, tab.account_id))
        asked, self._asked = self._asked, []
        for opening in asked:
            try:
                self._writer.submit(opening)
            except StoreUnavailable as failure:
                opening.failed(failure.message)

    async def end(self) -> None:
        """Close everything. What is in flight yet is lost; the next start gives it back."""
        self._watching = False
        self._look_at_health()
        self.flush()
        while self._opening:
            await asyncio.wait([write.outcome for write in self._opening.values()])
            await asyncio.sleep(0)  # until `_opened` has heard of them
        self._close_all(list(self._open.values()))
        self.flush()

    def _close_all(self, tabs: list[OpenedTab]) -> int:
        for tab in tabs:
            del self._open[tab.key_id]
            self._close(tab)
        return len(tabs)

    def _close(self, tab: OpenedTab) -> None:
        self._closing[tab.tab_id] = tab
        if not tab.flight:
            self._flush_soon()

    def _forget(self, tab: OpenedTab) -> None:
        del self._closing[tab.tab_id]
        del self._tabs[tab.tab_id]

    def _flush_soon(self) -> None:
        if self._flush_timer is None:
            self._flush_timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    # -- time

    async def watch(self) -> None:
        """Look after the tabs for ever; cancel it."""
        self._watching = True
        try:
            while True:
                self._look_at_health()
                self._tick()
                await asyncio.sleep(TABS_LOOK_S)
        finally:
            self._watching = False
            self._look_at_health()

    def _look_at_health(self) -> None:
        """Nothing is spent while the store cannot be written: what a tab owes could not be settled."""
        self._spendable = self._open if self._watching and self._writer.healthy() else {}

    @staticmethod
    def _is_quiet(tab: OpenedTab, now_s: float) -> bool:
        """Whether nothing was spent from it for a while: then its money is better where it came from."""
        if tab.requests != tab.seen or tab.flight:
            tab.seen, tab.quiet_since_s = tab.requests, now_s
        return now_s - tab.quiet_since_s >= UNUSED_S

    def _tick(self) -> None:
        now_s, now_ms = self._clock.monotonic(), self._clock.unix_ms()
        if now_s >= self._look_for_quiet_s:
            self._look_for_quiet_s = now_s + QUIET_LOOK_S
            self._close_all([tab for tab in self._open.values() if self._is_quiet(tab, now_s)])
        due = []
        for tab in self._open.values():
            if now_s < tab.opened_s + RENEW_S:
                break  # those that follow were opened later
            due.append(tab)
        for tab in due:
            if now_s >= tab.opened_s + TAB_S:
                self._close_all([tab])
            elif tab.low >= 0:
                self._renew(tab)
        for tab in [tab for tab in self._closing.values() if now_ms > tab.deadline_ms + FORGET_MS]:
            self._forget(tab)
        while self._spending and now_s - next(iter(self._spending.values())).last_s > TAB_S:
            del self._spending[next(iter(self._spending))]
        for key_id in [key_id for key_id, until_s in self._quiet.items() if now_s > until_s]:
            del self._quiet[key_id]
