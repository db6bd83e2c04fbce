"""A batch in the store: its money, its units, its leases, its end; on both kinds of stores."""

import asyncio
from collections.abc import Awaitable, Callable

import msgspec
import pytest

from embedmesh.rules.batches import (
    MOVES,
    BatchLease,
    BatchMove,
    BatchState,
    LeaseLost,
    LineError,
    UnitEnd,
    line_request_id,
)
from embedmesh.rules.errors import InsufficientQuota, InternalError, NotFound, Overloaded, RateLimited, StoreUnavailable
from embedmesh.rules.file_failures import TooMuchKept
from embedmesh.rules.holds import Hold
from embedmesh.rules.limits import (
    BATCH_GRACE_S,
    BATCHES_OF_ACCOUNT_A_DAY_MAX,
    BATCHES_OPEN_OF_ACCOUNT_MAX,
    BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX,
)
from embedmesh.rules.tabs import Tab
from embedmesh.storage import batches
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.db import refusals
from embedmesh.storage.ledger.open_tab import OpenTab
from embedmesh.storage.store import Store
from tests.storage.batching import (
    ROOM,
    asks,
    begun,
    completed,
    new_file,
    new_key,
    new_output,
    plan_of,
    results_of,
    units_of,
    work_off,
)
from tests.storage.shop import LASTS_MS, Shop, charge

DAY_MS = 86_400_000


async def validating(store: Store, shop: Shop, key_id: str) -> BatchLease:
    """A batch that was just leased."""
    if await store.files.find("a", "file-1") is None:
        await store.files.add(new_file(shop), bytes_max=ROOM)
    await store.batches.create(asks(key_id))
    taken = await store.batches.lease()
    assert taken is not None
    return taken[0]


# -- money


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_batch_is_charged_line_by_line_and_gives_the_rest_back(store: Store, shop: Shop, failing: int) -> None:
    """All of its money is held; what its lines cost is taken, what failed costs nothing, nothing stays held."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    assert shop.money() == (1_000, 50)
    await work_off(store, lease, units, key_id, failing=failing)
    good = 5 - 2 * failing
    assert shop.money() == (1_000 - 10 * good, 20 * failing)
    batch = await completed(store, shop, lease, failed=2 * failing)
    assert (batch.state, batch.total, batch.completed, batch.failed) == (BatchState.COMPLETED, 5, good, 2 * failing)
    assert batch.used.input == good
    assert (batch.error_file_id is None) == (not failing)
    assert shop.money() == (1_000 - 10 * good, 0)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 3 * good
    today = shop.clock.now_ms // DAY_MS
    used = shop.books.reports.usage("a", today, today)
    assert (sum(row.requests for row in used), sum(row.cost for row in used)) == (good, 10 * good)
    shop.assert_right()


async def test_a_line_and_a_batch_are_explained(store: Store, shop: Shop) -> None:
    """As a request under a tab: the tab is the batch's, and has its id; so on the statement."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, lease, units, key_id, failing=1)
    told = shop.books.reports.explain(line_request_id(lease.batch_id, 4))
    assert (told.tab_id, told.captured, told.line, told.key_id) == (lease.batch_id, 10, 5, key_id)
    with pytest.raises(NotFound):
        shop.books.reports.explain(line_request_id(lease.batch_id, 0))
    tab = shop.books.reports.explain_tab(lease.batch_id)
    assert (tab.gateway, tab.amount, tab.captured, tab.requests, tab.state) == (lease.batch_id, 50, 30, 3, "open")
    assert tab.batch is not None
    assert (tab.batch.state, tab.batch.lines, tab.batch.completed, tab.batch.failed) == ("in_progress", 5, 3, 2)
    charges = [entry for entry in shop.books.reports.entries("a") if entry.kind == "charge"]
    assert [(entry.tab_id, entry.requests, entry.amount) for entry in charges] == [
        (lease.batch_id, 1, -10),
        (lease.batch_id, 2, -20),
    ]
    assert shop.books.accounts.refund(line_request_id(lease.batch_id, 4), 4, "sorry") == (True, 4)
    shop.assert_right()


