"""Prices, refunds, payouts, statements, and a request explained."""

from datetime import UTC, datetime

import msgspec
import pytest

from embedmesh.rules.errors import InvalidValue, NotFound
from embedmesh.rules.holds import Hold, Meter, Metered
from embedmesh.rules.models import Model
from embedmesh.storage.books.reports import Bought, StatementLine
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY, month_span_ms
from embedmesh.storage.upkeep import Retention
from tests.storage.shop import START_MS, Shop, charge

MODEL = Model(id="m", folder="", width=4, max_tokens=8, price=100, digest="0" * 64)


async def paid(shop: Shop, store: Store, amount: int = 10, payable: int = 3) -> Hold:
    hold = shop.new_hold(amount)
    await store.hold(hold)
    store.capture(hold, charge(amount, payable=payable))
    await store.drain()
    return hold


# -- prices ------------------------------------------------------------------------------------------------------------


async def test_the_most_particular_price_counts(shop: Shop, store: Store) -> None:
    """The catalogue's, the store's for all, the account's own; each until it ends."""
    prices = shop.books.prices
    shop.books.accounts.create("b")

    async def seen() -> tuple[int, int]:
        await store.prices.look()
        return store.prices.of(MODEL, "a"), store.prices.of(MODEL, "b")

    assert await seen() == (100, 100)
    prices.set("m", 70)
    assert await seen() == (70, 70)
    prices.set("m", 0, account_id="b")
    assert await seen() == (70, 0)
    prices.set("m", 80)
    assert await seen() == (80, 0)
    assert prices.end("m", account_id="b")
    assert await seen() == (80, 80)
    assert prices.end("m")
    assert not prices.end("m")
    assert await seen() == (100, 100)
    assert [(one.price, one.account_id) for one in prices.list("m")] == [(80, None), (0, "b"), (70, None)]
    assert all(one.to_ms is not None for one in prices.list())
    latest = prices.list("m")[0]
    assert prices.list("m", after=latest.price_id) == prices.list("m")[1:]


async def test_a_price_begins_when_it_is_said_to(shop: Shop, store: Store) -> None:
    """Until then the one before it holds; one that was to begin later and is replaced never does."""
    prices, begins = shop.books.prices, shop.clock.now_ms + 1_000
    prices.set("m", 1)
    prices.set("m", 2, from_ms=begins)
    shop.clock.now_ms = begins - 1
    await store.prices.look()
    assert store.prices.of(MODEL, "a") == 1
    shop.clock.now_ms = begins
    await store.prices.look()
    assert store.prices.of(MODEL, "a") == 2
    prices.set("m", 3, from_ms=begins + 500)
    assert prices.end("m")  # both: the one that holds, and the one that was to follow
    await store.prices.look()
    assert store.prices.of(MODEL, "a") == 100
    assert not prices.end("m")
    prices.set("m", 3, from_ms=begins + 500)
    prices.set("m", 4)
    shop.clock.now_ms += 600
    await store.prices.look()
    assert store.prices.of(MODEL, "a") == 4


WRITER = Model(
    id="w",
    width=0,
    max_tokens=8,
    price=100,
    modalities=("chat", "images"),
    output_price=400,
    cached_price=25,
    image_prices={"64x64": 3, "8x8": 1},
)


