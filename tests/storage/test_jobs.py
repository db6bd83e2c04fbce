"""A job in the store: its budget, its keys, its end; on both kinds of stores, with several gateways."""

import asyncio
from typing import Any

import msgspec
import pytest

from embedmesh.rules import jobs
from embedmesh.rules.errors import (
    Failure,
    IdempotencyConflict,
    InsufficientQuota,
    InsufficientScope,
    NotFound,
    RateLimited,
)
from embedmesh.rules.file_failures import JobOver
from embedmesh.rules.holds import Charge, Claim, Hold, Payable
from embedmesh.rules.jobs import JobStatus, KeyedRequest, KeyedStart, NewJob, StoredJob, job_request_id
from embedmesh.rules.limits import JOB_GRACE_S, JOB_KEPT_S, JOBS_OPEN_OF_ACCOUNT_MAX
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.db import refusals
from embedmesh.storage.store import Store
from tests.storage.batching import BREAKING_JOBS, new_key
from tests.storage.shop import LASTS_MS, Shop
from tests.storage.test_books import without_defences

BEGUN, AGAIN, RUNNING = KeyedStart.BEGUN, KeyedStart.AGAIN, KeyedStart.RUNNING
HOUR_S = 3_600
COST = 10  # nano-USD of a request, of one text and seven tokens


class Client:
    """A job, and requests for it."""

    def __init__(self, shop: Shop, job: StoredJob) -> None:
        self.shop = shop
        self.job_id = job.job_id
        self.key_id = job.key_id
        self._tries = 0

    def request(self, key: str, body: str = "body", **changes: Any) -> KeyedRequest:
        """An attempt."""
        self._tries += 1
        claim = Claim(key.encode().ljust(32), body.encode().ljust(32))
        job_id = changes.get("tab_id", self.job_id)
        hold = Hold(
            job_request_id(job_id, claim.key_hash),
            "a",
            COST,
            self.shop.clock.now_ms + LASTS_MS,
            self.key_id,
            self.job_id,
        )
        return KeyedRequest(f"try_{self._tries}", msgspec.structs.replace(hold, **changes), claim, 1, 7)

    def charge(self, cost: int = COST) -> Charge:
        return Charge(
            cost_nanousd=cost,
            tokens=7,
            model="m",
            key_id=self.key_id,
            node_id="n1",
            price=cost * 1_000_000 // 7,
            payables=(Payable("n1", 3),),
        )

    async def pay(self, store: Store, key: str, body: str = "body") -> KeyedStart:
        """Begin and deliver."""
        request = self.request(key, body)
        start = await store.jobs.begin(request)
        if start is not RUNNING:
            store.jobs.end(request, start, self.charge())
            await store.drain()
        return start

    async def found(self, store: Store) -> StoredJob:
        return await store.jobs.find("a", self.job_id)


async def opened(store: Store, shop: Shop, budget: int = 100, *, key_id: str | None = None, **more: Any) -> Client:
    shop.clock.now_ms += 1  # ids begin with the time
    new = NewJob(
        account_id="a",
        key_id=key_id or new_key(shop),
        budget_nanousd=budget,
        lasts_s=more.pop("lasts_s", HOUR_S),
        **more,
    )
    return Client(shop, await store.jobs.open(new))


# -- money


async def test_each_key_is_charged_once_and_the_rest_goes_back(store: Store, shop: Shop) -> None:
    shop.credit(1_000)
    client = await opened(store, shop, name="nightly", texts_total=9)
    assert shop.money() == (1_000, 100)
    assert [await client.pay(store, key) for key in ("one", "two", "one")] == [BEGUN, BEGUN, AGAIN]
    assert shop.money() == (980, 80)
    job = await client.found(store)
    assert (job.name, job.texts_total, job.budget_nanousd, job.charged_nanousd) == ("nightly", 9, 100, 20)
    assert (job.requests, job.texts, job.tokens, job.recomputed_tokens, job.texts_lately) == (2, 2, 14, 7, 2)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 6
    told = shop.books.reports.explain(client.request("one").hold.hold_id)
    assert (told.tab_id, told.captured) == (client.job_id, COST)
    shop.assert_right()
    for _ in range(2):  # the same again changes nothing
        closed = await store.jobs.close("a", client.job_id)
        assert closed.status(shop.clock.now_ms) is JobStatus.CLOSED
        assert shop.money() == (980, 0)
    with pytest.raises(JobOver):
        await client.pay(store, "one")
    shop.assert_right()


