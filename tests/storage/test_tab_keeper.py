"""A gateway's tabs, in memory and in the store: exact whatever happens, and given back in time."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from embedmesh.rules.errors import InsufficientQuota, StoreUnavailable
from embedmesh.rules.holds import Claim, Hold
from embedmesh.rules.spending import TAB_S, UNUSED_S
from embedmesh.rules.tabs import Tab
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.ledger import tab_keeper
from embedmesh.storage.ledger.open_tab import OpenTab
from embedmesh.storage.ledger.tab_keeper import OpenedTab
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge

COST = 100
MUCH = 64 * 1_000 * COST  # a tab may have a thousand requests of it
ORDINARY_MS = 55_000
SOON_S = 5.0


@asynccontextmanager
async def running(shop: Shop) -> AsyncIterator[Store]:
    """A store with what runs beside it in a gateway."""
    store = await shop.open(lock_wait_s=5)
    tasks = [asyncio.ensure_future(each) for each in store.background()]
    try:
        await asyncio.sleep(0)
        yield store
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.close()


@pytest.fixture
async def live(shop: Shop) -> AsyncIterator[Store]:
    async with running(shop) as store:
        yield store


@pytest.fixture
async def lives(shop: Shop) -> AsyncIterator[list[Store]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(running(shop)) for _ in range(3)]


def new_key(shop: Shop, limits: Limits | None = None, *, parent_id: str | None = None) -> str:
    key, _ = shop.books.keys.create("a", ["embeddings"], limits=limits or Limits(), parent_id=parent_id)
    return key.key_id


def hold_of(shop: Shop, key_id: str | None, amount: int = COST, lasts_ms: int = ORDINARY_MS) -> Hold:
    return Hold(shop.new_hold(0).hold_id, "a", amount, shop.clock.now_ms + lasts_ms, key_id)


async def set_aside(shop: Shop, store: Store, key_id: str | None, amount: int = COST) -> Hold:
    """As the flow does it."""
    hold = hold_of(shop, key_id, amount)
    if (spent := store.spend(hold)) is not None:
        return spent
    await store.hold(hold)
    return hold


async def until(is_so: Callable[[], object], seconds: float = SOON_S) -> None:
    ends = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < ends
        await asyncio.sleep(0.005)


async def tab_of(shop: Shop, store: Store, key_id: str) -> OpenedTab:
    """The tab that two exact holds, which are released, have led to."""
    for _ in range(2):
        hold = hold_of(shop, key_id)
        await store.hold(hold)
        store.release(hold)
    await until(lambda: key_id in store.tabs._open)
    await store.drain()
    return store.tabs._open[key_id]


def rows(shop: Shop, ask: str) -> list[tuple[object, ...]]:
    with shop.by_hand() as db:
        return [tuple(row) for row in db.execute(ask).fetchall()]


async def test_a_key_with_two_requests_gets_a_tab_and_spends_it(shop: Shop, live: Store) -> None:
    """What is captured is charged as for a hold; what is not spent goes back when the tab closes."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    assert live.spend(hold_of(shop, key_id)) is None
    tab = await tab_of(shop, live, key_id)
    assert shop.money() == (MUCH, tab.amount)
    holds = [await set_aside(shop, live, key_id) for _ in range(10)]
    assert {hold.tab_id for hold in holds} == {tab.tab_id}
    assert tab.left == tab.amount - 10 * COST
    for hold in holds[:6]:
        live.capture(hold, charge(90, payable=30, key_id=key_id))
    live.release(holds[6])
    assert tab.left == tab.amount - 6 * 90 - 3 * COST
    await live.drain()
    assert shop.money() == (MUCH - 540, tab.amount - 540)
    for hold in holds[7:]:
        live.release(hold)
    live.tabs.close_these({tab.tab_id})
    assert live.spend(hold_of(shop, key_id)) is None
    await live.drain()
    assert shop.money() == (MUCH - 540, 0)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 180
    assert live.stats.captured == 6
    shop.assert_right()