async def test_each_meter_has_a_price_of_its_own(shop: Shop, store: Store) -> None:
    """The account's own, the store's for all, the catalogue's; cached input never costs more than other input."""
    prices = shop.books.prices

    async def seen(account_id: str = "a", model: Model = WRITER) -> tuple[int, ...]:
        await store.prices.look()
        tokens = [store.prices.meter(model, account_id, each) for each in (Meter.INPUT, Meter.CACHED, Meter.OUTPUT)]
        return store.prices.of(model, account_id), *tokens, store.prices.image(model, account_id, "64x64") // 10**6

    assert await seen() == (100, 100, 25, 400, 3)
    assert await seen(model=msgspec.structs.replace(WRITER, cached_price=None)) == (100, 100, 100, 400, 3)
    prices.set("w", 300, meter="output")
    prices.set("w", 7, meter="images:64x64")
    prices.set("w", 30, meter="cached", account_id="a")
    assert await seen() == (100, 100, 30, 300, 7)
    assert await seen("b") == (100, 100, 25, 300, 7)
    prices.set("w", 200, meter="output", account_id="a")
    prices.set("w", 5, meter="images:64x64", account_id="a")
    prices.set("w", 20, account_id="a")
    assert await seen() == (20, 20, 20, 200, 5)
    assert await seen("b") == (100, 100, 25, 300, 7)
    assert prices.end("w", meter="output") and not prices.end("w", meter="output")
    assert prices.end("w", meter="images:64x64", account_id="a")
    assert await seen() == (20, 20, 20, 200, 7)
    assert await seen("b") == (100, 100, 25, 400, 7)
    assert store.prices.image(WRITER, "a", "8x8") == 10**6
    with pytest.raises(KeyError):
        store.prices.image(WRITER, "a", "9x9")
    listed = [(one.meter, one.price, one.account_id) for one in reversed(prices.list("w"))]
    assert listed[:3] == [("output", 300, None), ("images:64x64", 7, None), ("cached", 30, "a")]


async def test_a_price_of_output_leaves_that_of_input_as_it_is(shop: Shop, store: Store) -> None:
    """They begin, follow each other and end by themselves."""
    prices, begins = shop.books.prices, shop.clock.now_ms + 1_000
    prices.set("w", 70)
    prices.set("w", 300, meter="output", from_ms=begins)
    assert prices.end("w")
    shop.clock.now_ms = begins
    await store.prices.look()
    assert (store.prices.of(WRITER, "a"), store.prices.meter(WRITER, "a", Meter.OUTPUT)) == (100, 300)


@pytest.mark.parametrize(
    ("given", "failure"),
    [
        ({"meter": "smoke"}, InvalidValue),
        ({"meter": "images"}, InvalidValue),
        ({"meter": "images:1024"}, InvalidValue),
        ({"meter": "images:0x1"}, InvalidValue),
        ({"price": -1}, InvalidValue),
        ({"price": 10**15 + 1}, InvalidValue),
        ({"model": ""}, InvalidValue),
        ({"model": "a\nb"}, InvalidValue),
        ({"account_id": "nobody"}, NotFound),
        ({"from_ms": START_MS - 1}, InvalidValue),
    ],
)
def test_a_price_that_makes_no_sense_is_refused(shop: Shop, given: dict[str, object], failure: type[Exception]) -> None:
    with pytest.raises(failure):
        shop.books.prices.set(**{"model": "m", "price": 1, **given})  # type: ignore[arg-type]
    assert shop.books.prices.list() == []


# -- refunds and payouts -----------------------------------------------------------------------------------------------


async def test_a_refund_gives_back_at_most_what_was_charged(shop: Shop, store: Store) -> None:
    """In one or several entries of their own; each reference applies once; the node keeps its share."""
    shop.credit(100)
    hold = await paid(shop, store)
    refund = shop.books.accounts.refund
    assert refund(hold.hold_id, 4, "sorry 1") == (True, 4)
    assert refund(hold.hold_id, 4, "sorry 1") == (False, 4)
    assert refund(hold.hold_id, None, "sorry 1") == (False, 4)
    with pytest.raises(InvalidValue, match=r"\$0.000000006 of this"):
        refund(hold.hold_id, 7, "sorry 2")
    with pytest.raises(InvalidValue, match="something else"):
        refund(hold.hold_id, 5, "sorry 1")
    assert refund(hold.hold_id, None, "sorry 2") == (True, 6)
    with pytest.raises(InvalidValue):
        refund(hold.hold_id, None, "sorry 3")
    with pytest.raises(InvalidValue):
        refund(hold.hold_id, 0, "sorry 4")
    assert shop.money() == (100, 0)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 3
    assert shop.books.accounts.find("revenue").balance_nanousd == -3
    shop.assert_right()


async def test_only_what_was_charged_can_be_given_back(shop: Shop, store: Store) -> None:
    shop.credit(100)
    hold = shop.new_hold(10)
    await store.hold(hold)
    for hold_id in (hold.hold_id, "req_none"):
        with pytest.raises(NotFound):
            shop.books.accounts.refund(hold_id, 1, "x")


