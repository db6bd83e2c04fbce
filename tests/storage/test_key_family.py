"""Keys that keys make draw from the limits and budgets of all above them, and end with them. Rotated ones do, too."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from embedmesh.rules.errors import (
    Failure,
    InsufficientQuota,
    InsufficientScope,
    InvalidApiKey,
    InvalidValue,
    RateLimited,
    StoreUnavailable,
)
from embedmesh.rules.holds import Hold
from embedmesh.rules.ports import Above, Caller, RateLimit
from embedmesh.storage.books import Books
from embedmesh.storage.books.keys import Key, Limits
from embedmesh.storage.db import refusals
from embedmesh.storage.engines import engine_of
from embedmesh.storage.postgres.database import SESSION
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY
from tests.storage.shop import Shop, charge, secret

BOTH = ("embeddings", "keys")
BUDGETS = ("budget_day", "budget_month")
OF_ANOTHER = "The API key that this one draws from"


def top(shop: Shop, **limits: Any) -> Key:
    """A key that the operator made, and that may make others."""
    return shop.books.keys.create("a", BOTH, limits=Limits(**limits))[0]


def below(shop: Shop, parent: Key, *, expires_ms: int | None = None, **limits: Any) -> Key:
    """A key that `parent` makes, with its limits but for those that are named."""
    made = Limits(**limits).within(parent.limits) if not limits else Limits(**limits)
    return shop.books.keys.create_below(parent.key_id, BOTH, expires_ms=expires_ms, limits=made)[0]


def line(shop: Shop, first: Key, count: int) -> list[Key]:
    """So many keys, each made by the one before."""
    keys = [first]
    for _ in range(count):
        keys.append(below(shop, keys[-1]))
    return keys


async def hold(shop: Shop, store: Store, key: Key, amount: int) -> Hold:
    made = shop.new_hold(amount, key.key_id)
    await store.hold(made)
    return made


async def spend(shop: Shop, store: Store, key: Key, amount: int) -> None:
    store.capture(await hold(shop, store, key, amount), charge(amount, key_id=key.key_id))
    await store.drain()


async def refused(shop: Shop, store: Store, key: Key, amount: int) -> Failure:
    with pytest.raises(Failure) as failure:
        await hold(shop, store, key, amount)
    return failure.value


@pytest.fixture
async def stores(shop: Shop) -> AsyncIterator[Sequence[Store]]:
    """Two gateways."""
    opened = [await shop.open() for _ in range(2)]
    yield opened
    for store in opened:
        await store.close()


# -- money -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", BUDGETS)
async def test_64_children_at_once_spend_no_more_than_their_parents_budget(
    shop: Shop, stores: Sequence[Store], limit: str
) -> None:
    """Over two gateways, with a budget for ten requests: ten are served, round after round of a new period."""
    shop.credit(10**6)
    parent = top(shop, **{limit: 100})
    children = [below(shop, parent) for _ in range(64)]
    for _ in range(3):
        holds = [shop.new_hold(10, child.key_id) for child in children]
        turns = list(zip(holds, itertools.cycle(stores), strict=False))
        outcomes = await asyncio.gather(*(store.hold(one) for one, store in turns), return_exceptions=True)
        assert sum(outcome is None for outcome in outcomes) == 10
        assert {type(outcome) for outcome in outcomes} == {type(None), InsufficientQuota}
        for (one, store), outcome in zip(turns, outcomes, strict=True):
            if outcome is None:
                store.capture(one, charge(10, key_id=str(one.key_id)))
        await asyncio.gather(*(store.drain() for store in stores))
        assert f"{OF_ANOTHER} has a budget of" in str(await refused(shop, stores[0], children[0], 1))
        assert "This API key has a budget of" in str(await refused(shop, stores[1], parent, 1))
        shop.assert_right()
        shop.clock.now_ms += 31 * MS_PER_DAY


async def test_what_a_child_holds_and_gives_back_counts_above_it(shop: Shop, store: Store) -> None:
    """All the way up, while it is held; what was captured stays, what was released does not."""
    shop.credit(1_000)
    first, *_, last = line(shop, top(shop, budget_day=100), 4)
    kept, given_back = await hold(shop, store, last, 50), await hold(shop, store, last, 40)
    assert "$0.00000001 is left" in str(await refused(shop, store, first, 11))
    store.release(given_back)
    store.capture(kept, charge(20, key_id=last.key_id))
    await store.drain()
    assert "$0.00000008 is left" in str(await refused(shop, store, first, 81))
    await hold(shop, store, first, 80)
    shop.assert_right()


async def test_a_child_has_limits_of_its_own_that_count_against_nobody_else(shop: Shop, store: Store) -> None:
    """What its parent and its sisters spend is theirs."""
    shop.credit(1_000)
    parent = top(shop, budget_day=100)
    one, other = (below(shop, parent, budget_day=30) for _ in range(2))
    await spend(shop, store, parent, 40)
    await spend(shop, store, one, 30)
    assert "This API key has a budget of $0.00000003" in str(await refused(shop, store, one, 1))
    await hold(shop, store, other, 30)
    shop.assert_right()


async def test_holds_of_children_that_nobody_ended_are_given_back(shop: Shop, store: Store) -> None:
    """By the sweep, and after a crash."""
    shop.credit(1_000)
    parent = top(shop, budget_day=1)
    child = below(shop, parent)
    one = await hold(shop, store, child, 1)
    assert isinstance(await refused(shop, store, parent, 1), InsufficientQuota)
    shop.clock.now_ms = one.deadline_ms + 1
    assert await store.expire(shop.clock.now_ms) == 1
    await hold(shop, store, parent, 1)
    shop.assert_right()


async def test_a_hold_that_the_account_does_not_cover_counts_nowhere(shop: Shop, store: Store) -> None:
    shop.credit(10)
    parent = top(shop, budget_day=11)
    child = below(shop, parent)
    assert "The account's balance" in str(await refused(shop, store, child, 11))
    await hold(shop, store, child, 10)
    shop.assert_right()


# -- minutes -----------------------------------------------------------------------------------------------------------


async def caller_of(store: Store, made: tuple[Key, str]) -> Caller:
    await store.changes.look()
    found = await store.keys.find(made[1])
    assert found is not None
    return found


async def test_children_use_their_parents_minutes_up(shop: Shop, stores: Sequence[Store]) -> None:
    """Requests and tokens, over two gateways; the replies of each say of which limit least is left."""
    keys = shop.books.keys
    parent = keys.create("a", BOTH, limits=Limits(requests_a_minute=20, tokens_a_minute=1_600))
    children = [
        keys.create_below(parent[0].key_id, BOTH, limits=Limits(requests_a_minute=15, tokens_a_minute=1_600))
        for _ in range(2)
    ]
    callers = [await caller_of(store, made) for store, made in zip(stores, children, strict=True)]
    assert [caller.above for caller in callers] == [(Above(parent[0].key_id, 20, 1_600),)] * 2
    served, failures = 0, []
    for _ in range(15):
        for store, caller in zip(stores, callers, strict=True):
            try:
                await store.rate_limits.take_request(caller)
                served += 1
            except RateLimited as failure:
                failures.append(failure.message)
    assert served == 20
    assert all(message.startswith(f"{OF_ANOTHER} may use 20 requests") for message in failures)
    assert stores[0].rate_limits.left(callers[0])[0].left <= 5
    with pytest.raises(RateLimited, match="This API key may use 20 requests"):
        await stores[0].rate_limits.take_request(await caller_of(stores[0], parent))
    await stores[0].rate_limits.take_tokens(callers[0], 1_600)
    with pytest.raises(RateLimited, match=f"{OF_ANOTHER} may use 1,600 tokens"):
        await stores[0].rate_limits.take_tokens(Caller("a", "k", frozenset(), above=callers[0].above), 1)


async def test_what_is_left_is_told_of_the_limit_of_which_least_is(store: Store) -> None:
    """Its own, that of a key above it, or of either alone."""
    for own, above, expected in ((5, 9, 5), (9, 5, 5), (None, 7, 7), (7, None, 7)):
        caller = Caller("a", "k", frozenset(), None, own, None, above=(Above("p", above, None),))
        assert store.rate_limits.left(caller) == (RateLimit("requests", expected, expected, 60.0),)
    assert store.rate_limits.left(Caller("a", "k", frozenset(), above=(Above("p", None, 8),)))[0].what == "tokens"


async def test_a_child_that_is_over_its_own_limit_uses_nothing_of_its_parents(store: Store) -> None:
    above = (Above("p", 10, None),)
    caller = Caller("a", "k", frozenset(), None, 1, None, above=above)
    await store.rate_limits.take_request(caller)
    for _ in range(3):
        with pytest.raises(RateLimited, match="This API key may use 1 requests"):
            await store.rate_limits.take_request(caller)
    assert store.rate_limits.left(Caller("a", "l", frozenset(), above=above))[0].left == 9


async def test_a_key_without_parent_is_found_as_before(shop: Shop, store: Store) -> None:
    """In one question, with nothing above it."""
    caller = await caller_of(store, shop.books.keys.create("a", ["embeddings"]))
    assert caller.above == ()
    assert store.rate_limits.left(caller) == ()


async def test_a_child_may_use_no_model_that_a_key_above_it_may_no_longer(shop: Shop, store: Store) -> None:
    keys = shop.books.keys
    parent = keys.create("a", BOTH)
    child = keys.create_below(parent[0].key_id, BOTH)
    grandchild = keys.create_below(child[0].key_id, BOTH, limits=Limits(models=("m", "n")))
    assert (await caller_of(store, grandchild)).models == frozenset({"m", "n"})
    keys.change(child[0].key_id, limits=Limits(models=("n", "o")))
    assert (await caller_of(store, grandchild)).models == frozenset({"n"})
    keys.change(parent[0].key_id, limits=Limits(models=("o",)))
    assert (await caller_of(store, child)).models == frozenset({"o"})
    assert (await caller_of(store, grandchild)).models == frozenset()


# -- lives -------------------------------------------------------------------------------------------------------------


async def test_revoking_a_key_revokes_all_below_it_and_no_other(shop: Shop, store: Store) -> None:
    keys = shop.books.keys
    parent, sister = keys.create("a", BOTH), keys.create("a", BOTH)
    child = keys.create_below(parent[0].key_id, BOTH)
    others = [keys.create_below(sister[0].key_id, BOTH)]
    grandchild = keys.create_below(child[0].key_id, BOTH)
    for made in (child, grandchild):
        assert await store.keys.find(made[1]) is not None
    assert keys.revoke(child[0].key_id)
    await store.changes.look()
    for made in (child, grandchild):
        assert await store.keys.find(made[1]) is None
        assert keys.find(made[0].key_id).revoked_ms == shop.clock.now_ms
        assert not keys.revoke(made[0].key_id)
        with pytest.raises(InvalidApiKey):
            keys.create_below(made[0].key_id, BOTH)
    for made in (parent, sister, *others):
        assert await store.keys.find(made[1]) is not None
    assert not keys.revoke("key_none")
    shop.assert_right()


def test_a_key_is_revoked_though_another_has_its_account_locked(
    file_shop: Shop, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that hangs in the middle of a batch, say. What is below it follows once that is over."""
    monkeypatch.setitem(SESSION, "lock_timeout", "50")
    with Books.open(database, clock=file_shop.clock, secret=secret) as books:
        books.accounts.create("b")
        parent = books.keys.create("b", BOTH)[0].key_id
        child = books.keys.create_below(parent, BOTH)[0].key_id
        db = engine_of(database).connect(busy_s=1)
        db.begin()
        db.lock_accounts({"b"})
        with pytest.raises(StoreUnavailable):
            books.keys.revoke(parent)
        assert [books.keys.find(each).revoked_ms is None for each in (parent, child)] == [False, True]
        db.rollback()
        db.close()
        assert not books.keys.revoke(parent)
        assert books.keys.find(child).revoked_ms is not None


