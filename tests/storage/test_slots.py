"""How many requests of a key are under way at one time: over one gateway, over several, and when one of them dies."""

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest

from embedmesh.rules.errors import RateLimited, StoreUnavailable
from embedmesh.rules.ports import Caller, SlotLimit
from embedmesh.storage.books.keys import Key, Limits
from embedmesh.storage.cached.slots import ANSWER_S_MAX, ASK_AGAIN_S, IDLE_S, LEASE_S, RENEWED_S
from embedmesh.storage.store import Store
from tests.storage.shop import Shop

GATEWAYS = 3
LASTS_MS = 55_000  # what an ordinary request takes at most


def limited(limit: int, *above: SlotLimit, key_id: str = "key_1") -> Caller:
    return Caller("a", key_id, frozenset(), slots=(SlotLimit(key_id, limit), *above))


def ends_ms(store: Store) -> int:
    """When a request that begins now is over at the latest."""
    return store._clock.unix_ms() + LASTS_MS


async def take(store: Store, caller: Caller) -> bool:
    """As a request does. Returns whether it found them at once."""
    if store.slots.take_now(caller, ends_ms(store)):
        return True
    await store.slots.take(caller, ends_ms(store))
    return False


async def refused(store: Store, caller: Caller) -> RateLimited:
    with pytest.raises(RateLimited) as told:
        await take(store, caller)
    return told.value


def leased(shop: Shop) -> dict[str, int]:
    """By place, over all gateways."""
    with shop.by_hand() as db:
        return dict(db.execute("SELECT place_id, sum(slots) FROM slots GROUP BY place_id").fetchall())


async def until(what: Any, within_s: float = 3.0) -> None:
    """Wait until something is true."""
    ends = time.monotonic() + within_s
    while not what():
        assert time.monotonic() < ends
        await asyncio.sleep(0.01)


@pytest.fixture
async def stores(shop: Shop) -> AsyncIterator[list[Store]]:
    """Several gateways, each with what runs in its background."""
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(GATEWAYS):
            store = await shop.open(lock_wait_s=5)
            stack.push_async_callback(store.close)
            for each in (store.changes.watch(), store.slots.watch()):
                stack.callback(asyncio.ensure_future(each).cancel)
            opened.append(store)
        yield opened


# -- one gateway -------------------------------------------------------------------------------------------------------


async def test_a_key_has_so_many_requests_at_one_time(store: Store) -> None:
    """The next is let in when one ends, without a word to the store; another key is not touched."""
    caller = limited(2)
    await take(store, caller)
    await take(store, caller)
    told = await refused(store, caller)
    assert told.message == "This API key has 2 requests under way, which is all it may. Wait for one of them."
    assert told.retry_after_s == 1.0
    await take(store, limited(1, key_id="key_2"))
    store.slots.give_back(caller)
    writes = store.stats.writes
    assert store.slots.take_now(caller, ends_ms(store))
    await refused(store, caller)
    assert store.stats.writes == writes


async def test_a_key_without_such_a_limit_takes_none(shop: Shop, store: Store) -> None:
    caller = Caller("a", "key_1", frozenset())
    assert store.slots.take_now(caller, ends_ms(store))
    store.slots.give_back(caller)
    assert leased(shop) == {}


async def test_many_at_once_take_two_leases(store: Store) -> None:
    """The first one's, and one for all who came meanwhile; those that are too many are told at once."""
    outcomes = await asyncio.gather(*(take(store, limited(20)) for _ in range(50)), return_exceptions=True)
    assert sum(isinstance(each, RateLimited) for each in outcomes) == 30
    assert store.stats.writes == 2


async def test_a_lease_has_some_to_spare(shop: Shop, store: Store) -> None:
    """A sixteenth of the limit: the next requests find a slot at once."""
    assert [await take(store, limited(64)) for _ in range(5)] == [False, True, True, True, False]
    assert leased(shop) == {"key_1": 8}


async def test_a_request_takes_a_slot_of_each_key_above(store: Store) -> None:
    """All or none: what was taken before the one that has none is given back."""
    above = SlotLimit("parent", 1, above=True)
    first, second = limited(5, above), limited(5, above, key_id="key_2")
    await take(store, first)
    assert (await refused(store, second)).message.startswith("The API key that this one draws from has 1 requests")
    assert not store.slots.take_now(second, ends_ms(store))
    assert {name: place.in_use for name, place in store.slots._places.items()} == {"key_1": 1, "parent": 1, "key_2": 0}
    store.slots.give_back(first)
    await take(store, second)


