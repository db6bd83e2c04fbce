"""Several gateways on one store: they agree about money, keys, limits and who is alive."""

import asyncio
import random
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from functools import partial

import msgspec
import pytest

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import InsufficientQuota, RateLimited, SetupError
from embedmesh.rules.holds import Hold, Payable
from embedmesh.rules.ports import Caller
from embedmesh.rules.tabs import Tab
from embedmesh.storage.cached.changes import RecordKind
from embedmesh.storage.instance import take_instance
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab, RecallTabs
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.store import Store
from embedmesh.system import this_user
from tests.storage.shop import LASTS_MS, Shop, charge

GATEWAYS = 3
SEEN_S = 1.0  # what one gateway is told, the others know within a second


@pytest.fixture
async def stores(shop: Shop) -> AsyncIterator[list[Store]]:
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(GATEWAYS):
            store = await shop.open(lock_wait_s=5)
            stack.push_async_callback(store.close)
            watching = asyncio.ensure_future(store.changes.watch())
            stack.callback(watching.cancel)
            opened.append(store)
        yield opened


async def test_money_for_ten_lets_exactly_ten_spend_over_all_gateways(shop: Shop, stores: list[Store]) -> None:
    """Whoever asks whom: not one too many, not one too few, round after round."""
    shop.credit(1_000)
    for round_ in range(10):
        holds = [shop.new_hold(100) for _ in range(64)]
        asked = [stores[number % GATEWAYS] for number in range(64)]
        placing = [store.hold(hold) for store, hold in zip(asked, holds, strict=True)]
        outcomes = await asyncio.gather(*placing, return_exceptions=True)
        good = [number for number, outcome in enumerate(outcomes) if outcome is None]
        assert len(good) == 10, round_
        assert all(isinstance(outcome, InsufficientQuota) for outcome in outcomes if outcome is not None)
        for number in good:
            asked[number].release(holds[number])
        await asyncio.gather(*(store.drain() for store in stores))
        assert shop.money() == (1_000, 0)
    shop.assert_right()


async def test_gateways_that_charge_at_the_same_time_add_up(shop: Shop, stores: list[Store]) -> None:
    """The same customer and the same nodes, in whatever order their batches want them."""
    shop.credit(10_000)
    holds = [shop.new_hold(10) for _ in range(120)]
    await asyncio.gather(*(stores[number % GATEWAYS].hold(hold) for number, hold in enumerate(holds)))
    for number, hold in enumerate(holds):
        stores[(number + 1) % GATEWAYS].capture(hold, charge(10, payable=3))  # by another than has placed it
    await asyncio.gather(*(store.drain() for store in stores))
    assert shop.money() == (10_000 - 1_200, 0)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 360
    assert [store.stats.failed_batches for store in stores] == [0] * GATEWAYS
    shop.assert_right()


async def test_a_revoked_key_is_useless_everywhere_within_a_second(shop: Shop, stores: list[Store]) -> None:
    """Each gateway remembers keys, and forgets them when it hears of a change."""
    key, token = shop.books.keys.create("a", ["embeddings"])
    for store in stores:
        assert await store.keys.find(token) is not None
    revoked = time.monotonic()
    shop.books.keys.revoke(key.key_id)
    for store in stores:
        while await store.keys.find(token) is not None:
            assert time.monotonic() - revoked < SEEN_S
            await asyncio.sleep(0.01)


async def test_another_cache_of_an_account_is_heard_of_everywhere_within_a_second(
    shop: Shop, stores: list[Store]
) -> None:
    """Each gateway remembers it with the account's keys."""
    _, token = shop.books.keys.create("a", ["embeddings"])
    for policy in (CachePolicy.OFF, CachePolicy.FREE, CachePolicy.CHARGED, CachePolicy.OFF):
        changed = time.monotonic()
        shop.books.accounts.change("a", cache=policy)
        for store in stores:
            while (found := await store.keys.find(token)) is None or found.cache is not policy:
                assert time.monotonic() - changed < SEEN_S
                await asyncio.sleep(0.01)


async def test_keys_are_remembered_while_money_moves(shop: Shop, store: Store) -> None:
    """Only another cache makes gateways forget them: no hold, charge, credit or limit, nor the same cache again."""

    def version() -> int:
        with shop.by_hand() as db:
            return int(db.execute("SELECT version FROM changes WHERE kind = 'keys'").fetchall()[0][0])

    before = version()
    shop.credit(1_000)
    hold = shop.new_hold(100)
    await store.hold(hold)
    store.capture(hold, charge(90, payable=30))
    await store.drain()
    shop.books.accounts.change("a", credit_limit_nanousd=5)
    shop.books.accounts.change("a", cache=CachePolicy.OFF)
    shop.books.accounts.create("b", cache=CachePolicy.FREE)
    assert version() == before
    shop.books.accounts.change("a", cache=CachePolicy.FREE)
    assert version() == before + 1