@pytest.mark.parametrize("lack", ["money", "day", "month", "above"])
async def test_a_batch_that_is_not_covered_is_refused_whole(store: Store, shop: Shop, lack: str) -> None:
    """The sum is named, nothing is held, and the batch can say so and end."""
    shop.credit(49 if lack == "money" else 1_000)
    key_id = new_key(shop)
    if lack == "day":
        shop.books.keys.change(key_id, limits=Limits(budget_day=49))
    elif lack == "month":
        shop.books.keys.change(key_id, limits=Limits(budget_month=49))
    elif lack == "above":
        parent, _ = shop.books.keys.create("a", ["keys", "embeddings"])
        key_id = shop.books.keys.create_below(parent.key_id, ["embeddings"])[0].key_id
        shop.books.keys.change(parent.key_id, limits=Limits(budget_day=49))
    lease = await validating(store, shop, key_id)
    units = units_of([3, 2])
    await store.batches.add_units(lease, units)
    with pytest.raises(InsufficientQuota, match=r"0\.00000005 |0\.000000049"):
        await store.batches.begin(lease, plan_of(units), bytes_max=ROOM)
    assert shop.money()[1] == 0
    errors = [LineError("insufficient_quota", "too little", line=3, param="x"), LineError("x", "y")]
    batch = await store.batches.fail(lease, errors, total=5)
    assert (batch.state, batch.errors, batch.total) == (BatchState.FAILED, tuple(errors), 5)
    assert await store.batches.lease() is None
    shop.assert_right()


async def test_money_in_tabs_of_gateways_is_recalled_for_a_batch(store: Store, shop: Shop) -> None:
    """As for a hold: what they have not spent is there for it."""
    shop.credit(6_400)
    key_id = new_key(shop)
    hearing = [asyncio.ensure_future(each) for each in store.background()]
    for _ in range(20):
        hold = shop.new_hold(10, key_id)
        spent = store.spend(hold)
        if spent is None:
            await store.hold(hold)
        store.release(spent or hold)
        await store.drain()
    lease = await validating(store, shop, key_id)
    units = units_of([320, 320])
    await store.batches.add_units(lease, units)
    assert store.has_tab(key_id)
    await store.batches.begin(lease, plan_of(units), bytes_max=ROOM)
    assert shop.money() == (6_400, 6_400)
    for task in hearing:
        task.cancel()
    await asyncio.gather(*hearing, return_exceptions=True)
    shop.assert_right()


async def test_nobody_has_the_money_of_a_batch(shop: Shop) -> None:
    """Not by a recall; not by the start of a gateway; it is not told as available; the sweep ends it after its time."""
    store = await shop.open()
    shop.credit(100)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [5, 5])
    assert await store.available_nanousd("a", key_id) == 0
    with pytest.raises(InsufficientQuota):
        await store.hold(shop.new_hold(1, key_id))
    await store.close()
    again = await shop.open()
    assert (again.stats.tabs_recovered, shop.money()) == (0, (100, 100))
    taken = await again.batches.lease()  # at once: whoever had it is gone
    assert taken is not None
    assert taken[0].epoch == lease.epoch + 1
    await work_off(again, taken[0], units[:1], key_id)
    shop.clock.now_ms += DAY_MS + int(BATCH_GRACE_S * 1000) - 1
    await again.expire(shop.clock.now_ms)
    assert shop.money() == (50, 50)
    shop.clock.now_ms += 2
    await again.expire(shop.clock.now_ms)
    assert shop.money() == (50, 0)
    assert await again.batches.finish_unit(taken[0], results_of(units[1], key_id)) is UnitEnd.NO_MONEY
    output = new_output(shop, "file-out")
    batch = await again.batches.finish(taken[0], output, new_output(shop, "file-err"), failed=5)
    assert (batch.state, batch.completed, batch.failed) == (BatchState.EXPIRED, 5, 5)
    shop.assert_right()
    await again.close()


async def test_a_batch_of_a_free_model_costs_nothing(store: Store, shop: Shop) -> None:
    """An account without money may have one."""
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2], price=0)
    for unit in units:
        assert await store.batches.finish_unit(lease, results_of(unit, key_id, cost=0)) is UnitEnd.DONE
    assert (await completed(store, shop, lease)).state is BatchState.COMPLETED
    assert shop.money() == (0, 0)
    shop.assert_right()