async def test_who_gives_up_while_it_waits_takes_none(store: Store) -> None:
    """However far it has come."""
    above = SlotLimit("parent", 5, above=True)
    for turns in range(8):
        caller = limited(5, above, key_id=f"key_{turns}")
        taking = asyncio.ensure_future(store.slots.take(caller, ends_ms(store)))
        for _ in range(turns):
            await asyncio.sleep(0)
        taking.cancel()
        await asyncio.gather(taking, return_exceptions=True)
        if not taking.cancelled():
            store.slots.give_back(caller)
        assert all(not place.in_use and not place.waiting for place in store.slots._places.values())


async def test_a_lease_lasts_longer_than_any_request_under_it(shop: Shop, store: Store) -> None:
    """A slot of one that ends too soon is no slot: the store is asked for more time."""
    caller = limited(1)
    await take(store, caller)
    store.slots.give_back(caller)
    shop.clock.now_ms += int(LEASE_S * 1000) - LASTS_MS
    assert store.slots.take_now(caller, ends_ms(store))
    store.slots.give_back(caller)
    shop.clock.now_ms += 1
    assert not store.slots.take_now(caller, ends_ms(store))
    for lasts_ms in (LASTS_MS, 625_000):
        await store.slots.take(caller, shop.clock.now_ms + lasts_ms)
        with shop.by_hand() as db:
            ((until_ms,),) = db.execute("SELECT until_ms FROM slots").fetchall()
        assert until_ms >= shop.clock.now_ms + lasts_ms
        store.slots.give_back(caller)


async def test_a_lease_is_renewed_while_it_is_used_and_given_back_when_it_is_not(shop: Shop, store: Store) -> None:
    caller = limited(128)
    await take(store, caller)
    for _ in range(5):
        shop.clock.now_ms += int((LEASE_S - RENEWED_S) * 1000) + 1
        await store.slots._look()
        assert store.slots.take_now(caller, ends_ms(store))
    assert leased(shop) == {"key_1": 8}
    writes = store.stats.writes
    await store.slots._look()
    assert store.stats.writes == writes
    for _ in range(6):
        store.slots.give_back(caller)
    await store.slots._look()
    assert leased(shop) == {"key_1": 8}
    shop.clock.skipped_s += IDLE_S + 1
    await store.slots._look()
    assert (leased(shop), store.slots._places) == ({}, {})


async def test_a_refused_key_is_forgotten(store: Store) -> None:
    """What nobody has leased takes no memory for long."""
    await store.slots.take(limited(1), ends_ms(store))
    store.slots._places["key_2"] = type(store.slots._places["key_1"])(5)
    await store.slots._look()
    assert set(store.slots._places) == {"key_1"}


async def test_another_limit_counts_what_is_under_way(shop: Shop, store: Store) -> None:
    """Lower: nobody is let in until fewer are under way. Higher: the rest is there."""
    for _ in range(3):
        await take(store, limited(3))
    await refused(store, limited(2))
    store.slots.give_back(limited(2))
    await refused(store, limited(2))
    store.slots.give_back(limited(2))
    await take(store, limited(2))
    assert leased(shop) == {"key_1": 2}
    await refused(store, limited(2))
    await take(store, limited(3))
    assert leased(shop) == {"key_1": 3}


async def test_a_gateway_that_stops_gives_all_back(shop: Shop) -> None:
    first = await shop.open()
    await take(first, limited(2))
    await first.close()
    assert leased(shop) == {}


# -- several gateways --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 3, 32])
async def test_a_limit_holds_over_all_gateways(shop: Shop, stores: list[Store], limit: int) -> None:
    """Never one too many, whatever is asked where; and a key that is alone gets all of them."""
    caller, dice = limited(limit), random.Random(limit)
    under_way, most, served = 0, 0, 0

    async def request() -> None:
        nonlocal under_way, most, served
        store = dice.choice(stores)
        try:
            await take(store, caller)
        except RateLimited:
            return
        under_way, served = under_way + 1, served + 1
        most = max(most, under_way)
        await asyncio.sleep(dice.random() * 0.02)
        under_way -= 1
        store.slots.give_back(caller)

    for _ in range(20):
        await asyncio.gather(*(request() for _ in range(2 * limit + 2)))
        assert leased(shop).get("key_1", 0) <= limit
    assert 1 <= most <= limit
    assert served > 20 * limit // 2
    await asyncio.sleep(2 * ASK_AGAIN_S)  # some were just told that there are none
    for store in stores:
        for _ in range(limit):
            await take(store, caller)
        for _ in range(limit):
            store.slots.give_back(caller)


