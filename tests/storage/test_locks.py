"""Locks in the store: opened with their money, used once at whatever gateway, released in time if nobody uses them."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

import msgspec
import pytest

from embedmesh.rules.confidential import LockState, LockTerms
from embedmesh.rules.errors import Failure, InsufficientQuota, InternalError, RateLimited, StoreUnavailable
from embedmesh.rules.holds import Claim, Hold, PriorRequest, StreamNote
from embedmesh.rules.limits import IDEMPOTENCY_KEY_S, LOCKS_OF_ACCOUNT_MAX, LOCKS_OF_KEY_MAX
from embedmesh.rules.lock_failures import LockExpired, LockNotFound, LockUsed
from embedmesh.rules.money import cost_nanousd
from embedmesh.storage.books.reports import ExplainedLock
from embedmesh.storage.db import refusals
from embedmesh.storage.ledger.end_hold import EXPIRED_HOLDS_MAX, Expire
from embedmesh.storage.ledger.lost_holds import LostHolds
from embedmesh.storage.ledger.open_lock import OpenLock
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.redeem_lock import RedeemLock, Redemption
from embedmesh.storage.ledger.writes import WaitedWrite
from embedmesh.storage.sql import LOCKS_SQL
from embedmesh.storage.sqlite.driver import driver as sqlite
from embedmesh.storage.store import Store
from embedmesh.storage.upkeep import UNUSED_LOCK_S
from tests.storage.shop import Shop, charge

BODY, OTHER_BODY = b"b" * 32, b"c" * 32
REPLY = b"a sealed reply"
LASTS_MS, REQUEST_MS = 30_000, 90_000
UNITS, PRICE = 100, 1_000_000  # a hundred nano-USD
MONEY = 100_000

Lock = tuple[LockTerms, Hold]


@pytest.fixture
async def stores(shop: Shop) -> AsyncIterator[list[Store]]:
    """Two gateways of one store."""
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(2):
            opened.append(store := await shop.open(lock_wait_s=5))
            stack.push_async_callback(store.close)
        yield opened


def new_lock(shop: Shop, key_id: str = "key_1", *, account_id: str = "a", lasts_ms: int = LASTS_MS) -> Lock:
    """A lock that was not opened yet."""
    hold = shop.new_hold(cost_nanousd(UNITS, PRICE), key_id, account_id=account_id)
    hold = msgspec.structs.replace(hold, deadline_ms=shop.clock.now_ms + lasts_ms)
    terms = LockTerms(
        lock_id=2**49 + int(hold.hold_id.removeprefix("req_")),
        account_id=account_id,
        key_id=key_id,
        hold_id=hold.hold_id,
        node_id="node_1",
        identity=b"i" * 32,
        node_key=b"n" * 32,
        scheme="hpke-1",
        model="m",
        units=UNITS,
        price=PRICE,
        expires_ms=hold.deadline_ms,
    )
    return terms, hold


async def open_lock(shop: Shop, store: Store, key_id: str = "key_1", **more: Any) -> LockTerms:
    terms, hold = new_lock(shop, key_id, **more)
    await store.locks.open(terms, hold)
    return terms


async def open_all(store: Store, locks: Sequence[Lock]) -> None:
    """Some at a time: none waits longer than a hold may."""
    for at in range(0, len(locks), LOCKS_OF_KEY_MAX):
        await asyncio.gather(*(store.locks.open(*lock) for lock in locks[at : at + LOCKS_OF_KEY_MAX]))


async def redeem(shop: Shop, store: Store, terms: LockTerms, body: bytes = BODY) -> Hold | PriorRequest:
    found = await store.locks.find(terms.account_id, terms.lock_id)
    return await store.locks.redeem(found, body, shop.clock.now_ms + REQUEST_MS)


async def redeemed(shop: Shop, store: Store, terms: LockTerms, body: bytes = BODY) -> Hold:
    hold = await redeem(shop, store, terms, body)
    assert isinstance(hold, Hold)
    return hold


# -- the life of a lock --------------------------------------------------------------------------------------------


async def test_a_lock_sets_money_aside_and_is_found_at_every_gateway(shop: Shop, stores: list[Store]) -> None:
    """As it was opened, by its own account alone."""
    shop.credit(MONEY)
    terms = await open_lock(shop, stores[0])
    assert shop.money() == (MONEY, 100)
    assert [(await store.locks.find("a", terms.lock_id)).terms for store in stores] == [terms, terms]
    for account_id, lock_id in (("b", terms.lock_id), ("a", terms.lock_id + 1), ("a", 2**70), ("a", -1), ("a", 0)):
        with pytest.raises(LockNotFound):
            await stores[1].locks.find(account_id, lock_id)
    assert stores[0].stats.locks_opened == stores[0].stats.holds == 1
    shop.assert_right()


async def test_a_request_at_another_gateway_uses_it_once(shop: Shop, stores: list[Store]) -> None:
    """It gets the hold, with a deadline of its own; what is charged and kept is as for every request."""
    shop.credit(MONEY)
    terms = await open_lock(shop, stores[0])
    hold = await redeemed(shop, stores[1], terms)
    assert hold == Hold(terms.hold_id, "a", 100, shop.clock.now_ms + REQUEST_MS, "key_1")
    assert shop.money() == (MONEY, 100)
    assert stores[1].stats.locks_used == 1
    for store in stores:
        assert await redeem(shop, store, terms) == PriorRequest(BODY, hold.hold_id, "open", None)
        with pytest.raises(LockUsed):
            await redeem(shop, store, terms, OTHER_BODY)
    shop.clock.now_ms += LASTS_MS + 1  # the lock's time is over, the request's is not
    assert await stores[0].expire(shop.clock.now_ms) == 0
    stores[1].capture(hold, charge(70), REPLY)
    await stores[1].drain()
    assert shop.money() == (MONEY - 70, 0)
    for store in stores:
        assert await redeem(shop, store, terms) == PriorRequest(BODY, hold.hold_id, "captured", REPLY)
        with pytest.raises(LockUsed, match="Another request"):
            await redeem(shop, store, terms, OTHER_BODY)
        assert (await store.locks.find("a", terms.lock_id)).terms == terms
    shop.assert_right()


async def test_a_request_that_came_to_nothing_has_used_its_lock_up(shop: Shop, store: Store) -> None:
    """The same request again hears that it has to lock again; the money is free."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    store.release(await redeemed(shop, store, terms))
    await store.drain()
    assert shop.money() == (MONEY, 0)
    for body, words in ((BODY, "failed, for which nothing was charged. Lock again"), (OTHER_BODY, "Another request")):
        with pytest.raises(LockUsed, match=words):
            await redeem(shop, store, terms, body)
    shop.assert_right()