async def test_what_is_not_delivered_is_not_charged_and_its_key_is_free(store: Store, shop: Shop) -> None:
    shop.credit(1_000)
    client = await opened(store, shop)
    request = client.request("one")
    assert await store.jobs.begin(request) is BEGUN
    store.jobs.end(request, BEGUN, None)
    assert await client.pay(store, "one", "another body") is BEGUN
    again = client.request("one", "another body")
    assert await store.jobs.begin(again) is AGAIN
    assert (await client.found(store)).recomputed_tokens == 7
    store.jobs.end(again, AGAIN, None)
    await store.drain()
    job = await client.found(store)
    assert (job.requests, job.charged_nanousd, job.recomputed_tokens) == (1, COST, 0)
    shop.assert_right()


async def test_a_budget_is_never_exceeded_by_what_is_under_way(store: Store, shop: Shop) -> None:
    """Also where all begin in one transaction; the sums are named."""
    shop.credit(1_000)
    client = await opened(store, shop, 35)
    requests = [client.request(f"key {number}") for number in range(5)]
    begun = await asyncio.gather(*map(store.jobs.begin, requests), return_exceptions=True)
    assert [each for each in begun if each is BEGUN] == [BEGUN] * 3
    refused = [str(each) for each in begun if isinstance(each, InsufficientQuota)]
    assert len(refused) == 2 and all("$0.00000001" in each and "$0.00000003" in each for each in refused)
    for request in requests[:3]:
        store.jobs.end(request, BEGUN, client.charge())
    await store.drain()
    with pytest.raises(InsufficientQuota, match=r"\$0.00000003 is charged and \$0.00 is set aside"):
        await client.pay(store, "another")
    assert await client.pay(store, "key 1") is AGAIN
    shop.assert_right()


@pytest.mark.parametrize("lack", ["money", "day", "above"])
async def test_a_job_that_is_not_covered_is_not_opened(store: Store, shop: Shop, lack: str) -> None:
    shop.credit(99 if lack == "money" else 1_000)
    key_id = new_key(shop)
    if lack == "day":
        shop.books.keys.change(key_id, limits=Limits(budget_day=99))
    elif lack == "above":
        parent, _ = shop.books.keys.create("a", ["keys", "embeddings"])
        key_id = shop.books.keys.create_below(parent.key_id, ["embeddings"])[0].key_id
        shop.books.keys.change(parent.key_id, limits=Limits(budget_day=99))
    with pytest.raises(InsufficientQuota, match=r"0\.0000001 |0\.000000099"):
        await opened(store, shop, key_id=key_id)
    assert (shop.money()[1], (await store.jobs.page("a", limit=9)).jobs) == (0, [])
    shop.assert_right()


async def test_a_job_over_nothing_is_for_models_that_cost_nothing(store: Store, shop: Shop) -> None:
    client = await opened(store, shop, 0)
    free = client.request("one", amount_nanousd=0)
    assert await store.jobs.begin(free) is BEGUN
    store.jobs.end(free, BEGUN, msgspec.structs.replace(client.charge(0), payables=()))
    with pytest.raises(InsufficientQuota):
        await client.pay(store, "two")
    assert (await client.found(store)).requests == 1
    shop.assert_right()


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "body", "failure"),
    [
        ({"tab_id": "job_none"}, "body", NotFound),
        ({"account_id": "b"}, "body", NotFound),
        ({"key_id": "another"}, "body", InsufficientScope),
        ({}, "another body", IdempotencyConflict),
    ],
)
async def test_what_a_job_does_not_pay(
    store: Store, shop: Shop, changes: dict[str, str], body: str, failure: type[Failure]
) -> None:
    shop.credit(1_000)
    shop.books.accounts.create("b")
    client = await opened(store, shop)
    await client.pay(store, "one")
    with pytest.raises(failure):
        await store.jobs.begin(client.request("one", body, **changes))
    assert (await client.found(store)).recomputed_tokens == 0
    with pytest.raises(NotFound):
        await store.jobs.find("b", client.job_id)
    with pytest.raises(NotFound):
        await store.jobs.close("b", client.job_id)
    assert shop.money() == (990, 90)