async def test_a_capture_is_durable_soon_after_the_delivery(shop: Shop, live: Store) -> None:
    """Nobody has to ask for it: at most ten milliseconds later it is given to the writer."""
    assert tab_keeper.FLUSH_S <= 0.01
    shop.credit(MUCH)
    key_id = new_key(shop)
    await tab_of(shop, live, key_id)
    live.capture(await set_aside(shop, live, key_id), charge(70, key_id=key_id))
    await until(lambda: shop.money()[0] == MUCH - 70)


async def test_nothing_is_spent_that_a_tab_does_not_have(shop: Shop, live: Store) -> None:
    """Its amount is the most that is captured and in flight at every moment, to the last nano-USD."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    live.tabs._quiet[key_id] = time.monotonic() + 60  # no other tab
    assert live.spend(hold_of(shop, key_id, tab.amount + 1)) is None
    one = live.spend(hold_of(shop, key_id, tab.amount - 5))
    assert one is not None
    assert live.spend(hold_of(shop, key_id, 6)) is None
    rest = live.spend(hold_of(shop, key_id, 5))
    assert rest is not None
    assert live.spend(hold_of(shop, key_id, 1)) is None
    live.capture(one, charge(tab.amount - 5, key_id=key_id))
    assert live.spend(hold_of(shop, key_id, 1)) is None
    live.release(rest)
    assert tab.left == 5
    live.capture(one, charge(1, key_id=key_id))  # a second end: nothing
    live.release(one)
    live.release(rest)
    assert tab.left == 5
    await live.drain()
    assert shop.money() == (MUCH - tab.amount + 5, 5)


async def test_a_charge_of_more_than_was_set_aside_is_charged_to_nobody(shop: Shop, live: Store) -> None:
    """As for a hold of its own: the store would refuse it. It is a bug of ours, and counted."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    live.capture(await set_aside(shop, live, key_id), charge(COST + 1, key_id=key_id))
    assert tab.left == tab.amount
    assert not tab.flight
    await live.drain()
    assert live.stats.broken_writes == 1
    assert shop.money() == (MUCH, tab.amount)


async def test_a_charge_that_the_store_refuses_takes_no_other_with_it(shop: Shop, live: Store) -> None:
    """Those that were delivered together are settled together; what is wrong with one of them is found, and counted."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    for payable in (30, 71, 0):  # a node does not get more than its request cost
        live.capture(await set_aside(shop, live, key_id), charge(70, payable=payable, key_id=key_id))
    await live.drain()
    assert (live.stats.captured, live.stats.captured_under_tabs, live.stats.broken_writes) == (2, 2, 1)
    assert shop.money() == (MUCH - 140, tab.amount - 140)
    shop.assert_right()


async def test_more_than_a_batch_may_be_delivered_at_one_time(shop: Shop, live: Store) -> None:
    """It is settled in several: the event loop is not kept for long."""
    shop.credit(1_000 * MUCH)
    key_id = new_key(shop)
    await tab_of(shop, live, key_id)
    holds = [await set_aside(shop, live, key_id, 1) for _ in range(400)]
    await live.drain()
    commits = live.stats.commits
    for hold in holds:
        live.capture(hold, charge(1, key_id=key_id))
    await live.drain()
    assert live.stats.captured == 400
    assert live.stats.commits >= commits + 3
    assert shop.money()[0] == 1_000 * MUCH - 400


async def test_requests_and_ends_in_any_order_leave_a_tab_exact(shop: Shop, live: Store) -> None:
    """Random spends, captures and releases over many tabs of three keys, against a model that only counts."""
    shop.credit(100 * MUCH)
    dice, keys = random.Random(5), [new_key(shop) for _ in range(3)]
    flying: list[Hold] = []
    charged = 0
    for _ in range(3_000):
        act = dice.random()
        if act < 0.5 or not flying:
            flying.append(await set_aside(shop, live, dice.choice(keys), 1 + int(dice.random() * COST)))
        else:
            hold = flying.pop(int(dice.random() * len(flying)))
            if act < 0.85:
                cost = int(dice.random() * (hold.amount_nanousd + 1))
                live.capture(hold, charge(cost, key_id=hold.key_id or ""))
                charged += cost
            else:
                live.release(hold)
        for tab in live.tabs._tabs.values():
            assert 0 <= tab.left <= tab.amount
            assert sum(tab.flight.values()) <= tab.amount - tab.left
        if dice.random() < 0.01:
            live.tabs.close_these({dice.choice([*live.tabs._tabs, ""])})
        if dice.random() < 0.02:
            await asyncio.sleep(0.002)
    for hold in flying:
        live.release(hold)
    await until(lambda: not live.tabs._opening)
    live.tabs.close_these(set(live.tabs._tabs))
    await live.drain()
    assert shop.money() == (100 * MUCH - charged, 0)
    assert live.stats.tabs_opened > 5
    assert live.stats.broken_writes == live.stats.late_captures == 0
    shop.assert_right()


@pytest.mark.parametrize("why", ["no key", "too long", "another key"])
async def test_who_has_no_tab(shop: Shop, live: Store, why: str) -> None:
    """Then an exact hold decides."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    hold = {
        "no key": hold_of(shop, None),
        "too long": hold_of(shop, key_id, lasts_ms=tab.deadline_ms - shop.clock.now_ms + 1),
        "another key": hold_of(shop, new_key(shop)),
    }[why]
    assert live.spend(hold) is None