async def test_one_slot_goes_from_gateway_to_gateway(stores: list[Store]) -> None:
    """A caller whose requests reach one after the other is served by all, each within about a second; soon at once."""
    caller = limited(1)
    took = []
    for store in itertools.islice(itertools.cycle(stores), 12):
        began = time.monotonic()
        await take(store, caller)
        took.append(time.monotonic() - began)
        store.slots.give_back(caller)
        await asyncio.sleep(0.1)
    assert max(took) < ANSWER_S_MAX
    assert max(took[GATEWAYS:]) < 0.2


async def test_who_is_refused_hears_it_as_soon_as_all_others_have_answered(stores: list[Store]) -> None:
    """And then at once, without asking the store each time."""
    caller = limited(2)
    for store in stores[:2]:
        await take(store, caller)
    began = time.monotonic()
    await refused(stores[2], caller)
    assert time.monotonic() - began < ANSWER_S_MAX
    writes = stores[2].stats.writes
    for _ in range(20):
        await refused(stores[2], caller)
    assert stores[2].stats.writes == writes
    stores[0].slots.give_back(caller)
    await asyncio.sleep(0.3)
    await take(stores[2], caller)


async def test_idle_slots_are_not_kept_from_others(shop: Shop, stores: list[Store]) -> None:
    """A gateway that has leased all, and uses few, gives the others what they ask for."""
    caller = limited(16)
    for _ in range(16):
        await take(stores[0], caller)
    for _ in range(15):
        stores[0].slots.give_back(caller)
    assert leased(shop) == {"key_1": 16}
    await asyncio.gather(*(take(stores[1], caller) for _ in range(15)))
    await refused(stores[2], caller)


async def test_a_gateway_that_does_not_answer_is_not_waited_for_long(shop: Shop, store: Store) -> None:
    """The lease may be a dead one's. It ends by itself, and then its slots are there again."""
    other = await shop.open(lock_wait_s=5)
    caller = limited(1)
    await take(other, caller)
    other.slots.give_back(caller)
    began = time.monotonic()
    await refused(store, caller)
    assert ANSWER_S_MAX <= time.monotonic() - began < 2 * ANSWER_S_MAX
    shop.clock.now_ms += int(LEASE_S * 1000)
    shop.clock.skipped_s += 1.0
    await take(store, caller)
    await other.close()


async def test_a_gateway_that_comes_late_has_only_what_is_in_use(shop: Shop, store: Store) -> None:
    """It was stopped for so long that its lease has ended: what it had left may be another's."""
    other = await shop.open(lock_wait_s=5)
    caller = limited(3)
    for _ in range(3):
        await take(other, caller)
    other.slots.give_back(caller)
    other.slots.give_back(caller)
    shop.clock.now_ms += int(LEASE_S * 1000) + 1
    await take(store, caller)
    await take(store, caller)
    assert not other.slots.take_now(caller, ends_ms(other))
    await refused(other, caller)
    await other.slots._look()
    assert leased(shop) == {"key_1": 3}
    await other.close()


async def test_a_lower_limit_is_kept_over_all_gateways(shop: Shop, stores: list[Store]) -> None:
    """Each lets nobody in until all together are below it."""
    for store in stores[:2]:
        for _ in range(4):
            await take(store, limited(8))
    for store in (*stores, *stores):
        await refused(store, limited(4))
    for store in stores[:2]:
        for _ in range(2):
            store.slots.give_back(limited(4))
    await refused(stores[0], limited(4))
    stores[0].slots.give_back(limited(4))
    await asyncio.sleep(0.3)
    await take(stores[0], limited(4))
    await refused(stores[0], limited(4))


async def test_a_gateway_that_starts_anew_has_no_slots_of_its_last_life(shop: Shop) -> None:
    """The others' stay."""
    async with AsyncExitStack() as stack:
        other, dying = await shop.open(lock_wait_s=5), await shop.open(lock_wait_s=5)
        stack.push_async_callback(other.close)
        await take(other, limited(3))
        await take(dying, limited(3))
        assert leased(shop) == {"key_1": 2}
        await dying._writer.close()  # as if it were killed
        dying._opened.close(clean=False)
        heir = await shop.open(lock_wait_s=5)
        stack.push_async_callback(heir.close)
        assert leased(shop) == {"key_1": 1}
        for _ in range(2):
            await take(heir, limited(3))
        await refused(heir, limited(3))