async def test_a_key_ends_with_those_above_it(shop: Shop) -> None:
    """Its end is never later; where theirs is put earlier, so is its own, and stays."""
    keys, now_ms = shop.books.keys, shop.clock.now_ms
    parent = keys.create("a", BOTH, expires_ms=now_ms + 100)[0]
    with pytest.raises(InsufficientScope, match="expires_ms"):
        below(shop, parent, expires_ms=now_ms + 101)
    child = below(shop, parent, expires_ms=now_ms + 100)
    grandchild = below(shop, child, expires_ms=now_ms + 10)
    keys.change(parent.key_id, expires_ms=now_ms + 50)
    assert [keys.find(key.key_id).expires_ms for key in (child, grandchild)] == [now_ms + 50, now_ms + 10]
    for later in (None, now_ms + 51):
        with pytest.raises(InvalidValue, match=f"draws from, {parent.key_id}, at the latest"):
            keys.change(child.key_id, expires_ms=later)
    keys.change(child.key_id, name="as it is")
    keys.change(parent.key_id, expires_ms=None)
    assert keys.find(child.key_id).expires_ms == now_ms + 50
    shop.clock.now_ms += 50
    with pytest.raises(InvalidApiKey):
        keys.create_below(child.key_id, BOTH, expires_ms=now_ms + 50)