async def test_more_than_was_set_aside_is_never_charged(store: Store, shop: Shop) -> None:
    """That would be a bug of ours: nothing of the unit is written, and it is counted."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3])
    with pytest.raises(InternalError):
        await store.batches.finish_unit(lease, results_of(units[0], key_id, cost=17))
    await store.drain()
    assert store.stats.broken_writes == 1
    assert shop.money() == (1_000, 30)
    right = results_of(units[0], key_id)
    with pytest.raises(ValueError, match="charged once"):
        await store.batches.finish_unit(lease, msgspec.structs.replace(right, charges=[right.charges[0]] * 2))
    await work_off(store, lease, units, key_id)
    shop.assert_right()


# -- once


async def test_a_unit_is_charged_once_whoever_says_it_how_often(store: Store, shop: Shop) -> None:
    """The same results again are the same; others come too late; nobody is charged by them."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    first = results_of(units[0], key_id, segment="one")
    ends = await asyncio.gather(*(store.batches.finish_unit(lease, first) for _ in range(3)))
    assert ends == [UnitEnd.DONE] * 3
    other = results_of(units[0], key_id, segment="two", failing=1)
    assert await store.batches.finish_unit(lease, other) is UnitEnd.DONE_BEFORE
    assert shop.money() == (970, 20)
    (done,) = await store.batches.done_units(lease, limit=10)
    assert (done.unit, done.segment) == (units[0], first.segment)
    assert await store.batches.open_units(lease, limit=10) == [units[1]]
    assert await store.batches.open_units(lease, after=1, limit=10) == []
    assert store.stats.units_finished == 1
    shop.assert_right()


async def test_who_has_lost_a_batch_writes_nothing(store: Store, shop: Shop) -> None:
    """Whatever it tries, after another has taken the batch over."""
    shop.credit(1_000)
    key_id = new_key(shop)
    old, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, old, units[:1], key_id)
    shop.clock.now_ms += 9_999
    await store.batches.renew(old)
    shop.clock.now_ms += 10_000
    assert await store.batches.lease() is None
    shop.clock.now_ms += 1
    taken = await store.batches.lease()
    assert taken is not None
    new = taken[0]
    assert (new.batch_id, new.epoch) == (old.batch_id, old.epoch + 1)
    tries: list[Callable[[], Awaitable[object]]] = [
        lambda: store.batches.renew(old),
        lambda: store.batches.clear_units(old),
        lambda: store.batches.add_units(old, units),
        lambda: store.batches.begin(old, plan_of(units), bytes_max=ROOM),
        lambda: store.batches.fail(old, []),
        lambda: store.batches.finish_unit(old, results_of(units[1], key_id)),
        lambda: store.batches.finalize(old),
        lambda: store.batches.finish(old, new_output(shop, "file-x"), None, failed=0),
    ]
    for attempt in tries:
        with pytest.raises(LeaseLost):
            await attempt()
    await store.batches.release(old)  # harmless
    assert shop.money() == (970, 20)
    await work_off(store, new, units[1:], key_id)
    assert (await completed(store, shop, new)).completed == 5
    shop.assert_right()