async def test_what_is_computed_again_is_bounded_by_what_was_paid(
    store: Store, shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "JOB_RECOMPUTES_MAX", 2)
    shop.credit(1_000)
    client = await opened(store, shop)
    assert [await client.pay(store, key) for key in ("one", "one", "one")] == [BEGUN, AGAIN, AGAIN]
    with pytest.raises(InsufficientQuota, match="14 tokens computed again, free, and has paid for 7"):
        await client.pay(store, "one")
    assert [await client.pay(store, key) for key in ("two", "one")] == [BEGUN, AGAIN]
    assert (await client.found(store)).recomputed_tokens == 21


async def test_an_account_has_a_bounded_number_of_jobs(store: Store, shop: Shop) -> None:
    shop.credit(1_000)
    key_id = new_key(shop)
    made = [await opened(store, shop, 1, key_id=key_id) for _ in range(JOBS_OPEN_OF_ACCOUNT_MAX)]
    with pytest.raises(RateLimited):
        await opened(store, shop, 1, key_id=key_id)
    await store.jobs.close("a", made[0].job_id)
    made.append(await opened(store, shop, 1, key_id=key_id))
    page = await store.jobs.page("a", limit=2)
    assert ([job.job_id for job in page.jobs], page.more) == ([each.job_id for each in made[:-3:-1]], True)
    rest = await store.jobs.page("a", after=made[1].job_id, limit=9)
    assert ([job.job_id for job in rest.jobs], rest.more) == ([made[0].job_id], False)


# -- ends


async def test_a_job_that_is_closed_still_charges_what_is_under_way(store: Store, shop: Shop) -> None:
    """Its money stays for that, nothing more begins; the last one to end gives the rest back."""
    shop.credit(1_000)
    client = await opened(store, shop)
    one, two = client.request("one"), client.request("two")
    assert [await store.jobs.begin(each) for each in (one, two)] == [BEGUN, BEGUN]
    closing = asyncio.ensure_future(store.jobs.close("a", client.job_id))
    while (await client.found(store)).status(shop.clock.now_ms) is JobStatus.OPEN:
        await asyncio.sleep(0)
    with pytest.raises(JobOver):
        await client.pay(store, "three")
    store.jobs.end(one, BEGUN, client.charge())
    await store.drain()
    assert shop.money() == (990, 90)
    shop.assert_right()
    store.jobs.end(two, BEGUN, None)
    assert (await closing).status(shop.clock.now_ms) is JobStatus.CLOSED
    assert shop.money() == (990, 0)
    shop.assert_right()


async def test_an_attempt_past_its_deadline_is_over(store: Store, shop: Shop) -> None:
    """Another one has its key at once, or the sweep ends it; what it delivers later is not charged."""
    shop.credit(1_000)
    client = await opened(store, shop, 20)
    old, swept = client.request("one"), client.request("two")
    assert [await store.jobs.begin(each) for each in (old, swept)] == [BEGUN, BEGUN]
    assert await client.pay(store, "one") is RUNNING
    assert await store.jobs.runs(old)
    shop.clock.now_ms += LASTS_MS + 1
    assert not await store.jobs.runs(old)
    new = client.request("one")
    assert await store.jobs.begin(new) is BEGUN
    assert await store.expire(shop.clock.now_ms) == 1
    for late in (old, swept):
        store.jobs.end(late, BEGUN, client.charge())
    store.jobs.end(new, BEGUN, client.charge())
    await store.drain()
    assert (shop.money(), store.stats.late_captures) == ((990, 10), 2)
    assert await client.pay(store, "one") is AGAIN
    shop.assert_right()


async def test_an_expired_job_gives_its_money_back(store: Store, shop: Shop) -> None:
    shop.credit(1_000)
    client = await opened(store, shop, lasts_s=60)
    await client.pay(store, "one")
    shop.clock.now_ms += 60_001
    with pytest.raises(JobOver):
        await client.pay(store, "one")
    assert (await client.found(store)).status(shop.clock.now_ms) is JobStatus.EXPIRED
    shop.clock.now_ms += int(JOB_GRACE_S * 1000)
    await store.expire(shop.clock.now_ms)
    assert shop.money() == (990, 0)
    assert (await store.jobs.close("a", client.job_id)).status(shop.clock.now_ms) is JobStatus.EXPIRED
    shop.assert_right()
    assert await store.forget() == 1, "its key"
    shop.clock.now_ms += (JOB_KEPT_S + 1) * 1000
    await store.forget()
    with pytest.raises(NotFound):
        await client.found(store)
    shop.assert_right()


