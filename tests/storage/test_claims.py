"""Idempotency-Keys in the store: one request answers for a key, and its reply is kept for a day."""

import asyncio
from pathlib import Path

import pytest

from embedmesh.rules.errors import InsufficientQuota
from embedmesh.rules.holds import Claim, PriorRequest
from embedmesh.rules.limits import IDEMPOTENCY_KEY_S
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge

CLAIM = Claim(b"k" * 32, b"b" * 32)
OTHER_BODY = Claim(b"k" * 32, b"c" * 32)
REPLY = b"the vectors of a caller"


async def test_who_comes_second_finds_the_first(shop: Shop, store: Store) -> None:
    """Under way, then with its reply: whatever its body, which is for the caller to compare. Nothing more is held."""
    shop.credit(100)
    first, second = shop.new_hold(60), shop.new_hold(60)
    assert await store.hold(first, CLAIM) is None
    for claim in (CLAIM, OTHER_BODY):
        assert await store.hold(second, claim) == PriorRequest(CLAIM.body_hash, first.hold_id, "open", None)
    assert await store.prior_request(second, CLAIM) == PriorRequest(CLAIM.body_hash, first.hold_id, "open", None)
    store.capture(first, charge(50), REPLY)
    done = PriorRequest(CLAIM.body_hash, first.hold_id, "captured", REPLY)
    assert await store.hold(second, CLAIM) == done
    assert await store.prior_request(second, CLAIM) == done
    assert shop.money() == (50, 0)
    assert await store.kept_bytes("a") > len(REPLY)
    shop.assert_right()


async def test_of_many_at_once_one_is_the_first(shop: Shop, store: Store) -> None:
    """In one batch or in several; only the first is counted as placed."""
    shop.credit(1_000)
    holds = [shop.new_hold(10) for _ in range(20)]
    found = await asyncio.gather(*(store.hold(hold, CLAIM) for hold in holds))
    [first] = [hold for hold, prior in zip(holds, found, strict=True) if prior is None]
    assert {prior for prior in found if prior is not None} == {
        PriorRequest(CLAIM.body_hash, first.hold_id, "open", None)
    }
    assert shop.money() == (1_000, 10)
    assert store.stats.holds == 1


async def test_keys_that_come_together_do_not_answer_for_each_other(shop: Shop, store: Store) -> None:
    shop.credit(100)
    claims = [CLAIM, Claim(b"l" * 32, CLAIM.body_hash)]
    assert await asyncio.gather(*(store.hold(shop.new_hold(10), claim) for claim in claims)) == [None, None]
    assert shop.money() == (100, 20)


@pytest.mark.parametrize("end", ["release", "expire", "no money", "a day"])
async def test_a_key_whose_request_came_to_nothing_is_free_again(shop: Shop, store: Store, end: str) -> None:
    """It failed, its gateway died, it never began; or its day is over."""
    shop.credit(100)
    first, second = shop.new_hold(200 if end == "no money" else 60), shop.new_hold(60)
    if end == "no money":
        with pytest.raises(InsufficientQuota):
            await store.hold(first, CLAIM)
        assert await store.prior_request(first, CLAIM) is None
    else:
        assert await store.hold(first, CLAIM) is None
    if end == "release":
        store.release(first)
    elif end == "expire":
        await store.expire(first.deadline_ms + 1)
    elif end == "a day":
        store.capture(first, charge(10), REPLY)
        await store.drain()
        shop.clock.now_ms += IDEMPOTENCY_KEY_S * 1000
        assert await store.hold(second, CLAIM) is not None
        shop.clock.now_ms += 1
    assert await store.hold(second, OTHER_BODY) is None
    assert await store.prior_request(second, CLAIM) == PriorRequest(OTHER_BODY.body_hash, second.hold_id, "open", None)
    assert await store.kept_bytes("a") == 0
    shop.assert_right()


async def test_a_key_is_its_accounts_own(shop: Shop, store: Store) -> None:
    """Two accounts may use the same word."""
    shop.credit(100)
    shop.books.accounts.create("b")
    shop.books.accounts.credit("b", 100, "of b")
    assert await store.hold(shop.new_hold(10), CLAIM) is None
    other = shop.new_hold(10, account_id="b")
    assert await store.hold(other, CLAIM) is None


async def test_replies_are_forgotten_after_a_day(shop: Shop, store: Store) -> None:
    """With them what they count against the account's bound; a younger one stays."""
    shop.credit(100)
    for number in range(2):
        hold = shop.new_hold(10)
        await store.hold(hold, Claim(bytes([number]) * 32, bytes(32)))
        store.capture(hold, charge(10), REPLY)
        await store.drain()
        shop.clock.now_ms += IDEMPOTENCY_KEY_S * 1000 - 10
    assert await store.forget() == 1
    assert await store.forget() == 0
    bytes_of_one = await store.kept_bytes("a")
    assert len(REPLY) < bytes_of_one < 2 * len(REPLY) + 60
    shop.assert_right()


async def test_a_kept_reply_is_encrypted(file_shop: Shop, tmp_path: Path) -> None:
    """And moved to another row it opens nothing."""
    shop = file_shop
    store = await shop.open()
    shop.credit(100)
    holds = [shop.new_hold(10), shop.new_hold(10)]
    for number, hold in enumerate(holds):
        await store.hold(hold, Claim(bytes([number]) * 32, bytes(32)))
        store.capture(hold, charge(10), REPLY)
    await store.drain()
    on_disk = b"".join(file.read_bytes() for file in shop.path.parent.iterdir())
    assert REPLY not in on_disk
    with shop.by_hand() as db:
        db.execute("UPDATE claims SET reply = (SELECT max(reply) FROM claims)")
    opened = 0
    for number in range(2):
        try:
            await store.prior_request(holds[0], Claim(bytes([number]) * 32, bytes(32)))
            opened += 1
        except ValueError:
            pass
    assert opened == 1
    await store.close()