async def test_a_key_that_seldom_sends_has_no_tab(shop: Shop, live: Store) -> None:
    """Nor one whose requests take long, nor one for whose account a tab would be too large a part of the money."""
    shop.credit(MUCH)
    seldom, slow, poor = new_key(shop), new_key(shop), new_key(shop, Limits(budget_day=64 * 3 * COST))
    await set_aside(shop, live, seldom)
    for _ in range(4):
        await live.hold(hold_of(shop, slow, lasts_ms=120_000))
        await set_aside(shop, live, poor)
    await live.drain()
    assert live.stats.tabs_opened == 0
    assert not live.tabs._tabs


async def test_a_request_with_an_idempotency_key_has_a_hold_of_its_own(shop: Shop, live: Store) -> None:
    """And says nothing of how much a key spends."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    for number in range(3):
        assert await live.hold(hold_of(shop, key_id), Claim(bytes([number] * 32), bytes(32))) is None
    assert key_id not in live.tabs._spending


async def test_a_tab_that_is_nearly_spent_is_followed_by_a_larger_one(shop: Shop, live: Store) -> None:
    """It grows with what its key spends, and the next is there before it is empty."""
    shop.credit(100 * MUCH)
    key_id = new_key(shop)
    first = await tab_of(shop, live, key_id)
    spent, exact = 0, 0
    while live.tabs._open[key_id] is first:
        hold = await set_aside(shop, live, key_id)
        spent += 1
        exact += hold.tab_id is None
        live.capture(hold, charge(COST, key_id=key_id))
        await asyncio.sleep(0.0005)
    second = live.tabs._open[key_id]
    assert second.amount > first.amount
    assert exact < spent / 2
    await live.drain()
    await live.drain()
    assert rows(shop, f"SELECT state FROM tabs WHERE tab_id = '{first.tab_id}'") == [("closed",)]
    shop.assert_right()


async def test_a_quiet_key_s_tab_is_closed(shop: Shop, live: Store) -> None:
    """Its time is over: nothing is spent from it, and all of it goes back; one in flight is waited for."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    flying = await set_aside(shop, live, key_id)
    shop.clock.skipped_s += TAB_S
    await until(lambda: key_id not in live.tabs._open)
    assert live.spend(hold_of(shop, key_id)) is None
    await live.drain()
    assert shop.money() == (MUCH, tab.amount)
    live.capture(flying, charge(COST, key_id=key_id))
    await until(lambda: shop.money() == (MUCH - COST, 0))
    assert not live.tabs._tabs
    shop.assert_right()


