"""Tabs against the real store: opened, settled, closed, recalled, expired, recovered."""

import asyncio
import itertools
from collections.abc import Sequence

import msgspec
import pytest

from embedmesh.rules.errors import InsufficientQuota
from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.rules.tabs import MOVES, SHARE_OF_MONEY, Tab, TabMove, TabState
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.db import refusals
from embedmesh.storage.ledger.end_hold import EXPIRED_HOLDS_MAX
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab, RecallTabs, recalled_tabs
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.store import Store
from tests.storage.shop import LASTS_MS, Shop, charge, crash_image, secret
from tests.storage.test_books import without_defences

MONEY = 6_400  # a tab is at most 100 of it


def new_key(shop: Shop) -> str:
    return shop.books.keys.create("a", ["embeddings"])[0].key_id


async def open_tab(
    shop: Shop, store: Store, key_id: str, wanted: int = 100, least: int = 1, *, account_id: str = "a"
) -> tuple[Tab, int]:
    """A tab, and for how much it was opened."""
    tab = Tab(f"tab_{next(shop._numbers):06}", account_id, key_id, shop.clock.now_ms + LASTS_MS)
    write = OpenTab(tab, store._opened.instance.name, wanted, least)
    store._writer.submit(write)
    return tab, await write.outcome


def settle(shop: Shop, store: Store, tab: Tab, cost: int, payable: int = 0) -> Hold:
    """Queue a request of that cost."""
    hold = shop.new_hold(cost, tab.key_id)
    store._writer.submit(SettleRequest(tab.tab_id, hold, charge(cost, payable, key_id=tab.key_id)))
    return hold


def close(store: Store, tab: Tab) -> None:
    store._writer.submit(CloseTab(tab.tab_id, tab.account_id))


async def recall(store: Store, key_id: str | None = None) -> int:
    write = RecallTabs("a", key_id)
    store._writer.submit(write)
    return await write.outcome


def rows(shop: Shop, statement: str) -> list[tuple[object, ...]]:
    with shop.by_hand() as db:
        return [tuple(row) for row in db.execute(statement).fetchall()]


@pytest.mark.parametrize(
    ("then", "spent", "held", "state"),
    [
        ([], 0, 100, "open"),
        (["close"], 0, 0, "closed"),
        (["settle 1"], 1, 99, "open"),
        (["settle 0"], 0, 100, "open"),
        (["settle 30", "settle 70"], 100, 0, "open"),
        (["settle 30", "drain", "settle 70"], 100, 0, "open"),
        (["settle 100", "close"], 100, 0, "closed"),
        (["settle 30", "drain", "settle 71"], 30, 70, "open"),  # refused: more than the tab
        (["settle 30", "close"], 30, 0, "closed"),
        (["close", "settle 30"], 30, 0, "closed"),  # in one batch the settlement comes first
        (["close", "drain", "settle 30"], 0, 0, "closed"),
        (["settle 30", "drain", "close", "drain", "settle 30"], 30, 0, "closed"),
        (["close", "close"], 0, 0, "closed"),
        (["expire"], 0, 100, "open"),
        (["later", "expire"], 0, 0, "expired"),
        (["settle 30", "later", "expire"], 30, 0, "expired"),
        (["later", "expire", "settle 30"], 0, 0, "expired"),
        (["later", "expire", "close"], 0, 0, "expired"),
        (["later", "close", "expire"], 0, 0, "closed"),
        (["recall"], 0, 100, "closing"),
        (["recall", "recall"], 0, 100, "closing"),
        (["recall", "settle 30"], 30, 70, "closing"),
        (["recall", "settle 30", "close"], 30, 0, "closed"),
        (["recall", "later", "expire"], 0, 0, "expired"),
        (["close", "drain", "recall"], 0, 0, "closed"),
    ],
)
async def test_what_becomes_of_a_tab(
    shop: Shop, store: Store, then: list[str], spent: int, held: int, state: str
) -> None:
    """A tab of 100 ends once; what comes after that changes nothing, and what it did not capture goes back."""
    shop.credit(MONEY)
    tab, amount = await open_tab(shop, store, new_key(shop))
    assert amount == 100
    for step in then:
        match step.split():
            case ["settle", cost]:
                settle(shop, store, tab, int(cost))
            case ["close"]:
                close(store, tab)
            case ["drain"]:
                await store.drain()
            case ["recall"]:
                await recall(store)
            case ["later"]:
                shop.clock.now_ms += LASTS_MS + 1
            case ["expire"]:
                await store.expire(shop.clock.now_ms)
    assert await store.drain() == 0
    assert shop.money() == (MONEY - spent, held)
    assert rows(shop, "SELECT state, captured FROM tabs") == [(state, spent)]
    shop.assert_right()


