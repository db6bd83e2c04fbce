"""A key's minute at one gateway: when it begins anew, and what is told of it."""

import pytest

from embedmesh.rules.errors import RateLimited
from embedmesh.rules.ports import Caller, RateLimit
from embedmesh.storage.store import Store
from tests.storage.shop import Shop


def limited(*, requests: int | None = None, tokens: int | None = None) -> Caller:
    return Caller("a", "key_1", frozenset(), None, requests, tokens)


async def refusal(store: Store, caller: Caller, tokens: int) -> str:
    with pytest.raises(RateLimited) as told:
        await store.rate_limits.take_tokens(caller, tokens)
    return told.value.message


async def test_a_minute_is_the_clocks(shop: Shop, store: Store) -> None:
    """What was taken counts to its last millisecond; the time until then is told; with the next all is there again."""
    caller = limited(requests=1)
    shop.clock.now_ms += 1_500
    await store.rate_limits.take_request(caller)
    for now_ms, reset_s in ((1_501, 58.499), (59_999, 0.001)):
        shop.clock.now_ms += now_ms - shop.clock.now_ms % 60_000
        with pytest.raises(RateLimited) as told:
            await store.rate_limits.take_request(caller)
        assert told.value.retry_after_s == reset_s
        assert store.rate_limits.left(caller) == (RateLimit("requests", 1, 0, reset_s),)
    shop.clock.now_ms += 1
    assert store.rate_limits.left(caller) == (RateLimit("requests", 1, 1, 60.0),)
    await store.rate_limits.take_request(caller)


async def test_requests_and_tokens_are_counted_apart(store: Store) -> None:
    """Each is told, in tokens of whole numbers, and may be taken to the last one."""
    caller = limited(requests=10, tokens=100)
    await store.rate_limits.take_request(caller)
    await store.rate_limits.take_tokens(caller, 1)
    assert store.rate_limits.left(caller) == (RateLimit("requests", 10, 9, 60.0), RateLimit("tokens", 100, 99, 60.0))
    await store.rate_limits.take_tokens(caller, 99)
    assert [one.left for one in store.rate_limits.left(caller)] == [9, 0]


async def test_who_asks_for_more_than_is_left_is_told_what_would_help(store: Store) -> None:
    """A request that fits into a minute may wait for the next; one that never will has to be split."""
    caller = limited(tokens=5_000)
    await store.rate_limits.take_tokens(caller, 1)
    assert await refusal(store, caller, 5_000) == (
        "This API key may use 5,000 tokens a minute; 4,999 of this minute's are left. Wait for the next."
    )
    assert await refusal(store, caller, 5_001) == (
        "This API key may use 5,000 tokens a minute; 4,999 of this minute's are left. "
        "This request alone has 5,001: split it."
    )
    with pytest.raises(RateLimited) as told:
        await store.rate_limits.take_tokens(limited(tokens=5_000), 5_001)
    assert told.value.retry_after_s is None, "no waiting helps"


async def test_what_was_spent_before_a_limit_was_changed_is_told_of(store: Store) -> None:
    """The new limit's minute has what the old one's left of it."""
    await store.rate_limits.take_tokens(limited(tokens=1_600), 1_000)
    assert "; 200 of this minute's are left." in await refusal(store, limited(tokens=1_200), 1_300)


async def test_work_in_vain_takes_what_is_left_and_then_nothing_more_is_begun(store: Store) -> None:
    """To the last token; before that it is not in the way of what fits."""
    caller = limited(tokens=1_600)
    store.rate_limits.spend_tokens(caller, 600)
    assert store.rate_limits.left(caller)[0].left == 1_000
    await store.rate_limits.take_request(caller)
    await store.rate_limits.take_tokens(caller, 900)
    assert store.rate_limits.left(caller)[0].left == 100
    store.rate_limits.spend_tokens(caller, 1_000_000)
    assert store.rate_limits.left(caller)[0].left == 0
    with pytest.raises(RateLimited):
        await store.rate_limits.take_request(caller)
    with pytest.raises(RateLimited):
        await store.rate_limits.take_tokens(caller, 1)


async def test_a_key_without_a_token_left_is_refused_before_its_request_is_looked_at(shop: Shop, store: Store) -> None:
    """And with the next minute not."""
    caller = limited(requests=10, tokens=100)
    await store.rate_limits.take_tokens(caller, 100)
    with pytest.raises(RateLimited, match="tokens a minute"):
        await store.rate_limits.take_request(caller)
    shop.clock.now_ms += 60_000
    await store.rate_limits.take_request(caller)
    assert [each.left for each in store.rate_limits.left(caller)] == [9, 100]


async def test_the_store_hears_of_work_in_vain_with_the_next_request(shop: Shop, store: Store) -> None:
    caller = limited(tokens=1_600)
    store.rate_limits.spend_tokens(caller, 1_500)
    await store.rate_limits.take_request(caller)
    assert store.rate_limits.left(caller)[0].left == 100
    with shop.by_hand() as db:
        assert db.execute("SELECT tokens FROM leases", {}).fetchall() == [(1_501,)]


@pytest.mark.parametrize("tokens", [0, -5])
async def test_nothing_is_given_for_no_work(store: Store, tokens: int) -> None:
    store.rate_limits.spend_tokens(limited(tokens=10), tokens)
    assert store.rate_limits.left(limited(tokens=10))[0].left == 10