async def test_a_node_is_paid_out_at_most_what_it_has(shop: Shop, store: Store) -> None:
    """Each reference once; what was paid out is kept apart."""
    shop.credit(100)
    await paid(shop, store)
    accounts = shop.books.accounts
    assert [(one.node_id, one.balance_nanousd) for one in accounts.payables()] == [("n1", 3)]
    assert accounts.pay_out("n1", 2, "transfer 1")
    assert not accounts.pay_out("n1", 2, "transfer 1")
    for amount in (2, 0, -1):
        with pytest.raises(InvalidValue):
            accounts.pay_out("n1", amount, "transfer 2")
    with pytest.raises(NotFound):
        accounts.pay_out("n2", 1, "transfer 2")
    with pytest.raises(InvalidValue, match="reference"):
        accounts.pay_out("n1", 1, "")
    assert accounts.find("payouts").balance_nanousd == 2
    shop.assert_right()


# -- reports -----------------------------------------------------------------------------------------------------------


async def test_usage_is_added_up_by_day_model_and_key(shop: Shop, store: Store) -> None:
    shop.credit(1_000)
    for _ in range(3):
        await paid(shop, store)
    shop.clock.now_ms += MS_PER_DAY
    await paid(shop, store, 20)
    today = shop.clock.now_ms // MS_PER_DAY
    rows = shop.books.reports.usage("a", today - 5, today)
    assert [(row.day, row.requests, row.tokens, row.cost) for row in rows] == [
        (today, 1, 7, 20),
        (today - 1, 3, 21, 30),
    ]
    assert shop.books.reports.usage("a", today, today) == rows[:1]
    with pytest.raises(NotFound):
        shop.books.reports.usage("nobody", 0, 1)


async def test_entries_come_in_pages_and_add_up(shop: Shop, store: Store) -> None:
    """The latest first; together they are the balance."""
    shop.credit(1_000)
    hold = await paid(shop, store)
    shop.books.accounts.refund(hold.hold_id, 1, "sorry")
    entries = shop.books.reports.entries("a")
    assert [(one.kind, one.amount) for one in entries] == [("refund", 1), ("charge", -10), ("credit", 1_000)]
    assert sum(one.amount for one in entries) == shop.money()[0]
    page = shop.books.reports.entries("a", rows_max=2)
    assert [*page, *shop.books.reports.entries("a", before=page[-1].entry_id)] == entries
    assert (page[0].request_id, page[0].reference) == (hold.hold_id, "sorry")


async def test_a_statement_has_a_months_entries(shop: Shop, store: Store) -> None:
    """Each once, in order, over any number of pages; the balances before and after it add up."""
    shop.clock.now_ms, end = month_span_ms("2027-02")
    shop.clock.now_ms -= 1
    shop.credit(1_000)
    for _ in range(5):
        shop.clock.now_ms += 1
        await paid(shop, store)
    shop.clock.now_ms = end
    await paid(shop, store)
    lines: list[StatementLine] = []
    while page := shop.books.reports.statement("a", "2027-02", after=lines[-1].entry_id if lines else 0, rows_max=2):
        assert len(page) <= 2
        lines += page
    assert lines == shop.books.reports.statement("a", "2027-02")
    assert [line.amount for line in lines] == [-10] * 5
    assert [line.entry_id for line in lines] == sorted(line.entry_id for line in lines)
    assert {(line.kind, line.model, line.tokens, line.key_id) for line in lines} == {("charge", "m", 7, "key_1")}
    start, _ = month_span_ms("2027-02")
    before, after = (shop.books.reports.balance_at("a", moment) for moment in (start, end))
    assert (before, after) == (1_000, 1_000 + sum(line.amount for line in lines))


@pytest.mark.parametrize("month", ["", "2026", "2026-13", "26-1", "2026-11-01", "9999-12", "x"])
def test_a_month_that_is_none_is_refused(month: str) -> None:
    with pytest.raises(InvalidValue, match="2026-11"):
        month_span_ms(month)