@pytest.mark.parametrize("swept", [False, True])
async def test_a_lock_that_is_not_used_in_time_is_released(shop: Shop, store: Store, swept: bool) -> None:
    """Used a millisecond before its end it is good; at its end it is not, whether the sweep has come by or not."""
    shop.credit(MONEY)
    terms, in_time = await open_lock(shop, store), await open_lock(shop, store)
    shop.clock.now_ms = terms.expires_ms - 1
    await redeemed(shop, store, in_time)
    shop.clock.now_ms += 1
    if swept:
        assert await store.expire(terms.expires_ms + 1) == 1
        assert shop.money() == (MONEY, 100)
    with pytest.raises(LockExpired, match="its money is free again"):
        await redeem(shop, store, terms)
    assert (await store.locks.find("a", terms.lock_id)).terms == terms
    shop.assert_right()


async def test_a_lock_of_another_account_is_none(shop: Shop, store: Store) -> None:
    """Also for one who has its terms."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    with pytest.raises(LockNotFound):
        await redeem(shop, store, msgspec.structs.replace(terms, account_id="b"))
    await redeemed(shop, store, terms)


async def test_without_money_there_is_no_lock(shop: Shop, store: Store) -> None:
    """No row, no claim: the same id may be had later. Whoever is looked up first has the money."""
    shop.credit(150)
    locks = [new_lock(shop) for _ in range(3)]
    outcomes = await asyncio.gather(*(store.locks.open(*lock) for lock in locks), return_exceptions=True)
    without = [lock for lock, outcome in zip(locks, outcomes, strict=True) if isinstance(outcome, InsufficientQuota)]
    assert (len(without), outcomes.count(None)) == (2, 1), outcomes
    for terms, _ in without:
        with pytest.raises(LockNotFound):
            await store.locks.find("a", terms.lock_id)
    assert shop.money() == (150, 100)
    shop.credit(100)
    await store.locks.open(*without[0])
    await redeemed(shop, store, without[0][0])
    shop.assert_right()


async def test_the_same_id_cannot_be_opened_twice(shop: Shop, store: Store) -> None:
    """Nothing is held for the second."""
    shop.credit(MONEY)
    first, (second, hold) = await open_lock(shop, store), new_lock(shop)
    for held in (100, 0):
        with pytest.raises(InternalError):
            await store.locks.open(msgspec.structs.replace(second, lock_id=first.lock_id), hold)
        assert shop.money() == (MONEY, held)
        await store.expire(first.expires_ms + 1)
    assert (store.stats.locks_expired, store.stats.expired) == (1, 0), "that is nobody's fault"
    shop.assert_right()


# -- bounds --------------------------------------------------------------------------------------------------------


async def test_a_key_has_so_many_unused_locks_and_no_more(shop: Shop, stores: list[Store]) -> None:
    """Over all gateways, however many come at once; who is refused hears when the first ends, and holds nothing."""
    shop.credit(MONEY)
    first = await open_lock(shop, stores[0], lasts_ms=12_500)
    more = [new_lock(shop) for _ in range(LOCKS_OF_KEY_MAX + 20)]
    opening = (stores[number % 2].locks.open(*lock) for number, lock in enumerate(more))
    outcomes = await asyncio.gather(*opening, return_exceptions=True)
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert len(refused) == 21
    for outcome in refused:
        assert isinstance(outcome, RateLimited) and outcome.retry_after_s == 12.5
        assert f"A key may have {LOCKS_OF_KEY_MAX} unused locks" in outcome.message
    assert shop.money() == (MONEY, LOCKS_OF_KEY_MAX * 100)
    await open_lock(shop, stores[0], "key_2")
    writes = stores[0].stats.writes
    with pytest.raises(RateLimited):
        await open_lock(shop, stores[0])
    assert stores[0].stats.writes == writes, "what is refused is cheap"
    await redeemed(shop, stores[1], first)
    await open_lock(shop, stores[0])
    with pytest.raises(RateLimited):
        await open_lock(shop, stores[1])
    shop.clock.now_ms += LASTS_MS
    await open_lock(shop, stores[1])
    shop.assert_right()


async def test_an_account_has_so_many_unused_locks_whatever_keys_it_has(shop: Shop, store: Store) -> None:
    """Another account is not bothered."""
    shop.credit(MONEY)
    locks = [new_lock(shop, f"key_{number // LOCKS_OF_KEY_MAX}") for number in range(LOCKS_OF_ACCOUNT_MAX)]
    await open_all(store, locks)
    with pytest.raises(RateLimited, match=f"An account may have {LOCKS_OF_ACCOUNT_MAX} unused locks"):
        await open_lock(shop, store, "key_new")
    shop.books.accounts.create("b")
    shop.books.accounts.credit("b", MONEY, "of b")
    await open_lock(shop, store, account_id="b")
    shop.assert_right()


async def test_a_lock_of_which_nobody_has_heard_is_dropped(shop: Shop, stores: list[Store]) -> None:
    """It was never there, at no gateway: its money is free, its place among the key's locks, and its id."""
    shop.credit(MONEY)
    locks = [new_lock(shop) for _ in range(LOCKS_OF_KEY_MAX)]
    await open_all(stores[0], locks)
    stores[0].locks.drop(locks[0][0])
    await stores[0].drain()
    assert shop.money() == (MONEY, 100 * (LOCKS_OF_KEY_MAX - 1))
    for store in stores:
        with pytest.raises(LockNotFound):
            await store.locks.find("a", locks[0][0].lock_id)
    terms, hold = new_lock(shop)
    await stores[1].locks.open(msgspec.structs.replace(terms, lock_id=locks[0][0].lock_id), hold)
    assert stores[0].stats.released == 1
    shop.assert_right()