async def test_a_tab_that_nobody_uses_gives_its_money_back_early(shop: Shop, live: Store) -> None:
    """One that is used stays; so does one whose request takes long."""
    shop.credit(MUCH)
    unused, used, slow = (new_key(shop) for _ in range(3))
    tabs = {key_id: await tab_of(shop, live, key_id) for key_id in (unused, used, slow)}
    flying = await set_aside(shop, live, slow)
    for _ in range(4):
        await set_aside(shop, live, used)
        shop.clock.skipped_s += UNUSED_S / 2
        await asyncio.sleep(3 * tab_keeper.TABS_LOOK_S)
    assert list(live.tabs._open.items()) == [(used, tabs[used]), (slow, tabs[slow])]
    live.release(flying)
    shop.clock.skipped_s += UNUSED_S / 2
    await asyncio.sleep(3 * tab_keeper.TABS_LOOK_S)
    assert slow in live.tabs._open
    await live.drain()
    assert shop.money()[1] == tabs[used].amount + tabs[slow].amount


async def test_what_is_quiet_or_lost_is_forgotten(shop: Shop, live: Store) -> None:
    """What keys have spent, once they are quiet; a tab with something in flight, once the store has ended it."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    await set_aside(shop, live, key_id)
    live.tabs.close_these({tab.tab_id})
    await set_aside(shop, live, new_key(shop))
    assert len(live.tabs._spending) == 2
    shop.clock.skipped_s += TAB_S + 1
    await until(lambda: not live.tabs._spending)
    assert tab.tab_id in live.tabs._tabs
    shop.clock.now_ms = tab.deadline_ms + tab_keeper.FORGET_MS + 1
    await until(lambda: not live.tabs._tabs)


async def test_a_request_that_is_too_large_for_a_tab_leaves_it_open(shop: Shop, live: Store) -> None:
    """It has an exact hold; the tab is there for those that it covers."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    for _ in range(3):
        await set_aside(shop, live, key_id, tab.amount + 1)
    assert not live.tabs._opening
    assert live.tabs._open[key_id] is tab


async def test_a_tab_closes_when_the_last_request_under_it_has_ended(shop: Shop, live: Store) -> None:
    """Also where that was not delivered, and nothing else happens."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, live, key_id)
    flying = await set_aside(shop, live, key_id)
    live.tabs.close_these({tab.tab_id})
    await live.drain()
    assert shop.money() == (MUCH, tab.amount)
    live.release(flying)
    await until(lambda: shop.money() == (MUCH, 0))


async def test_a_tab_of_which_nobody_knows_whether_it_was_opened_is_closed(
    shop: Shop, live: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store has it, and its gateway was told that it could not be written, as when a connection is lost."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    monkeypatch.setattr(OpenTab, "committed", lambda write, stats: write.failed("nobody knows"))
    for _ in range(2):
        await set_aside(shop, live, key_id)
    await until(lambda: rows(shop, "SELECT state FROM tabs") == [("closed",)])
    assert shop.money() == (MUCH, 2 * COST)
    assert key_id not in live.tabs._open


async def test_a_key_without_money_for_a_tab_does_not_ask_for_one_each_time(
    shop: Shop, live: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has exact holds, and asks again after a second."""
    shop.credit(100 * COST)
    key_id, asked = new_key(shop), []

    def ask(tab: Tab, owner: str, wanted: int, least: int) -> OpenTab:
        asked.append(tab)
        return OpenTab(tab, owner, wanted, least)

    monkeypatch.setattr(tab_keeper, "OpenTab", ask)
    for _ in range(20):
        live.release(await set_aside(shop, live, key_id))
        await live.drain()
    assert len(asked) == 1
    live._clock.skipped_s += tab_keeper.REFUSED_S  # type: ignore[attr-defined]
    await set_aside(shop, live, key_id)
    assert len(asked) == 2