async def test_a_caller_that_goes_leaves_nothing(store: Store, shop: Shop) -> None:
    """Neither a job of which nobody heard, nor an attempt."""
    shop.credit(1_000)
    client = await opened(store, shop)
    opening = asyncio.ensure_future(opened(store, shop))
    beginning = asyncio.ensure_future(store.jobs.begin(client.request("one")))
    await asyncio.sleep(0)
    opening.cancel()
    beginning.cancel()
    await asyncio.gather(opening, beginning, return_exceptions=True)
    await store.drain()
    assert shop.money() == (1_000, 100)
    assert await client.pay(store, "one") is BEGUN
    shop.assert_right()


# -- several gateways


async def test_two_gateways_charge_a_key_once(store: Store, shop: Shop) -> None:
    """Whatever comes at one moment: one begins, all others wait; afterwards all know that it was charged."""
    shop.credit(1_000)
    client = await opened(store, shop)
    other = await shop.open()
    try:
        for key in ("one", "two", "three"):
            tries = [(each, client.request(key)) for each in (store, other) * 4]
            starts = await asyncio.gather(*(each.jobs.begin(request) for each, request in tries))
            assert sorted(start.value for start in starts) == ["begun", *["running"] * 7]
            ((one, request),) = [made for made, start in zip(tries, starts, strict=True) if start is BEGUN]
            one.jobs.end(request, BEGUN, client.charge())
            await one.drain()
            assert [await client.pay(each, key) for each in (store, other)] == [AGAIN, AGAIN]
        assert (await client.found(other)).charged_nanousd == 3 * COST
        closed = await other.jobs.close("a", client.job_id)
        assert closed.status(shop.clock.now_ms) is JobStatus.CLOSED
        assert shop.money() == (970, 0)
        shop.assert_right()
    finally:
        await other.close()


async def test_a_gateway_that_starts_again_drops_its_attempts_and_no_others(store: Store, shop: Shop) -> None:
    """The keys are free at once; a job that was closed meanwhile ends then."""
    shop.credit(1_000)
    client, closing = await opened(store, shop), await opened(store, shop)
    dead = await shop.open()
    name = dead._opened.instance.name
    for each in (client, closing):
        assert await dead.jobs.begin(each.request("dead")) is BEGUN
    assert await store.jobs.begin(client.request("alive")) is BEGUN
    assert (await store.jobs.close("a", closing.job_id)).status(shop.clock.now_ms) is JobStatus.CLOSING
    await dead.close()  # what it had in flight stays, as after a kill
    again = await shop.open()
    try:
        assert again._opened.instance.name == name
        assert await client.pay(again, "dead") is BEGUN
        assert await client.pay(again, "alive") is RUNNING
        assert (await closing.found(store)).status(shop.clock.now_ms) is JobStatus.CLOSED
        shop.assert_right()
    finally:
        await again.close()


# -- the schema, and the check


@pytest.mark.parametrize(("promise", "breaking"), BREAKING_JOBS)
async def test_the_check_sees_what_was_done_to_jobs(shop: Shop, store: Store, promise: str, breaking: str) -> None:
    shop.credit(1_000)
    client = await opened(store, shop)
    await client.pay(store, "one")
    await store.jobs.begin(client.request("two"))
    shop.assert_right()
    with shop.by_hand() as db:
        without_defences(db)
        db.execute(breaking)
    assert promise in {broken.promise for broken in shop.books.check().broken}


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        ("UPDATE jobs SET key_id = 'another'", "keeps its terms"),
        ("UPDATE jobs SET tokens = 0", "only grows"),
        ("DELETE FROM jobs", "until its requests were deleted"),
        ("UPDATE job_requests SET done_ms = 1 WHERE done_ms IS NOT NULL", "done once"),
        ("UPDATE job_requests SET amount = amount + 1", "done once"),
        ("DELETE FROM job_requests", "as long as the job"),
        (
            "INSERT INTO jobs (job_id, account_id, key_id, created_ms, expires_ms) "
            "SELECT 'job_0', account_id, key_id, 1, 1 FROM jobs",
            "a tab of its own",
        ),
    ],
)
async def test_the_store_defends_its_jobs(shop: Shop, store: Store, tampering: str, says: str) -> None:
    shop.credit(1_000)
    client = await opened(store, shop)
    await client.pay(store, "one")
    await store.jobs.begin(client.request("two"))
    with shop.by_hand() as db, pytest.raises(refusals(), match=says):
        db.execute(tampering)