async def test_every_step_may_be_said_again(store: Store, shop: Shop) -> None:
    """Nobody knows what became of a write when the store did not answer: the same again changes nothing."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease = await validating(store, shop, key_id)
    units = units_of([3, 2])
    for _ in range(2):
        await store.batches.add_units(lease, units)
    for _ in range(2):
        batch = await store.batches.begin(lease, plan_of(units), bytes_max=ROOM)
        assert (batch.state, batch.amount_nanousd) == (BatchState.IN_PROGRESS, 50)
    assert shop.money() == (1_000, 50)
    await work_off(store, lease, units, key_id)
    await work_off(store, lease, units, key_id)
    assert (await store.batches.finalize(lease)).state is BatchState.FINALIZING
    assert (await completed(store, shop, lease)).state is BatchState.COMPLETED
    again = await store.batches.finish(lease, new_output(shop, f"file-out-{lease.batch_id}"), None, failed=0)
    assert again.state is BatchState.COMPLETED
    with pytest.raises(LeaseLost):
        await store.batches.finish(lease, new_output(shop, "file-other"), None, failed=0)
    assert shop.money() == (950, 0)
    assert len((await store.files.page("a", limit=10)).files) == 2
    shop.assert_right()


async def test_a_batch_of_which_its_caller_did_not_hear_is_not_there(store: Store, shop: Shop) -> None:
    """SDKs send it again: it must not be worked off twice."""
    key_id = new_key(shop)
    await store.files.add(new_file(shop), bytes_max=ROOM)
    real = store.batches._write

    async def unheard(*given: object) -> object:
        await real(*given)  # type: ignore[arg-type]
        raise StoreUnavailable("it was written, and nobody heard of it")

    store.batches._write = unheard  # type: ignore[assignment]
    with pytest.raises(StoreUnavailable):
        await store.batches.create(asks(key_id))
    store.batches._write = real
    await store.drain()
    assert (await store.batches.page("a", limit=10)).batches == []
    assert await store.batches.lease() is None


# -- validation


async def test_a_validation_begins_anew(store: Store, shop: Shop) -> None:
    """Units of one that was broken off are no part of the next."""
    shop.credit(10_000)
    key_id = new_key(shop)
    lease = await validating(store, shop, key_id)
    await store.batches.add_units(lease, units_of([1] * 1_200))
    assert len(await store.batches.open_units(lease, limit=10_000)) == 512  # a page
    await store.batches.clear_units(lease)
    units = units_of([3, 2])
    await store.batches.add_units(lease, units)
    with pytest.raises(LeaseLost):
        await store.batches.begin(lease, plan_of(units_of([3, 3])), bytes_max=ROOM)
    assert shop.money() == (10_000, 0)
    await store.batches.begin(lease, plan_of(units), bytes_max=ROOM)
    with pytest.raises(LeaseLost):
        await store.batches.clear_units(lease)
    assert await store.batches.open_units(lease, limit=10) == units
    shop.assert_right()


async def test_room_is_kept_for_the_output(store: Store, shop: Shop) -> None:
    """What the account keeps, and what its other batches need, count; what a batch has kept is free when it is over."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])  # a file of 100, and 500 of output
    assert (await store.files.kept("a")).reserved == 500
    other = await validating(store, shop, key_id)
    await store.batches.add_units(other, units)
    with pytest.raises(TooMuchKept, match="500"):
        await store.batches.begin(other, plan_of(units), bytes_max=1_099)
    assert shop.money() == (1_000, 50)
    with pytest.raises(TooMuchKept):
        await store.files.add(new_file(shop, "file-2", size=1), bytes_max=600)
    await store.batches.begin(other, plan_of(units), bytes_max=1_100)
    await work_off(store, lease, units, key_id)
    await completed(store, shop, lease)
    kept = await store.files.kept("a")
    assert (kept.files, kept.bytes, kept.reserved) == (2, 110, 500)


# -- leases


async def test_batches_are_shared_out_by_account(store: Store, shop: Shop) -> None:
    """An account that sends a hundred does not keep another waiting; of one account the oldest comes first."""
    shop.books.accounts.create("b")
    keys = {"a": new_key(shop), "b": new_key(shop, "b")}
    made: dict[str, list[str]] = {"a": [], "b": []}
    for account, number in (("a", 4), ("b", 2)):
        await store.files.add(new_file(shop, f"file-{account}", account_id=account), bytes_max=ROOM)
        for _ in range(number):
            shop.clock.now_ms += 1
            new = asks(keys[account], account_id=account, file_id=f"file-{account}")
            made[account].append((await store.batches.create(new)).batch_id)
    order = []
    while (taken := await store.batches.lease()) is not None:
        order.append(taken[0].batch_id)
    a, b = made["a"], made["b"]
    assert order == [a[0], b[0], a[1], b[1], a[2], a[3]]


async def test_a_batch_is_leased_once(store: Store, shop: Shop) -> None:
    """However many gateways ask at one moment; released, it can be had at once."""
    key_id = new_key(shop)
    await store.files.add(new_file(shop), bytes_max=ROOM)
    for _ in range(3):
        await store.batches.create(asks(key_id))
    other = await shop.open()
    taken = await asyncio.gather(*(each.batches.lease() for each in (store, other) * 5))
    leases = [each[0] for each in taken if each is not None]
    assert len(leases) == len({lease.batch_id for lease in leases}) <= 3
    while (more := await other.batches.lease()) is not None:
        leases.append(more[0])
    assert len({lease.batch_id for lease in leases}) == 3
    await store.batches.release(leases[1])
    again = await other.batches.lease()
    assert again is not None
    assert (again[0].batch_id, again[0].epoch) == (leases[1].batch_id, 2)
    await other.close()


