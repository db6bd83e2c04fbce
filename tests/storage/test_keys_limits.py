"""What a key may do: a day, a month; and what its account may owe. Decided where the hold is written."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from embedmesh.rules.errors import Failure, InsufficientQuota, InvalidValue, NotFound, RateLimited
from embedmesh.rules.holds import HoldEnd
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.ledger.end_hold import release_holds
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.room import Lacks, refusal
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY, first_day_of_month
from tests.storage.shop import LASTS_MS, Shop, charge


def key_of(shop: Shop, **limits: Any) -> str:
    key, _ = shop.books.keys.create("a", ["embeddings"], limits=Limits(**limits))
    return key.key_id


async def spend(shop: Shop, store: Store, key_id: str, amount: int) -> None:
    """Hold and capture."""
    hold = shop.new_hold(amount, key_id)
    await store.hold(hold)
    store.capture(hold, charge(amount, key_id=key_id))
    await store.drain()


async def refused(shop: Shop, store: Store, key_id: str, amount: int) -> Failure:
    with pytest.raises(Failure) as failure:
        await store.hold(shop.new_hold(amount, key_id))
    return failure.value


@pytest.mark.parametrize(("period", "limit"), [("day", "budget_day"), ("month", "budget_month")])
async def test_a_key_has_a_budget(shop: Shop, store: Store, period: str, limit: str) -> None:
    """What is spent and what is held together; to the last nano-dollar, and whole again in the next period."""
    shop.credit(10_000)
    key_id = key_of(shop, **{limit: 100})
    await spend(shop, store, key_id, 60)
    held = shop.new_hold(40, key_id)
    await store.hold(held)
    failure = await refused(shop, store, key_id, 1)
    assert isinstance(failure, InsufficientQuota)
    assert f"budget of $0.0000001 a {period}" in failure.message
    assert "$0.00 is left" in failure.message
    store.release(held)
    await spend(shop, store, key_id, 40)
    assert isinstance(await refused(shop, store, key_id, 1), InsufficientQuota)
    shop.clock.now_ms = next_start_ms(shop.clock.now_ms, period) - 1
    assert isinstance(await refused(shop, store, key_id, 1), InsufficientQuota)
    shop.clock.now_ms += 1
    await spend(shop, store, key_id, 100)
    shop.assert_right()


@pytest.mark.parametrize("ms_of_day", [0, MS_PER_DAY // 2 - 1, MS_PER_DAY // 2 + 1, MS_PER_DAY - 1])
async def test_what_is_spent_is_of_its_day_in_utc(shop: Shop, store: Store, ms_of_day: int) -> None:
    day = shop.clock.now_ms // MS_PER_DAY + 1
    shop.clock.now_ms = day * MS_PER_DAY + ms_of_day
    shop.credit(1_000)
    key_id = key_of(shop, budget_day=10)
    await spend(shop, store, key_id, 10)
    with shop.by_hand() as db:
        assert db.execute("SELECT day FROM usage").fetchall() == [(day,)]
        assert db.execute("SELECT day, cost FROM usage_days").fetchall() == [(day, 10)]
    assert "$0.00 is left" in str(await refused(shop, store, key_id, 1))


def next_start_ms(now_ms: int, period: str) -> int:
    if period == "day":
        return (now_ms // MS_PER_DAY + 1) * MS_PER_DAY
    now = datetime.fromtimestamp(now_ms / 1000, UTC)
    after = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    return int(after.timestamp() * 1000)


async def test_where_there_is_room_again_a_hold_is_tried_again(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is looked for after the commit: another gateway may have ended a hold since."""
    shop.credit(100)
    first = shop.new_hold(100)
    await store.hold(first)
    settle = PlaceHold.settle_all

    def after_another(db: Any, now_ms: int, writes: Any) -> None:
        release_holds(db, now_ms, [first.hold_id], HoldEnd.RELEASE)
        settle(db, now_ms, writes)

    monkeypatch.setattr(PlaceHold, "settle_all", after_another)
    await store.hold(shop.new_hold(100))
    assert shop.money() == (100, 100)
    assert store.stats.holds_refused == 0