@pytest.mark.parametrize(
    ("limits", "above", "wanted", "least", "opened"),
    [
        ({}, {}, 100, 1, 100),
        ({}, {}, 50, 50, 50),
        ({}, {}, 1_000, 1, 100),
        ({}, {}, 1_000, 100, 100),
        ({}, {}, 1_000, 101, 0),
        ({}, {}, 0, 0, 0),  # a tab of nothing is none
        ({"budget_day": 640}, {}, 1_000, 1, 10),
        ({"budget_day": 640}, {}, 1_000, 11, 0),
        ({"budget_month": 1_280}, {}, 1_000, 1, 20),
        ({"budget_day": 640, "budget_month": 320}, {}, 1_000, 1, 5),
        ({"budget_day": 63}, {}, 1_000, 1, 0),
        ({}, {"budget_day": 640}, 1_000, 1, 10),
        ({}, {"budget_month": 640}, 1_000, 1, 10),
        ({"budget_day": 320}, {"budget_month": 640}, 1_000, 1, 5),
        ({"concurrency": 3}, {"concurrency": 3}, 100, 1, 100),
    ],
)
async def test_how_much_a_tab_is_opened_for(
    shop: Shop, store: Store, limits: dict[str, int], above: dict[str, int], wanted: int, least: int, opened: int
) -> None:
    """What is wanted, but at most a 64th of what the account and each budget have left; else nothing is held."""
    shop.credit(MONEY)
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"], limits=msgspec.convert(above, Limits))
    key, _ = shop.books.keys.create_below(parent.key_id, ["embeddings"], limits=msgspec.convert(above | limits, Limits))
    _, amount = await open_tab(shop, store, key.key_id, wanted, least)
    assert amount == opened
    assert shop.money() == (MONEY, opened)
    assert store.stats.tabs_opened == (opened > 0)
    shop.assert_right()


async def test_what_is_held_and_spent_already_counts_against_a_tab(shop: Shop, store: Store) -> None:
    """Holds and other tabs, of this key and of those that share its budget, and what was spent today."""
    shop.credit(1_000_000)
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"], limits=Limits(budget_day=6_400))
    same = Limits(budget_day=6_400)
    one, two = (shop.books.keys.create_below(parent.key_id, ["embeddings"], limits=same)[0].key_id for _ in range(2))
    tab, amount = await open_tab(shop, store, one, 10_000)
    assert amount == 100
    settle(shop, store, tab, 40)
    await store.hold(held := shop.new_hold(1_000, two))
    assert (await open_tab(shop, store, two, 10_000))[1] == (6_400 - 100 - 1_000) // SHARE_OF_MONEY
    store.capture(held, charge(500, key_id=two))
    close(store, tab)
    assert (await open_tab(shop, store, parent.key_id, 10_000))[1] == (6_400 - 40 - 500 - 82) // SHARE_OF_MONEY
    shop.assert_right()


@pytest.mark.parametrize("what", ["revoked", "expired", "above revoked", "account", "unknown", "node"])
async def test_a_key_that_may_not_pay_has_no_tab(shop: Shop, store: Store, what: str) -> None:
    """The conditions of a hold, and those of finding the key: no row, no error."""
    shop.credit(MONEY)
    shop.books.accounts.create("b")
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"])
    key, _ = shop.books.keys.create_below(parent.key_id, ["embeddings"], expires_ms=shop.clock.now_ms + 10)
    account_id, key_id = "a", key.key_id
    match what:
        case "revoked":
            shop.books.keys.revoke(key.key_id)
        case "above revoked":
            shop.books.keys.revoke(parent.key_id)
        case "expired":
            shop.clock.now_ms += 10
        case "account":
            account_id = "b"
        case "node":
            account_id = "revenue"
        case "unknown":
            key_id = "key_none"
    assert (await open_tab(shop, store, key_id, account_id=account_id))[1] == 0
    assert rows(shop, "SELECT * FROM tabs") == []
    assert store.stats.broken_writes == 0