# -- by their account


async def test_an_account_sees_its_own_batches_only(store: Store, shop: Shop) -> None:
    """It cannot read, list or cancel another's, nor make one of another's file."""
    shop.books.accounts.create("b")
    key_id, theirs = new_key(shop), new_key(shop, "b")
    await store.files.add(new_file(shop), bytes_max=ROOM)
    ids = []
    for _ in range(5):
        shop.clock.now_ms += 1
        ids.append((await store.batches.create(asks(key_id))).batch_id)
    assert await store.batches.find("b", ids[0]) is None
    assert await store.batches.cancel("b", ids[0]) is None
    with pytest.raises(NotFound) as refused:
        await store.batches.create(asks(theirs, account_id="b"))
    assert refused.value.param == "input_file_id"
    assert (await store.batches.page("b", limit=10)).batches == []
    page = await store.batches.page("a", limit=2)
    assert ([each.batch_id for each in page.batches], page.more) == ([ids[4], ids[3]], True)
    page = await store.batches.page("a", after=ids[3], limit=3)
    assert ([each.batch_id for each in page.batches], page.more) == ([ids[2], ids[1], ids[0]], False)
    assert page.batches[0].metadata == {"for": "tests"}
    found = await store.batches.find("a", ids[0])
    assert found is not None
    assert found.state is BatchState.VALIDATING


@pytest.mark.parametrize("spoiled", ["deleted", "expired", "output"])
async def test_a_batch_needs_a_file_for_batches(store: Store, shop: Shop, spoiled: str) -> None:
    """One that is there, and of that purpose."""
    key_id = new_key(shop)
    await store.files.add(new_output(shop, "file-1") if spoiled == "output" else new_file(shop), bytes_max=ROOM)
    if spoiled == "deleted":
        await store.files.delete("a", "file-1")
    elif spoiled == "expired":
        shop.clock.now_ms += 30 * DAY_MS
    with pytest.raises(NotFound):
        await store.batches.create(asks(key_id))


async def test_an_account_has_a_bounded_number_of_open_batches(store: Store, shop: Shop) -> None:
    """And finds room again when one is over."""
    key_id = new_key(shop)
    await store.files.add(new_file(shop), bytes_max=ROOM)
    for _ in range(BATCHES_OPEN_OF_ACCOUNT_MAX):
        await store.batches.create(asks(key_id))
    with pytest.raises(RateLimited, match="not over"):
        await store.batches.create(asks(key_id))
    taken = await store.batches.lease()
    assert taken is not None
    await store.batches.fail(taken[0], [])
    await store.batches.create(asks(key_id))


@pytest.mark.parametrize(
    ("charged", "number"), [(0, BATCHES_UNPAID_OF_ACCOUNT_A_DAY_MAX), (1, BATCHES_OF_ACCOUNT_A_DAY_MAX)]
)
async def test_batches_that_fail_do_not_fill_the_store(store: Store, shop: Shop, charged: int, number: int) -> None:
    """Their rows are kept, so a day has a bound of them; a smaller one holds for those that nobody has paid for."""
    key_id = new_key(shop)
    await store.files.add(new_file(shop), bytes_max=ROOM)
    await store.batches.create(asks(key_id))
    copied = (
        "INSERT INTO batches (batch_id, account_id, key_id, endpoint, input_file_id, window_s, output_expires_s, "
        "created_ms, expires_ms) SELECT substr(batch_id, 1, 20) || {number}, account_id, key_id, endpoint, "
        "input_file_id, window_s, output_expires_s, created_ms, expires_ms FROM batches LIMIT 1"
    )
    with shop.by_hand() as db:
        db.begin()
        for made in range(10_000, 10_000 + number - 2):
            db.execute(copied.format(number=made))
        db.execute(f"UPDATE batches SET state = 'failed', ended_ms = {shop.clock.now_ms}, charged = {charged}")
        db.commit()
    batch = await store.batches.create(asks(key_id))
    with shop.by_hand() as db:
        db.begin()
        db.execute(f"UPDATE batches SET charged = {charged} WHERE batch_id = '{batch.batch_id}'")
        db.commit()
    with pytest.raises(RateLimited, match="in 24 hours"):
        await store.batches.create(asks(key_id))
    shop.clock.now_ms += DAY_MS + 1
    await store.batches.create(asks(key_id))