async def test_one_batch_redeems_a_lock_and_opens_the_next(shop: Shop, store: Store) -> None:
    """A key that has as many as it may, less one, goes on from lock to lock."""
    shop.credit(MONEY)
    locks = [new_lock(shop) for _ in range(LOCKS_OF_KEY_MAX - 1)]
    await open_all(store, locks)
    terms = locks[0][0]
    for _ in range(3):
        following, hold = new_lock(shop)
        found = await store.locks.find("a", terms.lock_id)
        await store.drain()
        commits = store.stats.commits
        opening = asyncio.ensure_future(store.locks.open(following, hold))
        await asyncio.sleep(0)
        mine = await store.locks.redeem(found, BODY, shop.clock.now_ms + REQUEST_MS)
        await opening
        assert isinstance(mine, Hold)
        assert store.stats.commits <= commits + 2, "one on SQLite; a server is asked in a thread before"
        store.release(mine)
        terms = following
    await store.drain()
    assert shop.money() == (MONEY, 100 * (LOCKS_OF_KEY_MAX - 1))
    shop.assert_right()


async def test_a_find_tells_of_use_and_of_replies_that_are_kept(shop: Shop, store: Store) -> None:
    """One statement has it all: what a redemption would say, too."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    found = await store.locks.find("a", terms.lock_id)
    assert (found.terms, found.kept_bytes, found.is_free(shop.clock.now_ms)) == (terms, 0, True)
    assert not found.is_free(terms.expires_ms)
    hold = await redeemed(shop, store, terms)
    assert not (await store.locks.find("a", terms.lock_id)).is_free(shop.clock.now_ms)
    with pytest.raises(LockUsed):
        await store.locks.redeem(found, OTHER_BODY, shop.clock.now_ms + REQUEST_MS)  # what was found is old
    prior = await store.locks.redeem(found, BODY, shop.clock.now_ms + REQUEST_MS)
    assert prior == PriorRequest(BODY, terms.hold_id, "open", None)
    store.capture(hold, charge(70), REPLY)
    await store.drain()
    found = await store.locks.find("a", terms.lock_id)
    assert found.kept_bytes > 0
    prior = await store.locks.redeem(found, BODY, shop.clock.now_ms + REQUEST_MS)
    assert prior == PriorRequest(BODY, terms.hold_id, "captured", REPLY)
    shop.assert_right()


async def test_locks_of_which_nobody_heard_do_not_count(shop: Shop, store: Store) -> None:
    """Their callers left while they were opened: nothing is left of them."""
    shop.credit(MONEY)
    locks = [new_lock(shop) for _ in range(LOCKS_OF_KEY_MAX)]
    tasks = [asyncio.ensure_future(store.locks.open(*lock)) for lock in locks]
    while not store._writer._batch:
        await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await store.drain()
    assert shop.money() == (MONEY, 0)
    with shop.by_hand() as db:
        assert db.execute("SELECT * FROM locks").fetchall() == db.execute("SELECT * FROM claims").fetchall() == []
    await open_lock(shop, store)
    shop.assert_right()


# -- at the same moment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("same_body", [False, True])
async def test_of_requests_that_come_at_the_same_moment_one_has_the_lock(
    shop: Shop, stores: list[Store], same_body: bool
) -> None:
    """At one gateway and at two, round after round; the others hear of it."""
    shop.credit(MONEY)
    for round_ in range(20):
        terms = await open_lock(shop, stores[round_ % 2])
        bodies = [BODY if same_body else bytes([number]) * 32 for number in range(1, 9)]
        asking = (redeem(shop, stores[number % 2], terms, body) for number, body in enumerate(bodies))
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        (won,) = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Hold)]
        others = [outcome for number, outcome in enumerate(outcomes) if number != won]
        if same_body:
            assert others == [PriorRequest(BODY, terms.hold_id, "open", None)] * 7
        else:
            assert {type(outcome) for outcome in others} == {LockUsed}
        assert await redeem(shop, stores[0], terms, bodies[won]) == PriorRequest(
            bodies[won], terms.hold_id, "open", None
        )
        hold = outcomes[won]
        assert isinstance(hold, Hold)
        stores[won % 2].capture(hold, charge(5))
        await stores[won % 2].drain()
    assert shop.money() == (MONEY - 20 * 5, 0)
    shop.assert_right()


async def test_a_sweep_never_takes_the_hold_of_a_request(shop: Shop, stores: list[Store]) -> None:
    """One gateway's clock is late, another sweeps at that moment: the lock is used, or released, and never both."""
    shop.credit(MONEY)
    seen = set()
    for _ in range(40):
        terms = await open_lock(shop, stores[0])

        async def sweep(terms: LockTerms = terms) -> None:
            await asyncio.sleep(random.random() * 0.004)
            await stores[1].expire(terms.expires_ms + 1)

        outcome, _ = await asyncio.gather(outcome_of(redeem(shop, stores[0], terms)), sweep())
        told = shop.books.reports.explain(terms.hold_id)
        if isinstance(outcome, Hold):
            assert (told.state, told.deadline_ms) == ("open", outcome.deadline_ms)
            stores[0].release(outcome)
        else:
            assert isinstance(outcome, LockExpired)
            assert (told.state, told.ended_by, told.deadline_ms) == ("released", "expire", terms.expires_ms)
        seen.add(type(outcome))
        await stores[0].drain()
    assert shop.money() == (MONEY, 0)
    assert Hold in seen
    shop.assert_right()