def test_a_caller_is_told_to_try_again_where_there_is_room_and_no_time_is_left(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What others have given back may be taken by others, again and again."""
    monkeypatch.setattr("embedmesh.storage.ledger.room.AGAIN_S", 2.5)
    refused = refusal(shop.new_hold(100), [(100, None, None, 0, None, 0, 0)])
    assert refused.lacks is Lacks.NOTHING
    assert isinstance(refused.failure, RateLimited)
    assert refused.failure.message == "There was no room for this request a moment ago, and there is now. Try again."
    assert refused.failure.retry_after_s == 2.5


async def test_who_has_the_budget_and_not_the_money_is_told_of_the_money(shop: Shop, store: Store) -> None:
    """A budget covers a request to its last nano-dollar."""
    shop.credit(99)
    failure = await refused(shop, store, key_of(shop, budget_day=100), 100)
    assert failure.message == (
        "The account's balance does not cover this request: it needs $0.0000001, and $0.000000099 is available. "
        "Add credit."
    )


async def test_a_budget_of_nothing_lets_free_models_through(shop: Shop, store: Store) -> None:
    shop.credit(10)
    key_id = key_of(shop, budget_day=0)
    await store.hold(shop.new_hold(0, key_id))
    assert isinstance(await refused(shop, store, key_id, 1), InsufficientQuota)


async def test_a_budget_is_held_to_over_a_batch(shop: Shop, store: Store) -> None:
    """Many at once with budget for five: five."""
    shop.credit(10_000)
    key_id = key_of(shop, budget_day=50)
    holds = [shop.new_hold(10, key_id) for _ in range(30)]
    outcomes = await asyncio.gather(*map(store.hold, holds), return_exceptions=True)
    assert sum(outcome is None for outcome in outcomes) == 5
    assert store.stats.holds_refused == 25


@pytest.mark.parametrize(
    ("moment", "day"),
    [
        (datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 1, tzinfo=UTC)),
        (datetime(2026, 2, 28, 23, 59, 59, tzinfo=UTC), datetime(2026, 2, 1, tzinfo=UTC)),
        (datetime(2028, 2, 29, tzinfo=UTC), datetime(2028, 2, 1, tzinfo=UTC)),
        (datetime(2026, 12, 31, 12, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)),
    ],
)
def test_the_first_day_of_a_month(moment: datetime, day: datetime) -> None:
    assert first_day_of_month(int(moment.timestamp() * 1000)) == day.timestamp() * 1000 / MS_PER_DAY


@pytest.mark.parametrize("zone", ["UTC+11", "UTC-14"])
def test_a_month_begins_in_utc_wherever_the_machine_stands(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eleven hours behind, or fourteen ahead: a local month began long after, or long before."""
    try:
        with monkeypatch.context() as elsewhere:
            elsewhere.setenv("TZ", zone)
            time.tzset()
            for month in (1, 2):
                begins = datetime(2026, month, 1, tzinfo=UTC)
                for moment in (begins, begins + timedelta(days=27, hours=23, minutes=59)):
                    assert first_day_of_month(int(moment.timestamp() * 1000)) * 86_400 == begins.timestamp()
    finally:
        time.tzset()


# -- accounts that may owe ---------------------------------------------------------------------------------------------


async def test_a_postpaid_account_owes_up_to_its_limit(shop: Shop, store: Store) -> None:
    """Not a nano-dollar more; and the limit cannot be put below what is owed or held."""
    accounts = shop.books.accounts
    assert accounts.change("a", credit_limit_nanousd=100).available_nanousd == 100
    await spend(shop, store, "key_1", 70)
    hold = shop.new_hold(30)
    await store.hold(hold)
    with pytest.raises(InsufficientQuota, match=r"\$0.00 is available"):
        await store.hold(shop.new_hold(1))
    with pytest.raises(InvalidValue, match=r"owes \$0.0000001"):
        accounts.change("a", credit_limit_nanousd=99)
    store.release(hold)
    await store.drain()
    assert accounts.change("a", credit_limit_nanousd=70).available_nanousd == 0
    shop.credit(70)
    assert accounts.change("a", credit_limit_nanousd=0).available_nanousd == 0
    shop.assert_right()


@pytest.mark.parametrize(
    ("account", "limit", "failure"),
    [("nobody", 1, NotFound), ("revenue", 1, InvalidValue), ("a", -1, InvalidValue), ("a", 2**62 + 1, InvalidValue)],
)
def test_a_limit_that_makes_no_sense_is_refused(shop: Shop, account: str, limit: int, failure: type[Exception]) -> None:
    with pytest.raises(failure):
        shop.books.accounts.change(account, credit_limit_nanousd=limit)


def test_an_account_can_begin_postpaid(shop: Shop) -> None:
    assert shop.books.accounts.create("b", credit_limit_nanousd=5).available_nanousd == 5


async def test_an_account_that_is_none_is_not_charged(shop: Shop, store: Store) -> None:
    """Our own accounts hold nothing, and neither does one that is not there."""
    shop.credit(100)
    for account_id in ("revenue", "nobody"):
        with pytest.raises(InsufficientQuota) as told:
            await store.hold(shop.new_hold(0, account_id=account_id))
        assert told.value.message == "This account cannot be charged."


# -- keys --------------------------------------------------------------------------------------------------------------


async def test_a_key_may_be_rotated_with_an_overlap(shop: Shop, store: Store) -> None:
    """The new one may do the same; the old one is good until the overlap is over, and cannot be rotated again."""
    keys = shop.books.keys
    old, old_token = keys.create("a", ["embeddings"], name="n", limits=Limits(concurrency=3, models=("m",)))
    new, new_token = keys.rotate(old.key_id, overlap_s=10)
    assert (new.name, new.scopes, new.limits, new.account_id) == (old.name, old.scopes, old.limits, "a")
    assert keys.find(old.key_id).rotated_to == new.key_id
    with pytest.raises(InvalidValue, match="rotated before"):
        keys.rotate(old.key_id, overlap_s=10)
    shop.clock.now_ms += 9_999
    found = [await store.keys.find(token) for token in (old_token, new_token)]
    assert [one.key_id for one in found if one] == [old.key_id, new.key_id]
    assert found[1] is not None and found[1].models == frozenset({"m"})
    shop.clock.now_ms += 1
    assert await store.keys.find(old_token) is None
    assert await store.keys.find(new_token) is not None


def test_a_rotation_never_makes_a_key_live_longer(shop: Shop) -> None:
    keys = shop.books.keys
    old, _ = keys.create("a", ["embeddings"], expires_ms=shop.clock.now_ms + 5)
    keys.rotate(old.key_id, overlap_s=10)
    assert keys.find(old.key_id).expires_ms == shop.clock.now_ms + 5
    revoked, _ = keys.create("a", ["embeddings"])
    keys.revoke(revoked.key_id)
    expired, _ = keys.create("a", ["embeddings"], expires_ms=shop.clock.now_ms)
    for key in (revoked, expired):
        with pytest.raises(InvalidValue):
            keys.rotate(key.key_id, overlap_s=10)
    with pytest.raises(NotFound):
        keys.rotate("key_none", overlap_s=10)


async def test_a_key_can_be_changed(shop: Shop, store: Store) -> None:
    """Its limits from then on are others; a revoked key stays as it is."""
    keys = shop.books.keys
    key, token = keys.create("a", ["embeddings"])
    assert (await store.keys.find(token)).requests_a_minute is None  # type: ignore[union-attr]
    changed = keys.change(key.key_id, limits=Limits(requests_a_minute=5), name="five")
    assert keys.find(key.key_id, account_id="a") == changed
    await store.changes.look()
    assert (await store.keys.find(token)).requests_a_minute == 5  # type: ignore[union-attr]
    keys.revoke(key.key_id)
    with pytest.raises(InvalidValue, match="revoked"):
        keys.change(key.key_id, name="six")
    with pytest.raises(NotFound):
        keys.find(key.key_id, account_id="b")


@pytest.mark.parametrize(
    "limits",
    [
        {"requests_a_minute": 0},
        {"tokens_a_minute": -1},
        {"concurrency": 10**12 + 1},
        {"budget_day": -1},
        {"budget_month": 2**62 + 1},
        {"models": ("",)},
        {"models": ("a\nb",)},
        {"models": ("m" * 201,)},
        {"models": ("m",) * 65},
    ],
)
def test_limits_that_make_no_sense_are_refused(shop: Shop, limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidValue) as failure:
        shop.books.keys.create("a", ["embeddings"], limits=Limits(**limits))
    assert failure.value.param == next(iter(limits))
    assert shop.books.keys.list() == []


async def test_last_use_is_written_down_lazily(shop: Shop, store: Store) -> None:
    """Not with each request; the latest moment stays, whoever writes last."""
    keys = shop.books.keys
    key, token = keys.create("a", ["embeddings"])
    await store.keys.find(token)
    shop.clock.now_ms += 7
    await store.keys.find(token)
    assert keys.find(key.key_id).last_used_ms is None
    store.keys.note_uses_now()
    await store.drain()
    later = keys.find(key.key_id).last_used_ms
    assert later is not None
    assert (
        shop.clock.now_ms - 1_000 < later <= shop.clock.now_ms
    )  # what passes meanwhile on a busy machine is not known
    shop.clock.now_ms -= 1_000
    await store.keys.find(token)
    store.keys.note_uses_now()
    await store.drain()
    assert keys.find(key.key_id).last_used_ms == later


def test_keys_and_accounts_come_in_pages(shop: Shop) -> None:
    """Each once, the oldest first."""
    made = []
    for _ in range(5):
        shop.clock.now_ms += 1
        made.append(shop.books.keys.create("a", ["embeddings"])[0])
    first = shop.books.keys.list("a", rows_max=3)
    assert [*first, *shop.books.keys.list("a", after=first[-1], rows_max=3)] == made
    everyone = shop.books.accounts.list()
    page = shop.books.accounts.list(rows_max=2)
    assert [*page, *shop.books.accounts.list(after=page[-1])] == everyone


async def test_a_key_that_is_remembered_is_not_asked_for(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known keys and unknown ones; the oldest goes where there are too many; no change is missed."""
    monkeypatch.setattr("embedmesh.storage.cached.keys.KNOWN_MAX", 2)
    asked = []
    ask = store.keys._reads.ask

    async def counting(statement: str, values: Any) -> Any:
        asked.append(values)
        return await ask(statement, values)

    monkeypatch.setattr(store.keys._reads, "ask", counting)
    tokens = [shop.books.keys.create("a", ["embeddings"])[1] for _ in range(3)]
    for token in (tokens[0], tokens[0], tokens[1], tokens[0], tokens[1]):
        assert await store.keys.find(token) is not None
    assert len(asked) == 2
    await store.keys.find(tokens[2])
    await store.keys.find(tokens[1])
    assert len(asked) == 3
    await store.keys.find(tokens[0])  # it had to go
    assert len(asked) == 4

    async def changed_meanwhile(statement: str, values: Any) -> Any:
        rows = await ask(statement, values)
        store.keys._keys_changed()
        return rows

    monkeypatch.setattr(store.keys._reads, "ask", changed_meanwhile)
    store.keys._keys_changed()
    await store.keys.find(tokens[0])
    monkeypatch.setattr(store.keys._reads, "ask", counting)
    await store.keys.find(tokens[0])
    assert len(asked) == 5


async def test_what_a_hold_may_be_is_told_before_it_is_placed(shop: Shop, store: Store) -> None:
    """Of the account's money and the key's budgets the least; a release that was not written yet counts."""
    shop.credit(1_000)
    free, day, month = key_of(shop), key_of(shop, budget_day=300), key_of(shop, budget_month=200)
    for key_id, most in ((free, 1_000), (day, 300), (month, 200)):
        assert await store.available_nanousd("a", key_id) == most
        await store.hold(shop.new_hold(most, key_id))
        assert await store.available_nanousd("a", key_id) == 0
        assert isinstance(await refused(shop, store, key_id, 1), InsufficientQuota)
        await store.expire(shop.clock.now_ms + LASTS_MS + 1)
    hold = shop.new_hold(1_000, free)
    await store.hold(hold)
    store.release(hold)
    assert await store.available_nanousd("a", free) == 1_000
    assert await store.available_nanousd("nobody", free) == 0