async def test_no_account_takes_all_open_batches(store: Store, shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a share of what is free, so that another finds some."""
    monkeypatch.setitem(batches.LIMITS, "of_all", 10)
    shop.books.accounts.create("b")
    keys = {"a": new_key(shop), "b": new_key(shop, "b")}
    made = {"a": 0, "b": 0}
    for account in ("a", "b"):
        await store.files.add(new_file(shop, f"file-{account}", account_id=account), bytes_max=ROOM)
        with pytest.raises(Overloaded, match="of each account a share"):
            while True:
                await store.batches.create(asks(keys[account], account_id=account, file_id=f"file-{account}"))
                made[account] += 1
    assert made == {"a": 8, "b": 2}


@pytest.mark.parametrize("how", ["cancel", "revoke", "revoke above"])
async def test_a_cancelled_batch_pays_for_what_was_done(store: Store, shop: Shop, how: str) -> None:
    """By its account, or because its key was revoked: what is under way ends, the rest costs nothing."""
    shop.credit(1_000)
    parent, _ = shop.books.keys.create("a", ["keys", "embeddings"])
    key_id = shop.books.keys.create_below(parent.key_id, ["embeddings"])[0].key_id
    lease, units = await begun(store, shop, key_id, [3, 2, 4])
    await work_off(store, lease, units[:1], key_id)
    if how == "cancel":
        batch = await store.batches.cancel("a", lease.batch_id)
        assert batch is not None
        assert batch.state is BatchState.CANCELLING
    else:
        shop.books.keys.revoke(key_id if how == "revoke" else parent.key_id)
    assert (await store.batches.renew(lease)).state is BatchState.CANCELLING
    await work_off(store, lease, units[1:2], key_id)
    with pytest.raises(LeaseLost):
        await store.batches.finalize(lease)
    again = await store.batches.cancel("a", lease.batch_id)
    assert again is not None
    batch = await store.batches.finish(lease, new_output(shop, "file-o"), new_output(shop, "file-e"), failed=4)
    assert (batch.state, batch.completed, batch.failed) == (BatchState.CANCELLED, 5, 4)
    assert shop.money() == (950, 0)
    assert await store.batches.cancel("a", lease.batch_id) == batch
    with pytest.raises(LeaseLost):
        await store.batches.renew(lease)
    shop.assert_right()


async def test_a_batch_goes_on_when_its_key_is_rotated(store: Store, shop: Shop) -> None:
    """Its money was set aside while the key was good; what it holds and spends counts for the new key."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, lease, units[:1], key_id)
    new, _ = shop.books.keys.rotate(key_id, overlap_s=0)
    shop.assert_right()
    shop.books.keys.change(new.key_id, limits=Limits(budget_day=59))
    with pytest.raises(InsufficientQuota, match=r"0\.000000009 is left"):  # 30 were spent, 20 are held
        await store.hold(shop.new_hold(10, new.key_id))
    shop.clock.now_ms += 1
    assert (await store.batches.renew(lease)).state is BatchState.IN_PROGRESS
    await work_off(store, lease, units[1:], key_id)
    assert (await completed(store, shop, lease)).completed == 5
    shop.assert_right()


async def test_a_revoked_key_begins_no_batch(store: Store, shop: Shop) -> None:
    """Though it was good when the batch was made."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease = await validating(store, shop, key_id)
    units = units_of([1])
    await store.batches.add_units(lease, units)
    shop.books.keys.revoke(key_id)
    with pytest.raises(LeaseLost):
        await store.batches.begin(lease, plan_of(units), bytes_max=ROOM)
    assert (await store.batches.renew(lease)).state is BatchState.CANCELLING
    assert shop.money() == (1_000, 0)


@pytest.mark.parametrize(("said", "counted"), [(0, 1), (2, 2), (3, 3), (9, 3)])
async def test_a_batch_ends_though_results_were_lost(store: Store, shop: Shop, said: int, counted: int) -> None:
    """Whatever is in the error file: what was completed and what failed are together at most all lines."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, lease, units[:1], key_id, failing=1)
    await store.batches.cancel("a", lease.batch_id)
    batch = await store.batches.finish(lease, None, new_output(shop, "file-e"), failed=said)
    assert (batch.state, batch.completed, batch.failed) == (BatchState.CANCELLED, 2, counted)
    shop.assert_right()


# -- states, upkeep

PATHS: dict[BatchState, list[str]] = {
    BatchState.VALIDATING: [],
    BatchState.IN_PROGRESS: ["in_progress"],
    BatchState.FINALIZING: ["in_progress", "finalizing"],
    BatchState.CANCELLING: ["cancelling"],
    BatchState.COMPLETED: ["in_progress", "finalizing", "completed"],
    BatchState.FAILED: ["failed"],
    BatchState.EXPIRED: ["expired"],
    BatchState.CANCELLED: ["cancelling", "cancelled"],
}


@pytest.mark.parametrize("state", list(BatchState))
async def test_the_schema_moves_a_batch_as_the_table_says(store: Store, shop: Shop, state: BatchState) -> None:
    """And in no other way, whoever writes."""
    key_id = new_key(shop)
    await store.files.add(new_file(shop), bytes_max=ROOM)
    batch = await store.batches.create(asks(key_id))
    allowed = {to.value for (before, _), to in MOVES.items() if before is state}
    final = {each.value for each in BatchState if each.final}
    with shop.by_hand() as db:
        db.execute(
            "INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms) "
            f"VALUES ('{batch.batch_id}', 'a', '{key_id}', '{batch.batch_id}', 0, 1, {shop.clock.now_ms + DAY_MS})"
        )
        for to in PATHS[state]:
            if to in final:
                db.execute("UPDATE tabs SET state = 'closed', ended_ms = 1")
            db.execute(f"UPDATE batches SET state = '{to}', ended_ms = {1 if to in final else 'NULL'}")
        moved = set()
        for to in {each.value for each in BatchState} - {state.value}:
            db.begin()
            try:
                if to in final and state.value not in final:
                    db.execute("UPDATE tabs SET state = 'closed', ended_ms = 1")
                db.execute(f"UPDATE batches SET state = '{to}', ended_ms = {1 if to in final else 'NULL'}")
                moved.add(to)
            except refusals():
                pass
            db.rollback()
    assert moved == allowed


def test_the_table_has_every_move() -> None:
    """And whatever is final is final."""
    assert {move for _, move in MOVES} == set(BatchMove)
    assert not any(state.final for state, _ in MOVES)
    reached = {BatchState.VALIDATING, *MOVES.values()}
    assert reached == set(BatchState)


async def test_what_is_over_is_swept_and_forgotten(store: Store, shop: Shop) -> None:
    """Units at once, the batch when it is old; its lines stay charged and explained."""
    shop.credit(10_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [1] * 600)
    await work_off(store, lease, units, key_id)
    assert await store.batches.unswept() == []
    assert await store.batches.ended([lease.batch_id, "batch_x"]) == {"batch_x"}
    await completed(store, shop, lease)
    assert await store.batches.ended([lease.batch_id]) == {lease.batch_id}
    assert await store.batches.unswept() == [lease.batch_id]
    await store.batches.sweep(lease.batch_id)
    assert await store.batches.unswept() == []
    assert await store.batches.done_units(lease, limit=1) == []
    shop.assert_right()
    assert await store.batches.forget() == 0
    shop.clock.now_ms += 30 * DAY_MS + 1
    assert await store.batches.forget() == 1
    assert await store.batches.find("a", lease.batch_id) is None
    assert shop.books.reports.explain(line_request_id(lease.batch_id, 599)).line == 600
    assert shop.books.reports.explain_tab(lease.batch_id).batch is None
    shop.assert_right()


async def test_other_tabs_of_the_account_go_on(store: Store, shop: Shop) -> None:
    """A gateway's tab beside a batch's is recalled, settled and closed as ever."""
    shop.credit(6_400)
    key_id = new_key(shop)
    await begun(store, shop, key_id, [10])
    tab = Tab("tab_1", "a", key_id, shop.clock.now_ms + LASTS_MS)
    write = OpenTab(tab, "gw_1", 50, 1)
    store._writer.submit(write)
    assert await write.outcome == 50
    assert shop.money() == (6_400, 150)
    hold = Hold("req_9", "a", 6_250, shop.clock.now_ms + LASTS_MS, key_id)
    await store.hold(hold)
    store.capture(hold, charge(6_250, key_id=key_id))
    await store.drain()
    assert shop.money() == (150, 150)
    shop.assert_right()