async def test_tabs_of_one_batch_never_hold_more_than_there_is(shop: Shop, store: Store) -> None:
    """Each is a share of what was there before; the account's own rule refuses what it does not cover."""
    shop.credit(64)
    keys = [new_key(shop) for _ in range(80)]
    amounts = [amount for _, amount in await asyncio.gather(*(open_tab(shop, store, key) for key in keys))]
    assert store.stats.commits < 20
    assert sum(amounts) == store.stats.tabs_opened <= 64
    assert shop.money() == (64, sum(amounts))
    with pytest.raises(InsufficientQuota):
        await store.hold(shop.new_hold(64))
    shop.assert_right()


async def test_a_settlement_is_one_transfer_and_a_record_a_request(shop: Shop, store: Store) -> None:
    """For each tab of a batch; nodes get their shares, sums by day are kept, and the chain covers it all."""
    shop.credit(MONEY)
    key = new_key(shop)
    tabs = [(await open_tab(shop, store, key))[0] for _ in range(2)]
    transfers, commits = len(rows(shop, "SELECT * FROM transfers")), store.stats.commits
    for cost, tab in ((5, 0), (7, 1), (0, 1), (11, 0)):
        settle(shop, store, tabs[tab], cost, payable=cost // 2)
    await store.drain()
    assert store.stats.commits == commits + 1
    assert (store.stats.captured, store.stats.late_captures) == (4, 0)
    columns = "tab_id, settlement, kind, source_id, target_id, amount, requests"
    charges = f"SELECT {columns} FROM transfers WHERE tab_id IS NOT NULL"
    first, second = (tab.tab_id for tab in tabs)
    assert sorted(rows(shop, charges), key=str) == [
        (first, 1, "charge", "a", "revenue", 16, 2),
        (first, 1, "payable", "revenue", "node:n1", 7, None),
        (second, 1, "charge", "a", "revenue", 7, 2),
        (second, 1, "payable", "revenue", "node:n1", 3, None),
    ]
    assert len(rows(shop, "SELECT * FROM transfers")) == transfers + 4
    assert rows(shop, "SELECT requests, cost, tokens FROM usage_days") == [(4, 23, 28)]
    settle(shop, store, tabs[0], 1)
    await store.drain()
    assert rows(shop, f"SELECT captured, requests, settlements FROM tabs WHERE tab_id = '{first}'") == [(17, 3, 2)]
    balances = {account.account_id: account.balance_nanousd for account in shop.books.accounts.list()}
    assert balances == {"a": MONEY - 24, "revenue": 14, "node:n1": 10, "credit_source": -MONEY, "payouts": 0}
    assert await store.extend_chain() == transfers + 5
    shop.assert_right()


async def test_a_record_says_what_its_request_was_for(shop: Shop, store: Store) -> None:
    """Everything of the charge, as under a hold of its own."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, key := new_key(shop))
    full = Charge(9, 3, "m", key, "n2", user_hash="u", price=5, payables=(Payable("n2", 2), Payable("n3", 1)))
    exact, under = shop.new_hold(50, key), shop.new_hold(50, key)
    await store.hold(exact)
    store.capture(exact, full)
    store._writer.submit(SettleRequest(tab.tab_id, under, full))
    await store.drain()
    columns = "account_id, key_id, model, node_id, tokens, price, cost, payable, user_hash, day, meters"
    one, two = rows(shop, f"SELECT {columns} FROM usage")
    assert one == two
    assert rows(shop, "SELECT hold_id, tab_id FROM usage ORDER BY hold_id") == [
        (exact.hold_id, None),
        (under.hold_id, tab.tab_id),
    ]
    shop.assert_right()


async def test_a_request_is_settled_once(shop: Shop, store: Store) -> None:
    """Twice in a batch is once; a batch that was durable, though nobody knew, is not repeated."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    hold = shop.new_hold(10, tab.key_id)
    paid = charge(10, key_id=tab.key_id)
    write = SettleRequest(tab.tab_id, hold, paid)
    store._writer.submit(write)
    store._writer.submit(SettleRequest(tab.tab_id, hold, paid))
    await store.drain()
    assert (store.stats.captured, store.stats.late_captures) == (1, 0)
    store._writer.submit(write)  # as after a lost connection
    other = settle(shop, store, tab, 20)
    await store.drain()
    assert rows(shop, "SELECT hold_id, settlement FROM usage ORDER BY hold_id") == [
        (hold.hold_id, 1),
        (other.hold_id, 2),
    ]
    store._writer.submit(SettleRequest(tab.tab_id, hold, paid))
    await store.drain()
    assert rows(shop, "SELECT captured, requests FROM tabs") == [(30, 2)]
    assert shop.money() == (MONEY - 30, 70)
    shop.assert_right()


async def test_what_is_refused_does_not_sink_the_others(shop: Shop, store: Store) -> None:
    """More than a tab has left, a node that gets more than was paid, another key: each alone is left out."""
    shop.credit(2 * MONEY)
    one, two = [(await open_tab(shop, store, new_key(shop)))[0] for _ in range(2)]
    settle(shop, store, one, 101)
    settle(shop, store, one, 1, payable=2)
    settle(shop, store, one, 60)
    settle(shop, store, two, 3)
    await store.drain()
    assert store.stats.broken_writes == 2
    assert rows(shop, "SELECT captured FROM tabs ORDER BY tab_id") == [(60,), (3,)]
    assert shop.money() == (2 * MONEY - 63, 137)
    shop.assert_right()


async def test_what_is_settled_too_late_is_counted_and_logged(
    shop: Shop, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """By its request's id; the live tab of the same batch is settled."""
    shop.credit(2 * MONEY)
    ended, live = [(await open_tab(shop, store, new_key(shop)))[0] for _ in range(2)]
    close(store, ended)
    await store.drain()
    late = settle(shop, store, ended, 10)
    settle(shop, store, live, 20)
    await store.drain()
    assert (store.stats.captured, store.stats.late_captures, store.stats.tabs_closed) == (1, 1, 1)
    assert caplog.messages == [
        f"tab {ended.tab_id} had ended before request {late.hold_id} was settled: delivered, not charged"
    ]
    assert shop.money() == (2 * MONEY - 20, 80)
    assert len(rows(shop, "SELECT * FROM usage")) == 1
    shop.assert_right()


async def test_a_budget_counts_what_tabs_hold(shop: Shop, store: Store) -> None:
    """Of the key itself and of keys below; what is settled counts as spent, and what goes back is free."""
    shop.credit(1_000_000)
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"], limits=Limits(budget_month=6_400))
    key, _ = shop.books.keys.create_below(parent.key_id, ["embeddings"], limits=Limits(budget_month=6_400))
    tab, amount = await open_tab(shop, store, key.key_id, 10_000)
    assert amount == 100
    settle(shop, store, tab, 30)
    await store.drain()
    for key_id in (key.key_id, parent.key_id):
        assert await store.available_nanousd("a", key_id) == 6_370  # what the tab has left can be recalled
        with pytest.raises(InsufficientQuota, match=r"0\.0000063 is left"):
            await store.hold(shop.new_hold(6_301, key_id))
    close(store, tab)
    assert await store.available_nanousd("a", key.key_id) == 6_370
    await store.hold(shop.new_hold(6_370, key.key_id))
    shop.assert_right()


async def test_a_sweep_ends_any_number_of_tabs(shop: Shop, store: Store) -> None:
    """A sweep goes on until no tab is past its deadline, a bounded number at a time; live ones stay."""
    shop.credit(1_000_000)
    key = new_key(shop)
    count = EXPIRED_HOLDS_MAX + 1
    await asyncio.gather(*(open_tab(shop, store, key, 1) for _ in range(count)))
    shop.clock.now_ms += LASTS_MS
    await open_tab(shop, store, key, 5)
    await store.expire(shop.clock.now_ms)
    assert store.stats.tabs_expired == 0  # not past it yet
    await store.expire(shop.clock.now_ms + 1)
    assert store.stats.tabs_expired == count
    assert shop.money() == (1_000_000, 5)
    shop.assert_right()


async def test_a_dead_gateways_tabs_are_recovered(file_shop: Shop) -> None:
    """After a crash nothing stays held; what was settled stays, and what was not is not charged."""
    shop = file_shop
    store = await shop.open()
    shop.credit(MONEY)
    key = new_key(shop)
    tab, _ = await open_tab(shop, store, key)
    asked, _ = await open_tab(shop, store, key)
    settle(shop, store, tab, 30)
    await recall(store)
    await store.drain()
    lost = settle(shop, store, tab, 40)  # queued, and lost with the process
    image = crash_image(shop.path, shop.path.parent / "crash")
    heir = await shop.open(image)
    try:
        assert (heir.stats.recovered, heir.stats.tabs_recovered) == (0, 2)
        heir._writer.submit(SettleRequest(tab.tab_id, lost, charge(40, key_id=key)))
        close(heir, asked)
        await heir.drain()
        assert (heir.stats.late_captures, heir.stats.tabs_closed) == (1, 0)
        with shop.books.open(image, clock=shop.clock, secret=secret) as books:
            account = books.accounts.find("a")
            assert (account.balance_nanousd, account.held_nanousd) == (MONEY - 30, 0)
            report = books.check()
            assert report.broken == []
            assert (report.tallies["tabs_recovered"], report.tallies["requests_settled"]) == (2, 1)
    finally:
        await heir.close()
        await store.close()


async def test_a_gateway_recovers_its_own_tabs_and_no_others(shop: Shop, store: Store) -> None:
    """Beside another that is alive."""
    shop.credit(MONEY)
    key = new_key(shop)
    await open_tab(shop, store, key)
    second = await shop.open()
    tab, _ = await open_tab(shop, second, key)
    await second.close()  # without closing its tab, as if it had died
    third = await shop.open()
    assert third.stats.tabs_recovered == 1
    assert sorted(rows(shop, "SELECT state FROM tabs")) == [("open",), ("recovered",)]
    assert rows(shop, f"SELECT state FROM tabs WHERE tab_id = '{tab.tab_id}'") == [("recovered",)]
    await third.close()
    shop.assert_right()


async def test_a_recall_is_heard_by_the_tabs_gateway(shop: Shop, store: Store) -> None:
    """It is told how many are live; their gateway sees which, whoever asked hears that they have ended."""
    shop.credit(MONEY)
    key = new_key(shop)
    other = await shop.open()
    watching = asyncio.ensure_future(store.changes.watch()), asyncio.ensure_future(other.changes.watch())
    heard, ended = asyncio.Event(), asyncio.Event()
    await store.changes.look()
    await other.changes.look()
    store.changes.on("tabs", heard.set)
    mine, _ = await open_tab(shop, store, key)
    assert await recall(other) == 1
    await asyncio.wait_for(heard.wait(), 5)
    me = store._opened.instance.name
    with shop.by_hand() as db:
        assert recalled_tabs(db, me) == [mine.tab_id]
        assert recalled_tabs(db, other._opened.instance.name) == []
    await other.changes.look()
    other.changes.on("tabs", ended.set)
    close(store, mine)
    await asyncio.wait_for(ended.wait(), 5)
    assert await recall(other) == 0
    for task in watching:
        task.cancel()
    await other.close()


async def test_a_recall_for_a_key_is_of_all_that_share_a_budget_with_it(shop: Shop, store: Store) -> None:
    """The key itself, keys above and below, and their other keys; not the account's other keys."""
    shop.credit(1_000_000)
    keys = shop.books.keys
    top = keys.create("a", ["keys", "embeddings"])[0].key_id
    left, right = (keys.create_below(top, ["keys", "embeddings"])[0].key_id for _ in range(2))
    below = keys.create_below(left, ["embeddings"])[0].key_id
    apart = keys.create("a", ["embeddings"])[0].key_id
    for key in (left, right, below, apart):
        await open_tab(shop, store, key, 10)
    assert await recall(store, apart) == 1
    assert await recall(store, right) == 3
    assert await recall(store, top) == 3
    closing = rows(shop, "SELECT key_id FROM tabs WHERE state = 'closing'")
    assert {key for (key,) in closing} == {left, right, below, apart}
    assert await recall(store) == 4


@pytest.mark.parametrize(("state", "move", "after"), list(itertools.product(TabState, TabMove, TabState)))
async def test_sql_allows_exactly_the_moves_of_the_table(
    shop: Shop, store: Store, state: TabState, move: TabMove, after: TabState
) -> None:
    """Whoever writes to the store, a tab makes the moves of rules.tabs.MOVES and no other."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    by_move = {
        TabMove.RECALL: "closing",
        TabMove.CLOSE: "closed",
        TabMove.EXPIRE: "expired",
        TabMove.RECOVER: "recovered",
    }
    update = "UPDATE tabs SET state = :state, ended_ms = :ended_ms WHERE tab_id = :tab_id"
    with shop.by_hand() as db:
        if state is not TabState.OPEN:
            db.execute(update, {"state": state.value, "ended_ms": None if state.live else 0, "tab_id": tab.tab_id})
        if after.value != by_move[move]:
            assert MOVES.get((state, move)) is not after  # no other move leads there
            return
        step = {"state": after.value, "ended_ms": None if after.live else 0, "tab_id": tab.tab_id}
        if MOVES.get((state, move)) is after:
            assert db.execute(update, step).rowcount == 1
        else:
            with pytest.raises(refusals()):
                db.execute(update, step)


TAB = "INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, captured, opened_ms, deadline_ms) VALUES"
USAGE = (
    "INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, cost, payable, day, tab_id, settlement) "
    "VALUES"
)
TRANSFER = (
    "INSERT INTO transfers (transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms, tab_id, "
    "settlement, requests, digest) VALUES"
)
DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        ("UPDATE tabs SET amount = amount + 1", "keeps its terms"),
        ("UPDATE tabs SET deadline_ms = deadline_ms + 1", "keeps its terms"),
        ("UPDATE tabs SET captured = captured - 1", "only grows"),
        ("UPDATE tabs SET requests = requests - 1", "only grows"),
        ("UPDATE tabs SET captured = amount + 1", "CHECK|tabs_check"),
        ("UPDATE tabs SET state = 'open'", "moves on"),
        ("UPDATE tabs SET state = 'closed'", "CHECK|tabs_check"),
        ("UPDATE tabs SET ended_ms = 5", "CHECK|tabs_check"),
        ("DELETE FROM tabs", "never deleted"),
        (f"{TAB} ('t', 'a', 'KEY', 'me', 5, 1, 0, 0)", "starts open and unspent"),
        (f"{TAB} ('t', 'a', 'KEY', 'me', 0, 0, 0, 0)", "CHECK|amount_check"),
        (f"{USAGE} ('r', 'a', 'KEY', 'm', 'n', 1, 1, 0, 0, NULL, NULL)", "of a hold or of a tab"),
        (f"{USAGE} ('r', 'a', 'KEY', 'm', 'n', 1, 1, 0, 0, 'TAB', NULL)", "CHECK|is_settled"),
        (f"{USAGE} ('REQ', 'a', 'KEY', 'm', 'n', 1, 1, 0, 0, 'TAB', 2)", "UNIQUE|usage_pkey"),
        ("UPDATE usage SET settlement = 7", "append-only"),
        ("DELETE FROM usage", "kept until"),
        (
            f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, 'TAB', 1, 1, '{DIGEST}')",
            "of a live tab|UNIQUE",
        ),
        (f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, 'TAB', 3, 1, '{DIGEST}')", "of a live tab"),
        (f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, 'none', 1, 1, '{DIGEST}')", "of a live tab"),
        (f"{TRANSFER} (99, 'charge', 'a', 'payouts', 10, NULL, NULL, 0, 'TAB', 2, 1, '{DIGEST}')", "of a live tab"),
        (f"{TRANSFER} (99, 'charge', 'b', 'revenue', 10, NULL, NULL, 0, 'TAB', 2, 1, '{DIGEST}')", "of a live tab"),
        (f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, 'TAB', 2, 1, '{DIGEST}')", "add up to"),
        (
            f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, 'REQ', NULL, 0, 'TAB', 2, 1, '{DIGEST}')",
            "CHECK|hold_or_a_tab|live tab|add up to",
        ),
        (
            f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, 'TAB', 2, 1, NULL)",
            "CHECK|tab_settle|add up to",
        ),
        (
            f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, NULL, NULL, 0, NULL, NULL, NULL, NULL)",
            "hold captured|CHECK",
        ),
        (
            f"{TRANSFER} (99, 'payable', 'revenue', 'node:n1', 1, NULL, NULL, 0, 'none', 1, NULL, NULL)",
            "hold or a settlement",
        ),
        (
            f"{TRANSFER} (99, 'payable', 'revenue', 'node:n1', 1, NULL, NULL, 0, 'TAB', 1, NULL, NULL)",
            "UNIQUE|once_a_settlement",
        ),
        (
            f"{TRANSFER} (99, 'payable', 'revenue', 'node:n1', 1, 'none', NULL, 0, NULL, NULL, NULL, NULL)",
            "hold or a settlement",
        ),
        (
            f"{TRANSFER} (99, 'refund', 'revenue', 'a', 11, 'REQ', 'x', 0, 'TAB', NULL, NULL, NULL)",
            "at most what its hold captured",
        ),
        (
            f"{TRANSFER} (99, 'refund', 'revenue', 'a', 5, 'REQ', 'x', 0, NULL, NULL, NULL, NULL)",
            "at most what its hold captured",
        ),
        (
            f"{TRANSFER} (99, 'refund', 'revenue', 'b', 5, 'REQ', 'x', 0, 'TAB', NULL, NULL, NULL)",
            "at most what its hold captured",
        ),
        (
            f"{TRANSFER} (99, 'credit', 'credit_source', 'a', 5, NULL, 'x', 0, 'TAB', NULL, NULL, NULL)",
            "CHECK|hold_or_a_tab",
        ),
    ],
)
async def test_the_store_defends_its_tabs(shop: Shop, store: Store, tampering: str, says: str) -> None:
    """No statement, from whatever program, can break a promise that the schema makes."""
    shop.credit(MONEY)
    shop.books.accounts.create("b")
    tab, _ = await open_tab(shop, store, key := new_key(shop))
    hold = settle(shop, store, tab, 10, payable=2)
    await store.drain()
    tampering = tampering.replace("TAB'", f"{tab.tab_id}'").replace("KEY", key).replace("REQ", hold.hold_id)
    with shop.by_hand() as db, pytest.raises(refusals(), match=says):
        db.execute(tampering)
    assert shop.money() == (MONEY - 10, 90)
    shop.assert_right()


async def test_a_request_under_a_tab_can_be_given_back(shop: Shop, store: Store) -> None:
    """By a transfer that names both, at most once what it cost."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    hold = settle(shop, store, tab, 10)
    await store.drain()
    refund = f"{TRANSFER} (98, 'refund', 'revenue', 'a', 6, '{hold.hold_id}', 'x', 0, '{tab.tab_id}', NULL, NULL, NULL)"
    with shop.by_hand() as db:
        db.execute(refund)
        with pytest.raises(refusals(), match="at most what its hold captured"):
            db.execute(refund.replace("98", "99").replace("'x'", "'y'"))
    assert shop.money() == (MONEY - 4, 90)
    shop.assert_right()


async def test_who_has_gone_before_a_tab_is_opened_gets_none(shop: Shop, store: Store) -> None:
    """And the others of the batch get theirs."""
    shop.credit(MONEY)
    key = new_key(shop)
    tabs = [Tab(f"t{number}", "a", key, shop.clock.now_ms + LASTS_MS) for number in range(2)]
    gone, live = (OpenTab(tab, "me", 10, 1) for tab in tabs)
    gone.outcome.cancel()
    store._writer.submit(gone)
    store._writer.submit(live)
    assert await live.outcome == 10
    assert shop.money() == (MONEY, 10)


def costs(holds: Sequence[Hold]) -> int:
    return sum(hold.amount_nanousd for hold in holds)


async def test_many_tabs_are_settled_in_one_batch(shop: Shop, store: Store) -> None:
    """As many as a batch has writes, each with requests of its own; every sum is right."""
    shop.credit(1_000_000)
    keys = [new_key(shop) for _ in range(16)]
    tabs = [tab for tab, _ in await asyncio.gather(*(open_tab(shop, store, key, 1_000) for key in keys))]
    before = store.stats.commits
    holds = [settle(shop, store, tabs[number % 16], number, payable=number // 3) for number in range(128)]
    await store.drain()
    assert store.stats.commits == before + 1
    assert shop.money() == (1_000_000 - costs(holds), 16_000 - costs(holds))
    shop.assert_right()
    assert msgspec.json.encode(tabs)  # they can be shown


BREAKING = [
    ("held_is_sum_of_holds_and_tabs", "UPDATE tabs SET amount = amount + 1"),
    ("held_is_sum_of_holds_and_tabs", "UPDATE tabs SET state = 'closed', ended_ms = 1"),
    ("drawn_is_held_below", "UPDATE tabs SET state = 'closed', ended_ms = 1"),
    ("tabs_end_once", "UPDATE tabs SET captured = amount + 1"),
    ("tabs_end_once", "UPDATE tabs SET state = 'closed'"),
    ("tabs_end_once", "UPDATE tabs SET state = 'lost'"),
    ("tabs_captured_what_was_settled", "UPDATE tabs SET captured = captured - 1, amount = amount - 1"),
    ("tabs_captured_what_was_settled", "UPDATE tabs SET settlements = settlements + 1"),
    ("tabs_captured_what_was_settled", "UPDATE tabs SET account_id = 'b'"),
    ("tabs_captured_what_was_settled", "DELETE FROM transfers WHERE requests = 2"),
    ("requests_have_holds_or_tabs", "UPDATE transfers SET tab_id = 'none' WHERE kind = 'payable'"),
    ("requests_have_holds_or_tabs", "UPDATE transfers SET settlement = 9 WHERE kind = 'payable'"),
    ("requests_have_holds_or_tabs", "UPDATE usage SET tab_id = NULL, settlement = NULL"),
    ("settlements_are_their_usage", "DELETE FROM usage WHERE cost = 7"),
    ("settlements_are_their_usage", "UPDATE usage SET key_id = 'another' WHERE cost = 7"),
    ("settlements_are_their_usage", "UPDATE usage SET account_id = 'b' WHERE cost = 7"),
    ("settlements_are_their_usage", "UPDATE usage SET day = day - 1 WHERE cost = 7"),
    ("settlements_are_their_usage", "UPDATE usage SET settlement = 2 WHERE cost = 7"),
    ("usage_of_tabs_is_settled", f"{USAGE} ('more', 'a', 'KEY', 'm', 'n', 1, 1, 0, 0, 'TAB', 9)"),
    (
        "requests_are_charged_once",
        "INSERT INTO holds (hold_id, account_id, amount, owner, created_ms, deadline_ms) "
        "SELECT hold_id, 'a', 0, 'me', 0, 0 FROM usage WHERE cost = 7",
    ),
    ("payables_of_tabs_are_recorded", "DELETE FROM transfers WHERE kind = 'payable'"),
    ("payables_of_tabs_are_recorded", "UPDATE usage SET payable = payable + 1 WHERE cost = 7"),
    ("settlements_match_their_digests", "UPDATE usage SET model = 'another' WHERE cost = 7"),
    ("settlements_match_their_digests", "UPDATE usage SET user_hash = 'another' WHERE cost = 7"),
    ("settlements_match_their_digests", "UPDATE usage SET price = 1 WHERE cost = 7"),
    ("settlements_match_their_digests", "UPDATE usage SET hold_id = 'another' WHERE cost = 7"),
    ("settlements_match_their_digests", f"UPDATE transfers SET digest = '{DIGEST}' WHERE requests = 2"),
    ("chain_holds", f"UPDATE transfers SET digest = '{DIGEST}' WHERE requests = 2"),
    ("chain_holds", "UPDATE transfers SET requests = 3 WHERE requests = 2"),
    ("chain_holds", "UPDATE transfers SET tab_id = 'another' WHERE kind = 'payable'"),
    (
        "refunds_are_of_charges",
        f"{TRANSFER} (99, 'refund', 'revenue', 'a', 8, (SELECT hold_id FROM usage WHERE cost = 7), 'x', 0, 'TAB', "
        "NULL, NULL, NULL)",
    ),
    ("usage_adds_up", "UPDATE usage SET cost = 8 WHERE cost = 7"),
    ("customers_were_charged_what_they_used", "UPDATE transfers SET amount = amount + 1 WHERE requests = 2"),
]


@pytest.mark.parametrize(("promise", "breaking"), BREAKING)
async def test_the_check_sees_what_was_done_to_tabs(shop: Shop, store: Store, promise: str, breaking: str) -> None:
    """Each column that matters is broken once, with the schema's defences down, and the promise is named."""
    shop.credit(MONEY)
    shop.books.accounts.create("b")
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"])
    key = shop.books.keys.create_below(parent.key_id, ["embeddings"])[0].key_id
    tab, _ = await open_tab(shop, store, key)
    for cost in (5, 7):
        settle(shop, store, tab, cost, payable=2)
    await store.drain()
    settle(shop, store, tab, 11)
    await store.drain()
    await store.extend_chain()
    shop.assert_right()
    with shop.by_hand() as db:
        without_defences(db)
        db.execute(breaking.replace("TAB'", f"{tab.tab_id}'").replace("KEY", key))
    assert promise in {broken.promise for broken in shop.books.check().broken}