async def test_nothing_is_spent_while_the_store_cannot_be_written(file_shop: Shop) -> None:
    """From the moment at which a batch fails; and again once one has succeeded. What was delivered is kept."""
    shop = file_shop
    shop.credit(MUCH)
    key_id = new_key(shop)
    async with running(shop) as store:
        await tab_of(shop, store, key_id)
        flying = await set_aside(shop, store, key_id)
        with shop.by_hand() as other:
            other.begin()  # another program keeps the lock for longer than we wait
            with pytest.raises(StoreUnavailable):
                await store.hold(hold_of(shop, None))
            assert not store.healthy()
            assert store.spend(hold_of(shop, key_id)) is None
            store.capture(flying, charge(COST, key_id=key_id))
            other.rollback()
        await until(store.healthy)
        await until(lambda: shop.money()[0] == MUCH - COST)
        assert store.spend(hold_of(shop, key_id)) is not None


async def test_a_store_that_does_not_answer_is_noticed(shop: Shop, live: Store) -> None:
    """Within a tick of the time after which a batch counts as stuck."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    await tab_of(shop, live, key_id)
    live._writer._began_s = live._clock.monotonic() - 2.0
    await asyncio.sleep(3 * tab_keeper.TABS_LOOK_S)
    assert live.spend(hold_of(shop, key_id)) is None
    live._writer._began_s = None
    await asyncio.sleep(3 * tab_keeper.TABS_LOOK_S)
    assert live.spend(hold_of(shop, key_id)) is not None


async def test_a_gateway_that_stops_closes_its_tabs(shop: Shop) -> None:
    """Also one that is being opened at that moment."""
    shop.credit(MUCH)
    keys = [new_key(shop) for _ in range(3)]
    async with running(shop) as store:
        for key_id in keys[:2]:
            await tab_of(shop, store, key_id)
        store.capture(await set_aside(shop, store, keys[0]), charge(COST, key_id=keys[0]))
        for _ in range(2):
            await set_aside(shop, store, keys[2])
        assert keys[2] in store.tabs._opening
    assert shop.money()[0] == MUCH - COST
    assert rows(shop, "SELECT DISTINCT state FROM tabs") == [("closed",)]


@pytest.mark.parametrize("at", ["here", "elsewhere"])
async def test_a_hold_that_needs_what_tabs_have_gets_it(shop: Shop, lives: list[Store], at: str) -> None:
    """They are recalled, at whatever gateway they are; and their keys get no new ones for a while."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    tab = await tab_of(shop, lives[0], key_id)
    all_of_it = hold_of(shop, None, MUCH)
    began = time.monotonic()
    await lives[0 if at == "here" else 1].hold(all_of_it)
    assert time.monotonic() - began < 1.5
    assert shop.money() == (MUCH, MUCH)
    assert rows(shop, "SELECT state, captured FROM tabs") == [("closed", 0)]
    assert lives[0].stats.tabs_recalled == 1
    assert lives[0].spend(hold_of(shop, key_id)) is None
    lives[1].release(all_of_it)
    await lives[1].drain()
    for _ in range(3):
        await set_aside(shop, lives[0], key_id)
    await lives[0].drain()
    assert not lives[0].tabs._tabs
    assert tab.left == tab.amount


async def test_a_tab_that_is_recalled_while_it_is_opened_is_not_spent(shop: Shop, live: Store) -> None:
    """The store has it already, and its gateway has not heard of that yet."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    for _ in range(2):
        await set_aside(shop, live, key_id)
    live.tabs.close_recalled({live.tabs._opening[key_id].tab.tab_id}, 2.0)
    await until(lambda: rows(shop, "SELECT state FROM tabs") == [("closed",)])
    assert key_id not in live.tabs._open


async def test_what_is_in_flight_is_waited_for(shop: Shop, lives: list[Store]) -> None:
    """A hold that would fit without it is placed as soon as it has ended; else it is refused within two seconds."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    await tab_of(shop, lives[0], key_id)
    first, second = [await set_aside(shop, lives[0], key_id) for _ in range(2)]
    waiting = asyncio.ensure_future(lives[1].hold(hold_of(shop, None, MUCH - COST)))
    await until(lambda: key_id not in lives[0].tabs._open)
    lives[0].capture(first, charge(COST, key_id=key_id))
    assert not waiting.done()
    lives[0].release(second)
    assert await waiting is None
    assert shop.money() == (MUCH - COST, MUCH - COST)