async def test_what_changes_is_told_to_all(shop: Shop, stores: list[Store]) -> None:
    """Keys, prices and nodes, each by its own version; unchanged kinds are not reported."""
    heard: list[str] = []
    kinds: tuple[RecordKind, ...] = ("keys", "nodes", "prices")
    for kind in kinds:
        stores[0].changes.on(kind, partial(heard.append, kind))
    key, _ = shop.books.keys.create("a", ["embeddings"])
    await asyncio.sleep(2 * 0.25 + 0.1)
    assert heard == []  # nobody can have remembered a new key
    shop.books.prices.set("m", 7)
    shop.books.keys.change(key.key_id, name="other", expires_ms=shop.clock.now_ms + 5)
    ends = time.monotonic() + SEEN_S
    while set(heard) != {"keys", "prices"} and time.monotonic() < ends:
        await asyncio.sleep(0.01)
    assert set(heard) == {"keys", "prices"}


async def test_a_gateway_that_starts_anew_releases_its_own_holds_only(shop: Shop) -> None:
    """What others have under way goes on; theirs is released by whoever sweeps, once its deadline is over."""
    shop.credit(1_000)
    async with AsyncExitStack() as stack:
        other = await shop.open(lock_wait_s=5)
        stack.push_async_callback(other.close)
        dying = await shop.open(lock_wait_s=5)
        live, left = shop.new_hold(100), shop.new_hold(10)
        await other.hold(live)
        await dying.hold(left)
        dead = dying._opened.instance.name
        await dying._writer.close()  # as if it were killed: nothing is written any more
        dying._opened.close(clean=False)
        heir = await shop.open(lock_wait_s=5)
        stack.push_async_callback(heir.close)
        assert heir._opened.instance.name == dead
        assert heir.stats.recovered == 1
        assert shop.money() == (1_000, 100)
        shop.clock.now_ms += LASTS_MS + 1
        assert await heir.expire(shop.clock.now_ms) == 1
        assert shop.money() == (1_000, 0)
        other.capture(live, charge(50))
        await other.drain()
        assert other.stats.late_captures == 1
    shop.assert_right()


def test_a_copied_data_directory_is_another_gateway(shop: Shop) -> None:
    """Else two machines would release each other's holds."""
    first = take_instance(shop.folder, shop.clock)
    first.close()
    again = take_instance(shop.folder, shop.clock)
    assert again.name == first.name
    second = take_instance(shop.folder, shop.clock)  # while the first runs
    assert second.name != first.name
    again.close()
    copy = shop.folder.with_name("copy")
    shutil.copytree(shop.folder, copy)
    copied = take_instance(copy, shop.clock)
    assert copied.name not in (first.name, second.name)
    copied.close()
    second.close()


@pytest.mark.parametrize("name", ["gateway-0.lock"])
def test_a_folder_that_cannot_be_written_is_a_setup_error(shop: Shop, name: str) -> None:
    (shop.folder / name).mkdir(parents=True)
    with pytest.raises(SetupError, match="data-dir"):
        take_instance(shop.folder, shop.clock)