async def test_a_hold_that_was_taken_over_since_it_was_found_overdue_stays(shop: Shop, store: Store) -> None:
    """PostgreSQL finds what is overdue before it has the account's lock."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    await redeemed(shop, store, terms)

    class FoundBefore(Expire):
        def prepare(self, db: Any, now_ms: int) -> set[str]:
            self._overdue = LostHolds([(terms.hold_id, "a", 1, terms.expires_ms, None, None)])
            return {"a"}

    store._writer.submit(sweep := FoundBefore(terms.expires_ms + 1))
    await sweep.outcome
    assert shop.money() == (MONEY, 100)
    assert store.stats.expired == 0


# -- callers that leave, stores that fail ------------------------------------------------------------------------------


async def outcome_of(work: Awaitable[Any]) -> object:
    """Its result, or what it raises."""
    outcomes: Sequence[object] = await asyncio.gather(work, return_exceptions=True)
    return outcomes[0]


async def cancelled_after(turns: int, work: Awaitable[Any]) -> object:
    """What came of work that is cancelled after some turns of the event loop."""
    task = asyncio.ensure_future(work)
    for _ in range(turns):
        await asyncio.sleep(0)
    if turns > 12:
        await asyncio.sleep(0.0003 * (turns - 12))
    task.cancel()
    return await outcome_of(task)


async def test_a_caller_that_leaves_while_a_lock_is_opened_leaves_nothing(shop: Shop, store: Store) -> None:
    """At any moment: either it has the lock, or nothing is held."""
    shop.credit(MONEY)
    opened = 0
    for turns in range(24):
        terms, hold = new_lock(shop)
        outcome = await cancelled_after(turns, store.locks.open(terms, hold))
        await store.drain()
        if outcome is None:
            opened += 1
            store.release(hold)
            await store.drain()
        assert shop.money() == (MONEY, 0), turns
    assert opened < 24
    shop.assert_right()


async def test_a_caller_that_leaves_while_it_redeems_a_lock_leaves_no_hold(shop: Shop, store: Store) -> None:
    """The lock is used up, or as it was: and then it ends in time."""
    shop.credit(MONEY)
    seen = set()
    for turns in range(24):
        terms = await open_lock(shop, store)
        outcome = await cancelled_after(turns, redeem(shop, store, terms))
        await store.drain()
        if isinstance(outcome, Hold):
            store.release(outcome)
            seen.add("redeemed")
        else:
            told = shop.books.reports.explain(terms.hold_id)
            assert told.lock is not None
            used = told.lock.used_ms is not None
            assert told.state == ("released" if used else "open"), turns
            seen.add("used up" if used else "as it was")
            if not used:
                store.release(await redeemed(shop, store, terms))
        await store.drain()
        assert shop.money() == (MONEY, 0)
    assert "as it was" in seen
    shop.assert_right()


@pytest.mark.parametrize("doing", ["hold", "open", "redeem"])
async def test_a_caller_that_leaves_before_it_hears_has_nothing(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, doing: str
) -> None:
    """It is durable, and its task is cancelled before it runs again."""
    shop.credit(MONEY)
    terms, hold = new_lock(shop)
    if doing == "redeem":
        await store.locks.open(terms, hold)
    kind: type[WaitedWrite[Any]] = {"hold": PlaceHold, "open": OpenLock, "redeem": RedeemLock}[doing]
    committed = kind.committed
    tasks: list[asyncio.Task[Any]] = []

    def and_leave(write: Any, stats: Any) -> None:
        committed(write, stats)
        tasks[0].cancel()

    monkeypatch.setattr(kind, "committed", and_leave)
    released = store.stats.released
    begin: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "hold": lambda: store.hold(hold),
        "open": lambda: store.locks.open(terms, hold),
        "redeem": lambda: redeem(shop, store, terms),
    }
    tasks.append(asyncio.ensure_future(begin[doing]()))
    assert isinstance(await outcome_of(tasks[0]), asyncio.CancelledError)
    await store.drain()
    assert shop.money() == (MONEY, 0)
    assert store.stats.released == released + 1
    with pytest.raises(LockUsed if doing == "redeem" else LockNotFound):
        await redeem(shop, store, terms)
    shop.assert_right()


async def test_who_has_gone_keeps_no_other_of_the_batch_from_a_lock(shop: Shop, store: Store) -> None:
    shop.credit(MONEY)
    locks = [new_lock(shop) for _ in range(6)]
    tasks = [asyncio.ensure_future(store.locks.open(*lock)) for lock in locks]
    await asyncio.sleep(0)
    for task in tasks[::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    await store.drain()
    assert [outcome is None for outcome in outcomes] == [False, True] * 3
    assert shop.money() == (MONEY, 300)
    assert store.stats.locks_opened - store.stats.released == 3
    using = [asyncio.ensure_future(redeem(shop, store, terms)) for terms, _ in locks[1::2]]
    await asyncio.gather(*using)
    assert store.stats.locks_used == 3
    shop.assert_right()


async def test_what_is_known_costs_no_write(shop: Shop, store: Store) -> None:
    """A lock that was used, has ended, or is another's, however often it is asked for."""
    shop.credit(MONEY)
    used, ended = await open_lock(shop, store), await open_lock(shop, store)
    store.capture(await redeemed(shop, store, used), charge(10), REPLY)
    await store.drain()
    shop.clock.now_ms = ended.expires_ms
    writes = store.stats.writes
    for terms, body in ((used, BODY), (used, OTHER_BODY), (ended, BODY), (new_lock(shop)[0], BODY)):
        await outcome_of(redeem(shop, store, terms, body))
    assert store.stats.writes == writes


