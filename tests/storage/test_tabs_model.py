"""A model of tabs in a few lines of Python, walked at random beside the real store: batches of writes, and crashes."""

import asyncio
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from embedmesh.rules.tabs import MOVES, SHARE_OF_MONEY, Tab, TabMove, TabState
from embedmesh.storage.books import Books
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab, RecallTabs
from embedmesh.storage.ledger.settle_tab import SettleRequest
from tests.data import quick_or
from tests.storage.shop import LASTS_MS, Shop, charge, crash_image, secret

SETTLE, CLOSE, RECALL = "settle", "close", "recall"  # in the order in which a batch applies them
WRITES = st.lists(
    st.tuples(st.sampled_from([SETTLE, SETTLE, CLOSE, RECALL]), st.integers(0, 7), st.integers(0, 60)), max_size=12
)


class OneTab:
    """What must be true of one tab."""

    def __init__(self, tab: Tab, amount: int) -> None:
        self.tab = tab
        self.amount = amount
        self.captured = 0
        self.state = TabState.OPEN

    @property
    def held(self) -> int:
        return self.amount - self.captured if self.state.live else 0

    def move(self, move: TabMove) -> bool:
        """Whether it moved."""
        after = MOVES.get((self.state, move))
        self.state = after or self.state
        return after is not None


class Tabs(RuleBasedStateMachine):
    """Any batches of settlements, ends and recalls, with sweeps, crashes and new tabs, leave what the model says."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="embedmesh-model-")
        self.shop = Shop(Path(self.folder.name))
        self.runner = asyncio.Runner()
        self.store = self.runner.run(self.shop.open())
        self.key_id = self.shop.books.keys.create("a", ["embeddings"])[0].key_id
        self.balance = 0
        self.tabs: list[OneTab] = []
        self.settled = self.late = self.refused = self.crashes = self.recovered = 0
        self.credit(6_400)
        self.open(100, 1, LASTS_MS)

    def teardown(self) -> None:
        self.runner.run(self.store.close())
        self.runner.close()
        self.shop.books.close()
        self.folder.cleanup()

    def held(self) -> int:
        return sum(tab.held for tab in self.tabs)

    @rule(amount=st.integers(1, 9_000))
    def credit(self, amount: int) -> None:
        self.shop.credit(amount)
        self.balance += amount

    @rule(wanted=st.integers(0, 150), least=st.integers(0, 20), lasts_ms=st.integers(0, LASTS_MS))
    def open(self, wanted: int, least: int, lasts_ms: int) -> None:
        self.shop.clock.now_ms += 1
        tab = Tab(f"tab_{len(self.tabs)}_{self.shop.clock.now_ms}", "a", self.key_id, self.shop.clock.now_ms + lasts_ms)

        async def opened() -> int:
            write = OpenTab(tab, "me", wanted, least)
            self.store._writer.submit(write)
            return await write.outcome

        expected = min(wanted, (self.balance - self.held()) // SHARE_OF_MONEY)
        expected = expected if expected >= max(1, least) else 0
        assert self.runner.run(opened()) == expected
        if expected:
            self.tabs.append(OneTab(tab, expected))

    @rule(writes=WRITES)
    def batch(self, writes: list[tuple[str, int, int]]) -> None:
        """All at once: they are one batch."""

        async def written() -> None:
            for kind, at, cost in writes:
                tab = self.tabs[-1 - at % len(self.tabs)].tab
                if kind == SETTLE:
                    hold = self.shop.new_hold(cost, self.key_id)
                    paid = charge(cost, payable=cost // 3, key_id=self.key_id)
                    self.store._writer.submit(SettleRequest(tab.tab_id, hold, paid))
                elif kind == CLOSE:
                    self.store._writer.submit(CloseTab(tab.tab_id, "a"))
                else:
                    self.store._writer.submit(RecallTabs("a", self.key_id if cost % 2 else None))
            await self.store.drain()

        self.runner.run(written())
        order = [SETTLE, CLOSE, RECALL]
        for kind, at, cost in sorted(writes, key=lambda write: order.index(write[0])):
            one = self.tabs[-1 - at % len(self.tabs)]
            if kind == SETTLE:
                self.settle(one, cost)
            elif kind == CLOSE:
                one.move(TabMove.CLOSE)
            else:
                for each in self.tabs:
                    each.move(TabMove.RECALL)

    def settle(self, one: OneTab, cost: int) -> None:
        if not one.state.live:
            self.late += 1
        elif cost > one.amount - one.captured:
            self.refused += 1  # by the store's own rule, alone
        else:
            one.captured += cost
            self.balance -= cost
            self.settled += 1

    @rule(pass_ms=st.sampled_from([0, 1, LASTS_MS, LASTS_MS + 1]))
    def expire(self, pass_ms: int) -> None:
        self.shop.clock.now_ms += pass_ms
        now_ms = self.shop.clock.now_ms
        self.runner.run(self.store.expire(now_ms))
        for one in self.tabs:
            if one.tab.deadline_ms < now_ms:
                one.move(TabMove.EXPIRE)

    @rule()
    def crash(self) -> None:
        """The process dies: its tabs are recovered by the next one."""
        self.crashes += 1
        image = crash_image(self.shop.path, Path(self.folder.name) / f"crash{self.crashes}")
        self.runner.run(self.store.close())
        self.shop.books.close()
        recovered = sum(one.move(TabMove.RECOVER) for one in self.tabs)
        self.shop.path = self.shop.place = image
        self.shop.folder = image.parent
        self.shop.books = Books.open(image, clock=self.shop.clock, secret=secret)
        self.store = self.runner.run(self.shop.open())
        assert self.store.stats.tabs_recovered == recovered
        self.recovered += recovered
        self.settled = self.late = self.refused = 0  # counted anew by each process

    @invariant()
    def agrees(self) -> None:
        assert self.shop.money() == (self.balance, self.held())
        stats = self.store.stats
        assert (stats.captured, stats.late_captures, stats.broken_writes) == (self.settled, self.late, self.refused)
        report = self.shop.books.check()
        assert report.broken == []
        with self.shop.by_hand() as db:
            found = db.execute("SELECT tab_id, state, captured FROM tabs").fetchall()
        assert sorted(map(tuple, found)) == sorted((t.tab.tab_id, t.state.value, t.captured) for t in self.tabs)
        lost = sum(t.amount - t.captured for t in self.tabs if t.state is TabState.RECOVERED)
        assert (report.tallies["tabs_recovered"], report.tallies["tabs_recovered_nanousd"]) == (self.recovered, lost)


TestTabs = Tabs.TestCase
TestTabs.settings = settings(
    max_examples=quick_or(200, quick=8), stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