async def test_who_has_no_money_is_refused_at_once_where_no_tab_is_open(shop: Shop, live: Store) -> None:
    """And within two seconds where one is, and stays so."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    began = time.monotonic()
    with pytest.raises(InsufficientQuota):
        await live.hold(hold_of(shop, None, MUCH + 1))
    assert time.monotonic() - began < 0.5
    await tab_of(shop, live, key_id)
    await set_aside(shop, live, key_id)
    began = time.monotonic()
    with pytest.raises(InsufficientQuota):
        await live.hold(hold_of(shop, None, MUCH + 1))
    assert time.monotonic() - began < 2.0
    assert live.stats.holds_refused == 2


async def test_a_budget_is_exact_with_tabs(shop: Shop, live: Store) -> None:
    """Of a key, and of the one that made it: what a tab has left of it is recalled before a request is refused."""
    shop.credit(MUCH)
    budget = 64 * 10 * COST
    parent = new_key(shop, Limits(budget_day=budget))
    key_id = new_key(shop, Limits(budget_day=budget), parent_id=parent)
    served = 0
    with pytest.raises(InsufficientQuota, match="budget"):
        while True:
            live.capture(await set_aside(shop, live, key_id), charge(COST, key_id=key_id))
            served += 1
    assert live.stats.tabs_opened > 0
    assert served == budget // COST
    other = new_key(shop)
    await tab_of(shop, live, other)
    with pytest.raises(InsufficientQuota, match="budget"):
        await live.hold(hold_of(shop, key_id))
    assert other in live.tabs._open  # it has no part of that budget


async def test_tabs_of_keys_with_limits_close_when_keys_change(shop: Shop, live: Store) -> None:
    """A budget may be smaller now, and a revoked key spends nothing; others are not disturbed."""
    shop.credit(MUCH)
    changed, revoked, limited = new_key(shop), new_key(shop), new_key(shop, Limits(budget_month=MUCH))
    plain = new_key(shop)
    for key_id in (changed, revoked, limited, plain):
        await tab_of(shop, live, key_id)
    shop.books.keys.change(changed, limits=Limits(budget_day=5 * COST))
    shop.books.keys.revoke(revoked)
    await until(lambda: set(live.tabs._open) == {plain})
    served = 0
    with pytest.raises(InsufficientQuota, match="budget"):
        while True:
            live.capture(await set_aside(shop, live, changed), charge(COST, key_id=changed))
            served += 1
    assert served == 5


async def test_a_change_of_keys_is_not_forgotten_while_the_store_is_away(
    shop: Shop, live: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for again until the store answers."""
    shop.credit(MUCH)
    key_id = new_key(shop, Limits(budget_day=MUCH))
    await tab_of(shop, live, key_id)
    own_tabs, away = live._recalls._own_tabs, [True, True]

    async def answers_late(which: str) -> Collection[str]:
        if away:
            away.pop()
            raise StoreUnavailable("away")
        return await own_tabs(which)

    monkeypatch.setattr(live._recalls, "_own_tabs", answers_late)
    live._recalls.keys_changed()
    await until(lambda: key_id not in live.tabs._open)