def test_keys_make_keys_to_a_depth(shop: Shop) -> None:
    *_, last = line(shop, top(shop), 4)
    with pytest.raises(InsufficientScope, match="depth of 4"):
        below(shop, last)
    shop.assert_right()


def test_a_key_is_made_by_a_good_one_of_its_own_account(shop: Shop) -> None:
    """The store itself refuses any other."""
    parent = top(shop)
    shop.books.accounts.create("b")
    insert = (
        "INSERT INTO keys (key_id, account_id, name, token_hash, scopes, created_ms, parent_id)"
        " SELECT 'k', '{}', '', {}, '', 1, '{}'"
    )
    with shop.by_hand() as db:
        hashed = "randomblob(32)" if db.dialect == "sqlite" else "sha256('k')"
        for account, above in (("b", parent.key_id), ("a", "none")):
            with pytest.raises(refusals(), match="a good key of its account"):
                db.execute(insert.format(account, hashed, above))


# -- how many ----------------------------------------------------------------------------------------------------------


def test_an_account_has_a_bounded_number_of_good_keys(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes them. Revoked and expired ones do not count; a rotation is never refused for it."""
    monkeypatch.setattr("embedmesh.storage.books.key_family.ACCOUNT_KEYS_MAX", 3)
    keys = shop.books.keys
    parent = top(shop)
    below(shop, parent)
    keys.create("a", BOTH, expires_ms=shop.clock.now_ms + 10)
    for make in (lambda: keys.create("a", BOTH), lambda: below(shop, parent)):
        with pytest.raises(InvalidValue, match="at most 3 good keys"):
            make()
    new, _ = keys.rotate(parent.key_id, overlap_s=10)
    keys.revoke(parent.key_id)
    shop.clock.now_ms += 10
    below(shop, new)
    keys.revoke(new.key_id)
    assert [keys.create("a", BOTH) for _ in range(3)]
    shop.books.accounts.create("b")
    keys.create("b", BOTH)


def test_keys_make_so_many_keys_a_day(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Revoked or not: no key is ever deleted. The operator still makes one, and the wait is told."""
    monkeypatch.setattr("embedmesh.storage.books.key_family.ACCOUNT_KEYS_A_DAY_MAX", 3)
    parent = top(shop)
    shop.clock.now_ms += 1_000
    for _ in range(2):
        shop.books.keys.revoke(below(shop, parent).key_id)
    with pytest.raises(RateLimited, match="3 keys of an account in 24 hours") as told:
        below(shop, parent)
    assert told.value.retry_after_s == 86_399
    top(shop)
    shop.clock.now_ms += 2 * MS_PER_DAY
    below(shop, parent)


def test_who_make_keys_at_once_make_no_more_than_there_may_be(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four gateways on one store."""
    monkeypatch.setattr("embedmesh.storage.books.key_family.ACCOUNT_KEYS_MAX", 20)
    parent = top(shop)

    def make(_: int) -> int:
        made = 0
        with Books.open(shop.place, clock=shop.clock, secret=secret) as books:
            for _ in range(10):
                try:
                    books.keys.create_below(parent.key_id, BOTH)
                    made += 1
                except InvalidValue:
                    pass
        return made

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(make, range(4))) == 19
    assert len(shop.books.keys.list("a")) == 20


# -- rotation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", BUDGETS)
async def test_a_rotated_key_has_spent_what_the_old_one_has(shop: Shop, store: Store, limit: str) -> None:
    """Its own, its children's, and what is held; the old one draws from the new one as long as it is good."""
    shop.credit(1_000)
    old = top(shop, **{limit: 100})
    child = below(shop, old)
    await spend(shop, store, old, 20)
    await spend(shop, store, child, 10)
    own, childs = await hold(shop, store, old, 5), await hold(shop, store, child, 4)
    new, _ = shop.books.keys.rotate(old.key_id, overlap_s=1_000)
    shop.assert_right()
    assert shop.books.keys.find(child.key_id).parent_id == new.key_id
    for key in (old, new, child):
        assert "$0.000000061 is left" in str(await refused(shop, store, key, 62))
    store.release(own)
    store.capture(childs, charge(4, key_id=child.key_id))
    await store.drain()
    await spend(shop, store, old, 6)
    await spend(shop, store, child, 10)
    assert "$0.00000005 is left" in str(await refused(shop, store, new, 51))
    await spend(shop, store, new, 50)
    newest, _ = shop.books.keys.rotate(new.key_id, overlap_s=0)
    for key in (old, new, child, newest):
        assert isinstance(await refused(shop, store, key, 1), InsufficientQuota)
    shop.assert_right()


async def test_a_rotated_child_stays_where_it_is(shop: Shop, store: Store) -> None:
    """Below the same keys, with its own below it; and all of them end with those above."""
    shop.credit(1_000)
    parent = top(shop, budget_day=100)
    old, grandchild = line(shop, below(shop, parent), 1)
    new, _ = shop.books.keys.rotate(old.key_id, overlap_s=100)
    assert (new.parent_id, shop.books.keys.find(old.key_id).parent_id) == (parent.key_id, new.key_id)
    await spend(shop, store, grandchild, 60)
    await spend(shop, store, old, 40)
    for key in (parent, new, grandchild):
        assert isinstance(await refused(shop, store, key, 1), InsufficientQuota)
    shop.books.keys.revoke(parent.key_id)
    assert all(key.revoked_ms is not None for key in shop.books.keys.list("a"))
    shop.assert_right()


async def test_a_rotated_key_has_used_what_the_old_one_has_of_the_minute(shop: Shop, store: Store) -> None:
    """On every gateway; and both together have one minute."""
    limits = Limits(requests_a_minute=10, tokens_a_minute=320)
    old = shop.books.keys.create("a", BOTH, limits=limits)
    caller = await caller_of(store, old)
    for _ in range(6):
        await store.rate_limits.take_request(caller)
    await store.rate_limits.take_tokens(caller, 200)
    new = shop.books.keys.rotate(old[0].key_id, overlap_s=100)
    rotated = await caller_of(store, new)
    with pytest.raises(RateLimited, match="120 of this minute's"):
        await store.rate_limits.take_tokens(rotated, 121)
    for caller in (rotated, await caller_of(store, old), rotated, await caller_of(store, old)):
        await store.rate_limits.take_request(caller)
    for caller in (rotated, await caller_of(store, old)):
        with pytest.raises(RateLimited, match="0 of this minute's"):
            await store.rate_limits.take_request(caller)