@pytest.mark.parametrize(("what", "amount"), [("requests", 1), ("tokens", 1), ("tokens", 13)])
async def test_a_limit_holds_over_all_gateways(shop: Shop, stores: list[Store], what: str, amount: int) -> None:
    """Never more than the limit; and at most what the others have taken and not spent too little: a lease each."""
    limit = 320
    caller = Caller("a", "key_1", frozenset(), None, *((limit, None) if what == "requests" else (None, limit)))
    passed = 0
    for number in range(3 * limit // amount):
        store = stores[number * 7 % GATEWAYS]
        try:
            if what == "requests":
                await store.rate_limits.take_request(caller)
            else:
                await store.rate_limits.take_tokens(caller, amount)
        except RateLimited as failure:
            assert failure.retry_after_s is not None and 0 < failure.retry_after_s <= 60
        else:
            passed += amount
    lease = max(limit // 16, amount)
    assert limit - GATEWAYS * lease <= passed <= limit
    shop.clock.now_ms += 60_000  # a new minute
    await stores[0].rate_limits.take_request(caller)
    await stores[0].rate_limits.take_tokens(caller, amount)


async def test_what_is_left_of_a_limit_is_told(shop: Shop, stores: list[Store]) -> None:
    """Limit, what is left and seconds until the minute is over; as far as a gateway has heard of the others."""
    store, other = stores[0], stores[1]
    caller = Caller("a", "key_1", frozenset(), None, 160, None)
    assert [(one.what, one.limit, one.left) for one in store.rate_limits.left(caller)] == [("requests", 160, 160)]
    for _ in range(3):
        await store.rate_limits.take_request(caller)
    [left] = store.rate_limits.left(caller)
    assert (left.left, left.reset_s) == (157, 60 - shop.clock.now_ms % 60_000 / 1000)
    await other.rate_limits.take_request(caller)
    assert [one.left for one in other.rate_limits.left(caller)] == [149]  # the first has ten of them
    assert store.rate_limits.left(Caller("a", "key_2", frozenset())) == ()


async def test_a_limit_that_is_changed_counts_what_was_spent(shop: Shop, store: Store) -> None:
    """Lower: at once. Higher: the rest is there."""
    caller = Caller("a", "key_1", frozenset(), None, 2, None)
    await store.rate_limits.take_request(caller)
    await store.rate_limits.take_request(caller)
    with pytest.raises(RateLimited) as told:
        await store.rate_limits.take_request(caller)
    assert told.value.message == (
        "This API key may use 2 requests a minute; 0 of this minute's are left. Wait for the next."
    )
    assert told.value.retry_after_s == 60 - shop.clock.now_ms % 60_000 / 1000
    higher = Caller("a", "key_1", frozenset(), None, 3, None)
    await store.rate_limits.take_request(higher)
    with pytest.raises(RateLimited):
        await store.rate_limits.take_request(higher)
    metered = Caller("a", "key_1", frozenset(), None, None, 5_000)
    with pytest.raises(RateLimited) as told:
        await store.rate_limits.take_tokens(metered, 6_000)
    assert told.value.message == (
        "This API key may use 5,000 tokens a minute; 5,000 of this minute's are left. "
        "This request alone has 6,000: split it."
    )
    await store.rate_limits.take_tokens(metered, 5_000)  # to the last one
    with pytest.raises(RateLimited, match="0 of this minute"):
        await store.rate_limits.take_tokens(metered, 1)


async def test_many_at_once_take_one_lease(shop: Shop, store: Store) -> None:
    """Requests of one key that come together do not each ask the store."""
    caller = Caller("a", "key_1", frozenset(), None, 1_600, None)
    before = store.stats.writes
    await asyncio.gather(*(store.rate_limits.take_request(caller) for _ in range(100)))
    await store.drain()
    assert store.stats.writes - before == 1


async def test_gateways_that_open_settle_recall_and_end_tabs_at_the_same_time_add_up(
    shop: Shop, stores: list[Store]
) -> None:
    """Keys of two accounts at all gateways, with shared nodes, sweeps and exact holds between: none waits for ever.

    What was settled was paid, what was late was not, and nothing stays held.
    """
    dice = random.Random(15)
    shop.books.accounts.create("b")
    shop.credit(10**7)
    shop.books.accounts.credit("b", 10**7, "first")
    keys = {account: shop.books.keys.create(account, ["embeddings"])[0].key_id for account in ("a", "b")}

    async def spender(store: Store, name: str) -> None:
        for number in range(12):
            account_id = dice.choice("ab")
            until_ms = shop.clock.now_ms + dice.choice([-1, LASTS_MS])  # some are swept at once
            tab = Tab(f"tab_{name}_{number}", account_id, keys[account_id], until_ms)
            opening = OpenTab(tab, store._opened.instance.name, 100, 1)
            store._writer.submit(opening)
            assert await opening.outcome == 100
            for request in range(dice.randrange(4)):
                hold = Hold(f"req_{name}_{number}_{request}", account_id, 10, 0, tab.key_id)
                to = (Payable(f"n{dice.randrange(3)}", dice.randrange(4)),)
                paid = msgspec.structs.replace(charge(10, key_id=tab.key_id), payables=to)
                store._writer.submit(SettleRequest(tab.tab_id, hold, paid))
            match dice.randrange(4):
                case 0:
                    recalling = RecallTabs(account_id, None)
                    store._writer.submit(recalling)
                    await recalling.outcome
                case 1:
                    await store.expire(shop.clock.now_ms)
                case 2:
                    await store.hold(hold := shop.new_hold(10, account_id=account_id))
                    store.capture(hold, charge(10, payable=1, key_id=tab.key_id))
            store._writer.submit(CloseTab(tab.tab_id, account_id))

    await asyncio.gather(*(spender(store, f"{at}{n}") for at, store in enumerate(stores) for n in range(4)))
    await asyncio.gather(*(store.drain() for store in stores))
    accounts = [shop.books.accounts.find(account_id) for account_id in "ab"]
    captured = sum(store.stats.captured for store in stores)
    assert sum(account.balance_nanousd for account in accounts) == 2 * 10**7 - 10 * captured
    assert [account.held_nanousd for account in accounts] == [0, 0]
    ended = sum(store.stats.tabs_closed + store.stats.tabs_expired for store in stores)
    assert ended == sum(store.stats.tabs_opened for store in stores) == 12 * 4 * GATEWAYS
    assert [(store.stats.failed_batches, store.stats.broken_writes) for store in stores] == [(0, 0)] * GATEWAYS
    shop.assert_right()


async def test_gateways_hear_that_settings_are_to_be_read_also_the_first_time(shop: Shop, store: Store) -> None:
    """Nobody has told of that kind before, so there is no row of it."""
    heard: list[str] = []
    store.changes.on("settings", lambda: heard.append("settings"))
    await store.changes.look()
    for told in (1, 2):
        shop.books.tell_settings({"changed": []}, [this_user()])
        await store.changes.look()
        await store.changes.look()
        assert len(heard) == told