async def test_what_tabs_have_left_counts_as_available(shop: Shop, live: Store) -> None:
    """Who asks before it parses a large body is not refused for money that can be recalled."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    await tab_of(shop, live, key_id)
    live.capture(await set_aside(shop, live, key_id), charge(COST, key_id=key_id))
    await live.drain()
    assert await live.available_nanousd("a", key_id) == MUCH - COST


@pytest.mark.parametrize("money_for", [10, 100, 1_000])
async def test_exactly_as_many_are_served_as_there_is_money_for(shop: Shop, lives: list[Store], money_for: int) -> None:
    """Over three gateways, with spenders that ask until they are refused; some are not delivered, and ask again."""
    dice = random.Random(money_for)
    key_id = new_key(shop)
    shop.credit(money_for * COST)
    served = 0

    async def spender(store: Store) -> None:
        nonlocal served
        while True:
            try:
                hold = await set_aside(shop, store, key_id)
            except InsufficientQuota:
                return
            except StoreUnavailable:  # a server that is starved of CPU takes seconds: money is not the matter
                continue
            await asyncio.sleep(dice.random() * 0.005)
            if dice.random() < 0.1:
                store.release(hold)
            else:
                store.capture(hold, charge(COST, key_id=key_id))
                served += 1

    await asyncio.gather(*(spender(lives[number % 3]) for number in range(24)))
    await asyncio.gather(*(store.drain() for store in lives))
    assert served == money_for
    assert shop.money() == (0, 0)
    if money_for == 1_000:
        assert sum(store.stats.tabs_opened for store in lives) > 0
    shop.assert_right()


async def test_what_a_gateway_has_in_tabs_when_it_dies_goes_back(shop: Shop) -> None:
    """Only what was in flight or not written yet is not charged; the others' tabs are not touched."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    async with running(shop) as other:
        kept = await tab_of(shop, other, key_id)
        dying = await shop.open(lock_wait_s=5)
        watching = asyncio.ensure_future(dying.tabs.watch())
        await asyncio.sleep(0)
        await tab_of(shop, dying, key_id)
        durable, lost, _ = [await set_aside(shop, dying, key_id) for _ in range(3)]
        dying.capture(durable, charge(COST, key_id=key_id))
        await dying.drain()
        dying.capture(lost, charge(COST, key_id=key_id))
        watching.cancel()
        await dying._writer.close()  # as if it were killed: nothing is written any more
        dying._opened.close(clean=False)
        heir = await shop.open(lock_wait_s=5)
        assert heir.stats.tabs_recovered == 1
        assert shop.money() == (MUCH - COST, kept.amount)
        await heir.close()
        assert other.spend(hold_of(shop, key_id)) is not None
    shop.assert_right()


async def test_a_tab_whose_gateway_is_silent_expires(shop: Shop) -> None:
    """By any other, after its deadline; what its gateway captures then is late, and charged to nobody."""
    shop.credit(MUCH)
    key_id = new_key(shop)
    async with running(shop) as silent, running(shop) as other:
        tab = await tab_of(shop, silent, key_id)
        flying = await set_aside(shop, silent, key_id)
        shop.clock.now_ms = tab.deadline_ms + 1
        assert await other.expire(shop.clock.now_ms) == 1
        assert shop.money() == (MUCH, 0)
        assert silent.spend(hold_of(shop, key_id)) is None
        silent.capture(flying, charge(COST, key_id=key_id))
        await silent.drain()
        assert silent.stats.late_captures == 1
        assert shop.money() == (MUCH, 0)
    shop.assert_right()


async def test_keys_and_tabs_in_memory_have_a_bound(shop: Shop, live: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quietest key is forgotten first; who finds no place has exact holds."""
    shop.credit(MUCH)
    monkeypatch.setattr(tab_keeper, "KEYS_MAX", 3)
    monkeypatch.setattr(tab_keeper, "TABS_MAX", 2)
    keys = [new_key(shop) for _ in range(5)]
    for key_id in keys:
        await set_aside(shop, live, key_id)
    assert list(live.tabs._spending) == keys[2:]
    for key_id in keys[:2]:
        await tab_of(shop, live, key_id)
    for _ in range(3):
        await set_aside(shop, live, keys[4])
    await live.drain()
    assert keys[4] not in live.tabs._open