async def test_leases_of_the_dead_are_forgotten(shop: Shop, store: Store) -> None:
    other = await shop.open(lock_wait_s=5)
    await take(other, limited(3))
    shop.clock.now_ms += int(LEASE_S * 1000) + 60_000
    await store.forget()
    assert leased(shop) == {"key_1": 1}
    shop.clock.now_ms += 1
    await store.forget()
    assert leased(shop) == {}
    await other.close()


async def test_without_the_store_a_request_that_needs_it_is_refused_and_what_is_leased_is_had(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what could not be written is written later."""
    caller = limited(1)
    await take(store, caller)

    async def away(write: Any) -> Any:
        raise StoreUnavailable("away")

    with monkeypatch.context() as without:
        without.setattr(store.slots, "_write", away)
        store.slots.give_back(caller)
        assert store.slots.take_now(caller, ends_ms(store))
        with pytest.raises(StoreUnavailable):
            await take(store, limited(1, key_id="key_2"))
        store.slots.give_back(caller)
        shop.clock.skipped_s += IDLE_S + 1
        with pytest.raises(StoreUnavailable):
            await store.slots._look()
    assert leased(shop) == {"key_1": 1}
    await store.slots._look()
    assert (leased(shop), store.slots._places) == ({}, {})


# -- keys --------------------------------------------------------------------------------------------------------------


async def caller_of(store: Store, made: tuple[Key, str]) -> Caller:
    await store.changes.look()
    found = await store.keys.find(made[1])
    assert found is not None
    return found


async def test_children_share_the_requests_at_one_time(shop: Shop, store: Store) -> None:
    """Of each key above them, and have a limit of their own that counts against nobody else."""
    keys, both = shop.books.keys, ("embeddings", "keys")
    parent = keys.create("a", both, limits=Limits(concurrency=3))
    free = keys.create_below(parent[0].key_id, both, limits=Limits(concurrency=3))
    one = keys.create_below(free[0].key_id, both, limits=Limits(concurrency=1))
    callers = [await caller_of(store, made) for made in (parent, free, one)]
    assert [[each.limit for each in caller.slots] for caller in callers] == [[3], [3, 3], [1, 3, 3]]
    assert [[each.above for each in caller.slots] for caller in callers] == [
        [False],
        [False, True],
        [False, True, True],
    ]
    await take(store, callers[2])
    assert (await refused(store, callers[2])).message.startswith("This API key has 1 requests")
    await take(store, callers[1])
    await take(store, callers[0])
    for caller, whose in zip(callers[:2], ("This API key", "The API key that this one draws from"), strict=True):
        assert (await refused(store, caller)).message.startswith(f"{whose} has 3 requests")


async def rotated(shop: Shop, store: Store, made: tuple[Key, str], times: int) -> Sequence[Caller]:
    """The key and those that took its place, the newest last."""
    all_made = [made]
    for _ in range(times):
        all_made.append(shop.books.keys.rotate(all_made[-1][0].key_id, overlap_s=1_000))
    return [await caller_of(store, each) for each in all_made]


async def test_a_rotated_key_and_the_new_one_share_their_slots(shop: Shop, store: Store) -> None:
    """What was under way before the rotation, too: rotating multiplies nothing."""
    made = shop.books.keys.create("a", ["embeddings"], limits=Limits(concurrency=2))
    before = await caller_of(store, made)
    await take(store, before)
    callers = await rotated(shop, store, made, 2)
    assert [caller.slots for caller in callers] == [(SlotLimit(made[0].key_id, 2),)] * 3
    await take(store, callers[2])
    for caller in callers:
        await refused(store, caller)
    store.slots.give_back(before)
    await take(store, callers[0])
    await refused(store, callers[2])
    shop.assert_right()


async def test_the_newest_keys_limit_counts_for_those_whose_place_it_took(shop: Shop, store: Store) -> None:
    made = shop.books.keys.create("a", ["embeddings", "keys"], limits=Limits(concurrency=2))
    child = shop.books.keys.create_below(made[0].key_id, ["embeddings"], limits=Limits(concurrency=2))
    *_, newest = await rotated(shop, store, made, 2)
    for limit in (5, None):
        shop.books.keys.change(newest.key_id, limits=Limits(concurrency=limit))
        expected = (SlotLimit(made[0].key_id, limit),) if limit is not None else ()
        assert (await caller_of(store, made)).slots == expected
        found = (await caller_of(store, child)).slots
        assert found[0] == SlotLimit(child[0].key_id, 2)
        assert [each.limit for each in found[1:]] == ([limit] if limit is not None else [])