def fail_once(store: Store, monkeypatch: pytest.MonkeyPatch, *, durable: bool) -> None:
    """The next batch fails, and nobody knows whether it is durable."""
    medium = store._writer._medium
    write: Callable[..., Awaitable[None]] = medium.write
    failed: list[bool] = []

    async def failing(batch: Any, *, patient: bool) -> None:
        if failed:
            return await write(batch, patient=patient)
        failed.append(True)
        if durable:
            await write(batch, patient=patient)
        else:
            batch.writes += batch._queue
            for each in batch.writes:
                each._tried = True
            batch._queue.clear()
        raise sqlite.OperationalError("nobody knows")

    monkeypatch.setattr(medium, "write", failing)


async def healthy(store: Store) -> None:
    async with asyncio.timeout(5):
        while not store.healthy():
            await asyncio.sleep(0.01)
    await store.drain()


@pytest.mark.parametrize("durable", [False, True])
async def test_a_request_that_does_not_hear_whether_it_has_the_lock_has_no_hold(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """If it had it, that is given up; if not, the lock is as good as before."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    fail_once(store, monkeypatch, durable=durable)
    with pytest.raises(StoreUnavailable):
        await redeem(shop, store, terms)
    await healthy(store)
    if durable:
        assert shop.money() == (MONEY, 0)
        with pytest.raises(LockUsed, match="Lock again"):
            await redeem(shop, store, terms)
    else:
        assert shop.money() == (MONEY, 100)
        await redeemed(shop, store, terms)
    shop.assert_right()


@pytest.mark.parametrize("durable", [False, True])
async def test_a_retry_whose_batch_fails_does_not_end_the_request_that_has_the_lock(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    """It gives up its own use only."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    hold = await redeemed(shop, store, terms)
    fail_once(store, monkeypatch, durable=durable)
    again = RedeemLock(Redemption(terms, "use_2", BODY, hold.deadline_ms), "gw", store._writer.submit)
    store._writer.submit(again)
    with pytest.raises(StoreUnavailable):
        await again.outcome
    await healthy(store)
    assert shop.money() == (MONEY, 100)
    store.capture(hold, charge(60), REPLY)
    await store.drain()
    assert shop.money() == (MONEY - 60, 0)
    shop.assert_right()


@pytest.mark.parametrize("durable", [False, True])
async def test_a_lock_of_which_nobody_heard_is_given_back(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, durable: bool
) -> None:
    shop.credit(MONEY)
    fail_once(store, monkeypatch, durable=durable)
    terms, hold = new_lock(shop)
    with pytest.raises(StoreUnavailable):
        await store.locks.open(terms, hold)
    await healthy(store)
    assert shop.money() == (MONEY, 0)
    shop.assert_right()


async def test_unused_locks_outlive_their_gateway(shop: Shop) -> None:
    """Its requests do not: what they had is released when it comes back."""
    shop.credit(MONEY)
    before = await shop.open()
    unused, used = await open_lock(shop, before), await open_lock(shop, before)
    await redeemed(shop, before, used)
    await before.close()
    after = await shop.open()
    assert after.stats.recovered == 1
    assert shop.money() == (MONEY, 100)
    with pytest.raises(LockUsed, match="Lock again"):
        await redeem(shop, after, used)
    await redeemed(shop, after, unused)
    await after.close()
    shop.assert_right()


# -- what is kept, and for how long ----------------------------------------------------------------------------------


async def test_locks_are_forgotten(shop: Shop, store: Store) -> None:
    """Those that nobody used, an hour after their end; the others with the reply that is kept, after a day."""
    shop.credit(MONEY)
    unused, used = await open_lock(shop, store), await open_lock(shop, store)
    store.capture(await redeemed(shop, store, used), charge(10), REPLY)
    await store.hold(shop.new_hold(1), Claim(b"k" * 32, BODY))
    await store.drain()
    shop.clock.now_ms = unused.expires_ms + UNUSED_LOCK_S * 1000
    assert await store.forget() == 0
    shop.clock.now_ms += 1
    assert await store.forget() == 0, "its hold is open"
    await store.expire(shop.clock.now_ms)
    assert await store.forget() == 1
    shop.assert_right()
    with pytest.raises(LockNotFound):
        await redeem(shop, store, unused)
    assert await redeem(shop, store, used) == PriorRequest(BODY, used.hold_id, "captured", REPLY)
    shop.clock.now_ms += IDEMPOTENCY_KEY_S * 1000
    assert await store.forget() == 2
    assert await store.kept_bytes("a") == 0
    with pytest.raises(LockNotFound):
        await redeem(shop, store, used)
    with shop.by_hand() as db:
        assert db.execute("SELECT * FROM claims").fetchall() == db.execute("SELECT * FROM locks").fetchall() == []
    shop.assert_right()


async def test_a_lock_is_explained(shop: Shop, store: Store) -> None:
    """By its own number, and by that of its request."""
    shop.credit(MONEY)
    terms = await open_lock(shop, store)
    lock = ExplainedLock(terms.lock_id, "node_1", "hpke-1", "m", UNITS, PRICE, terms.expires_ms, None)
    told = shop.books.reports.explain(str(terms.lock_id))
    assert told == shop.books.reports.explain(terms.hold_id)
    assert (told.request_id, told.state, told.held, told.lock) == (terms.hold_id, "open", 100, lock)
    shop.clock.now_ms += 5
    hold = await redeemed(shop, store, terms)
    store.capture(hold, charge(60))
    await store.drain()
    told = shop.books.reports.explain(str(terms.lock_id))
    assert told.lock == msgspec.structs.replace(lock, used_ms=shop.clock.now_ms)
    assert (told.state, told.captured, told.gateway) == ("captured", 60, store._opened.instance.name)
    for unknown in (str(terms.lock_id + 1), "9" * 18, "9" * 30):
        with pytest.raises(Failure, match=r"knows no (lock|request)"):
            shop.books.reports.explain(unknown)


async def test_whatever_has_no_lock_is_explained_without(shop: Shop, store: Store) -> None:
    shop.credit(MONEY)
    hold = shop.new_hold(10)
    await store.hold(hold)
    assert shop.books.reports.explain(hold.hold_id).lock is None


TAMPERING = [
    ("UPDATE holds SET owner = 'me' WHERE hold_id = :unused", "keeps its terms"),
    ("UPDATE holds SET deadline_ms = deadline_ms + 1 WHERE hold_id = :unused", "keeps its terms"),
    ("UPDATE holds SET deadline_ms = deadline_ms + 1 WHERE hold_id = :used", "keeps its terms"),
    ("UPDATE holds SET owner = 'me' WHERE hold_id = :used", "keeps its terms"),
    ("UPDATE holds SET owner = 'me' WHERE hold_id = :plain", "keeps its terms"),
    ("UPDATE locks SET used_ms = NULL, used_by = NULL WHERE hold_id = :used", "used once"),
    ("UPDATE locks SET used_by = 'me' WHERE hold_id = :used", "used once"),
    ("UPDATE locks SET used_ms = 1, used_by = 'me' WHERE hold_id = :ended", "used once"),
    ("UPDATE locks SET used_ms = 1 WHERE hold_id = :unused", "CHECK|check"),
    ("UPDATE locks SET used_ms = expires_ms, used_by = 'me' WHERE hold_id = :unused", "CHECK|check"),
    ("UPDATE locks SET units = 1 WHERE hold_id = :unused", "a lock keeps its terms"),
    ("UPDATE locks SET hold_id = :plain WHERE hold_id = :unused", "a lock keeps its terms"),
    ("UPDATE locks SET node_key = identity WHERE hold_id = :unused", "a lock keeps its terms"),
    ("DELETE FROM locks WHERE hold_id = :unused", "until its hold has ended"),
    ("DELETE FROM locks WHERE hold_id = :used", "until its hold has ended"),
    ("INSERT INTO locks SELECT {1, :ended} FROM locks WHERE hold_id = :ended", "opened with an open hold"),
    ("INSERT INTO locks SELECT {1, 'none'} FROM locks WHERE hold_id = :ended", "opened with an open hold"),
    ("INSERT INTO locks SELECT {1, :plain} FROM locks WHERE hold_id = :ended", "opened with an open hold"),
    ("INSERT INTO locks SELECT {1, hold_id} FROM locks WHERE hold_id = :unused", "UNIQUE|unique"),
]


@pytest.mark.parametrize(("statement", "says"), TAMPERING)
async def test_no_shell_can_change_what_was_agreed(shop: Shop, store: Store, statement: str, says: str) -> None:
    """The schema refuses it, in words; only the use of a lock gives its hold to another."""
    shop.credit(MONEY)
    unused, used, ended = [await open_lock(shop, store) for _ in range(3)]
    await redeemed(shop, store, used)
    store.release(new_hold_of(ended))
    plain = shop.new_hold(1, "key_1")
    await store.hold(plain)
    await store.drain()
    holds = {"unused": unused.hold_id, "used": used.hold_id, "ended": ended.hold_id, "plain": plain.hold_id}
    copied = (
        "account_id, key_id, node_id, identity, node_key, scheme, model, units, price, expires_ms, created_ms, NULL, "
        "NULL"
    )
    statement = statement.replace("}", f", {copied}").replace("{", "")
    with shop.by_hand() as db, pytest.raises(refusals(), match=says):
        db.execute(statement, {name: value for name, value in holds.items() if f":{name}" in statement})
    shop.assert_right()


def new_hold_of(terms: LockTerms) -> Hold:
    """The hold with which a lock was opened."""
    return Hold(terms.hold_id, terms.account_id, 100, terms.expires_ms, terms.key_id)


@pytest.mark.parametrize(
    ("units", "price", "amount"),
    [
        (1, 1, 1),
        (1_000_000, 3, 3),
        (1_000_001, 3, 4),
        (300_000, 10**15, 3 * 10**14),
        (10**9, 10**15 - 1, 10**18 - 1_000),
    ],
)
async def test_what_a_lock_covers_is_its_money_to_the_nano_dollar(
    shop: Shop, store: Store, units: int, price: int, amount: int
) -> None:
    """As the rules round it, also where the product does not fit 64 bits; a nano-dollar less is refused."""
    assert cost_nanousd(units, price) == amount
    shop.credit(2 * 10**18)
    for less in (0, 1):
        terms, hold = new_lock(shop)
        terms = msgspec.structs.replace(terms, units=units, price=price)
        opening = store.locks.open(terms, msgspec.structs.replace(hold, amount_nanousd=amount - less))
        if less:
            with pytest.raises(InternalError):
                await opening
        else:
            await opening
    assert shop.money()[1] == amount
    shop.assert_right()


# -- many ------------------------------------------------------------------------------------------------------------


async def test_many_abandoned_locks_are_all_released_at_once(shop: Shop, store: Store) -> None:
    """Several turns of the sweep, in one go; others lock meanwhile. `make locks` tries ten thousand."""
    accounts = ["a", "b", "c"]
    for account in accounts[1:]:
        shop.books.accounts.create(account)
        shop.books.accounts.credit(account, MONEY, f"of {account}")
    shop.credit(MONEY)
    locks = [
        new_lock(shop, f"{account}_{number // LOCKS_OF_KEY_MAX}", account_id=account)
        for account in accounts
        for number in range(LOCKS_OF_ACCOUNT_MAX)
    ]
    assert len(locks) > 2 * EXPIRED_HOLDS_MAX
    await open_all(store, locks)
    shop.clock.now_ms += LASTS_MS + 1
    expired, terms = await asyncio.gather(store.expire(shop.clock.now_ms), open_lock(shop, store))
    assert expired == len(locks)
    assert shop.money() == (MONEY, 100)
    await redeemed(shop, store, terms)
    for account in accounts[1:]:
        assert shop.books.accounts.find(account).held_nanousd == 0
    shop.assert_right()


def test_the_terms_of_a_lock_are_those_of_its_row() -> None:
    """The statement names them in the order of the struct."""
    *named, _kept_bytes = re.findall(r"[a-z_]+\.([a-z_]+)", LOCKS_SQL["find_lock"].partition("FROM")[0])
    assert named == [*(field.name for field in msgspec.structs.fields(LockTerms)), *LockState._fields]


@pytest.mark.parametrize("ends", ["expire", "start again", "capture"])
async def test_a_sealed_stream_is_extended_and_charged_at_its_last_note(shop: Shop, ends: str) -> None:
    """A lock's hold is as any other once it is used: it outlives its deadline, and a gateway that died."""
    shop.credit(MONEY)
    store = await shop.open()
    hold = await redeemed(shop, store, await open_lock(shop, store))
    until_ms = shop.clock.now_ms + 2 * REQUEST_MS
    assert await store.extend([StreamNote(hold, charge(40), until_ms)]) == {hold.hold_id}
    shop.clock.now_ms += REQUEST_MS + 1
    await store.expire(shop.clock.now_ms)
    assert shop.money() == (MONEY, 100), "it was extended"
    if ends == "capture":
        store.capture(hold, charge(70))
    elif ends == "expire":
        shop.clock.now_ms = until_ms + 1
        await store.expire(shop.clock.now_ms)
    else:
        await store.close()
        store = await shop.open()
    await store.drain()
    await store.close()
    assert shop.money() == (MONEY - (70 if ends == "capture" else 40), 0)
    shop.assert_right()