def test_a_month_ends_where_the_next_begins() -> None:
    assert month_span_ms("2026-12")[1] == month_span_ms("2027-01")[0]
    assert month_span_ms("2026-11")[0] == datetime(2026, 11, 1, tzinfo=UTC).timestamp() * 1000


async def test_a_request_is_explained(shop: Shop, store: Store) -> None:
    """Its hold, who ended it, what it was for, and each move of money."""
    shop.credit(100)
    hold = await paid(shop, store)
    shop.books.accounts.refund(hold.hold_id, 2, "sorry")
    told = shop.books.reports.explain(hold.hold_id)
    assert (told.state, told.ended_by, told.held, told.captured) == ("captured", "capture", 10, 10)
    assert told.gateway == store._opened.instance.name
    assert told.bought is not None and (told.bought.model, told.bought.node_id, told.bought.payable) == ("m", "n1", 3)
    assert [(move.kind, move.amount) for move in told.moves] == [("charge", 10), ("payable", 3), ("refund", 2)]
    left = shop.new_hold(5)
    await store.hold(left)
    open_one = shop.books.reports.explain(left.hold_id)
    assert (open_one.state, open_one.bought, open_one.moves) == ("open", None, ())
    with pytest.raises(NotFound):
        shop.books.reports.explain("req_none")


async def test_what_was_bought_is_written_down(shop: Shop, store: Store) -> None:
    """All of it: also the price, and the caller's own user where it named one."""
    shop.credit(100)
    hold = shop.new_hold(10)
    await store.hold(hold)
    store.capture(hold, msgspec.structs.replace(charge(9, payable=3), price=1_250_000, user_hash="u1"))
    await store.drain()
    bought = Bought("key_1", "m", "n1", tokens=7, price=1_250_000, cost=9, payable=3, user_hash="u1")
    assert shop.books.reports.explain(hold.hold_id).bought == bought


async def test_what_was_generated_is_told_meter_by_meter(shop: Shop, store: Store) -> None:
    """With who has counted it: the node, or we."""
    shop.credit(100)
    hold = shop.new_hold(50)
    await store.hold(hold)
    meters = Metered(Meter.INPUT, 3, 1_000_000), Metered(Meter.OUTPUT, 4, 9_000_000, estimated=True)
    store.capture(hold, msgspec.structs.replace(charge(39), meters=meters, price=None))
    await store.drain()
    bought = shop.books.reports.explain(hold.hold_id).bought
    assert bought is not None and (bought.meters, bought.tokens, bought.price) == (meters, 7, None)


# -- the chain and what is deleted -------------------------------------------------------------------------------------


async def test_the_chain_covers_every_transfer_once(shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block after block; what was written since is covered next time; an empty ledger has no block."""
    monkeypatch.setattr("embedmesh.storage.ledger.chain.TRANSFERS_A_BLOCK", 2)
    assert await store.extend_chain() == 0
    shop.credit(100)
    assert await store.extend_chain() == 1
    await paid(shop, store)
    await paid(shop, store)
    assert await store.extend_chain() == 4
    assert await store.extend_chain() == 0
    head = shop.books.check().head
    assert (head.transfers, head.blocks) == (5, 3)
    shop.credit(1)
    assert shop.books.check().head == head
    assert await store.extend_chain() == 1
    assert shop.books.check().head.hash != head.hash
    shop.assert_right()


async def test_usage_is_kept_as_long_as_is_said(shop: Shop) -> None:
    """Older records go, their sums and the money stay, and the check knows; without a word all are kept."""
    store = await shop.open(retention=Retention(usage_days=2))
    shop.credit(1_000)
    old = await paid(shop, store)
    shop.clock.now_ms += 3 * MS_PER_DAY
    new = await paid(shop, store)
    assert await store.forget() == 1
    assert await store.forget() == 0
    assert shop.books.reports.explain(old.hold_id).bought is None
    assert shop.books.reports.explain(new.hold_id).bought is not None
    today = shop.clock.now_ms // MS_PER_DAY
    assert sum(row.cost for row in shop.books.reports.usage("a", 0, today)) == 20
    shop.assert_right()
    await store.close()
    forever = await shop.open()
    shop.clock.now_ms += 10_000 * MS_PER_DAY
    assert await forever.forget() == 0
    await forever.close()
