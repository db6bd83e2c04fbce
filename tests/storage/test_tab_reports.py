"""What is told of requests under tabs: explained, refunded, listed with their entry, on statements, as long as kept."""

import msgspec
import pytest

from embedmesh.rules.errors import InvalidValue, NotFound
from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.ids import new_id
from embedmesh.rules.tabs import Tab
from embedmesh.storage.books.reports import Bought, ChargedRequest, StatementLine
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY, month_span_ms
from embedmesh.storage.upkeep import Retention
from tests.storage.shop import Shop, charge
from tests.storage.test_tabs import close, new_key, open_tab

MONEY = 64_000


async def settled(shop: Shop, store: Store, tab: Tab, *charges: Charge) -> list[Hold]:
    """Requests that are settled together."""
    holds = [
        Hold(new_id("req", shop.clock), "a", each.cost_nanousd, tab.deadline_ms, tab.key_id, tab.tab_id)
        for each in charges
    ]
    for hold, each in zip(holds, charges, strict=True):
        store._writer.submit(SettleRequest(tab.tab_id, hold, each))
    await store.drain()
    return sorted(holds, key=lambda hold: hold.hold_id)


def of(tab: Tab, cost: int, *, payable: int = 0, model: str = "m", price: int | None = 5, tokens: int = 7) -> Charge:
    made = charge(cost, payable, key_id=tab.key_id)
    return msgspec.structs.replace(made, model=model, price=price, tokens=tokens, user_hash="u1")


async def test_a_request_under_a_tab_is_explained(shop: Shop, store: Store) -> None:
    """As one with a hold of its own, and of which tab it is; what was moved with others says for how many."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    began_ms = shop.clock.now_ms
    shop.clock.now_ms += 5
    hold, _ = await settled(shop, store, tab, of(tab, 10, payable=3), of(tab, 20, payable=4))
    await settled(shop, store, tab, of(tab, 5))
    assert shop.books.accounts.refund(hold.hold_id, 2, "sorry") == (True, 2)
    told = shop.books.reports.explain(hold.hold_id)
    assert (told.request_id, told.account_id, told.key_id, told.tab_id) == (hold.hold_id, "a", tab.key_id, tab.tab_id)
    assert (told.state, told.ended_by, told.held) == ("captured", "capture", None)
    assert told.captured in (10, 20)
    assert told.gateway == store._opened.instance.name
    assert (told.created_ms, told.ended_ms, told.deadline_ms) == (began_ms + 5, began_ms + 5, tab.deadline_ms)
    assert told.bought == Bought(tab.key_id, "m", "n1", 7, 5, told.captured, 3 if told.captured == 10 else 4, "u1")
    moves = [(move.kind, move.source_id, move.target_id, move.amount, move.requests) for move in told.moves]
    assert moves == [
        ("charge", "a", "revenue", 30, 2),
        ("payable", "revenue", "node:n1", 7, 2),
        ("refund", "revenue", "a", 2, 1),
    ]
    shop.assert_right()


async def test_what_was_not_settled_is_not_known(shop: Shop, store: Store) -> None:
    """Nothing was written down of it, and nothing was charged."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    close(store, tab)
    await store.drain()
    (late,) = await settled(shop, store, tab, of(tab, 10))
    assert store.stats.late_captures == 1
    for request_id in (late.hold_id, tab.tab_id):
        with pytest.raises(NotFound, match="was to be paid from a tab and was not charged"):
            shop.books.reports.explain(request_id)
        with pytest.raises(NotFound, match="was charged"):
            shop.books.accounts.refund(request_id, None, "sorry")


async def test_a_tab_is_explained(shop: Shop, store: Store) -> None:
    """Open, and when it has ended."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    opened_ms = shop.clock.now_ms
    found = shop.books.reports.explain_tab(tab.tab_id)
    assert (found.state, found.amount, found.captured, found.requests, found.moves) == ("open", 100, 0, 0, ())
    await settled(shop, store, tab, of(tab, 10, payable=3), of(tab, 20))
    await settled(shop, store, tab, of(tab, 5))
    shop.clock.now_ms += 7
    close(store, tab)
    await store.drain()
    found = shop.books.reports.explain_tab(tab.tab_id)
    assert (found.state, found.captured, found.requests, found.settlements) == ("closed", 35, 3, 2)
    assert (found.account_id, found.key_id, found.gateway) == ("a", tab.key_id, store._opened.instance.name)
    assert (found.opened_ms, found.deadline_ms, found.ended_ms) == (opened_ms, tab.deadline_ms, opened_ms + 7)
    moves = [(move.kind, move.amount, move.requests) for move in found.moves]
    assert moves == [("charge", 5, 1), ("payable", 3, 0), ("charge", 30, 2)]
    for tab_id in ("tab_none", "req_none", ""):
        with pytest.raises(NotFound):
            shop.books.reports.explain_tab(tab_id)


async def test_a_refund_under_a_tab_is_at_most_what_the_request_cost(shop: Shop, store: Store) -> None:
    """Whatever was settled with it; each reference applies once; after the tab's end, too."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    await settled(shop, store, tab, of(tab, 10, payable=3), of(tab, 10))
    close(store, tab)
    await store.drain()
    (entry,) = [entry for entry in shop.books.reports.entries("a") if entry.kind == "charge"]
    one, other = shop.books.reports.charged_requests("a", entry.entry_id)
    refund = shop.books.accounts.refund
    assert refund(one.request_id, 4, "sorry 1") == (True, 4)
    assert refund(one.request_id, None, "sorry 1") == (False, 4)
    with pytest.raises(InvalidValue, match=r"\$0.000000006 of this"):
        refund(one.request_id, 7, "sorry 2")
    with pytest.raises(InvalidValue, match="something else"):
        refund(other.request_id, 4, "sorry 1")
    assert refund(one.request_id, None, "sorry 2") == (True, 6)
    assert refund(other.request_id, None, "sorry 3") == (True, 10)
    with pytest.raises(InvalidValue, match=r"\$0.00 of this"):
        refund(one.request_id, None, "sorry 4")
    assert shop.money() == (MONEY, 0)
    assert shop.books.accounts.find("node:n1").balance_nanousd == 3
    shop.assert_right()


async def test_an_entry_says_for_how_many_requests_it_is_and_which(shop: Shop, store: Store) -> None:
    """A page at a time; of its own account only; a charge of one request, too."""
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, key := new_key(shop))
    holds = await settled(shop, store, tab, of(tab, 1, tokens=1), of(tab, 2, tokens=2), of(tab, 3, price=None))
    alone = shop.new_hold(10, key)
    await store.hold(alone)
    store.capture(alone, charge(9, payable=3, key_id=key))
    await store.drain()
    shop.books.accounts.refund(holds[0].hold_id, 1, "sorry")
    entries = shop.books.reports.entries("a")
    assert [(each.kind, each.amount, each.requests, each.tab_id, each.request_id) for each in entries] == [
        ("refund", 1, None, tab.tab_id, holds[0].hold_id),
        ("charge", -9, 1, None, alone.hold_id),
        ("charge", -6, 3, tab.tab_id, None),
        ("credit", MONEY, None, None, None),
    ]
    read = shop.books.reports.charged_requests
    listed = read("a", entries[2].entry_id)
    assert [each.request_id for each in listed] == [hold.hold_id for hold in holds]
    assert sorted((each.tokens, each.price, each.cost) for each in listed if each.price) == [(1, 5, 1), (2, 5, 2)]
    page = read("a", entries[2].entry_id, rows_max=2)
    assert [*page, *read("a", entries[2].entry_id, after=page[-1].request_id)] == listed
    assert read("a", entries[1].entry_id) == [ChargedRequest(alone.hold_id, key, "m", 7, None, 9)]
    assert read("a", entries[1].entry_id, after=alone.hold_id) == []
    shop.books.accounts.create("b")
    nobodys = [("b", entries[2].entry_id), ("revenue", entries[2].entry_id)]
    for account, entry_id in (*nobodys, ("a", entries[0].entry_id), ("a", 0), ("a", -1), ("a", 2**62), ("a", 2**80)):
        with pytest.raises(NotFound):
            read(account, entry_id)
    nodes = shop.books.reports.entries("node:n1")
    assert [(each.kind, each.amount, each.requests) for each in nodes] == [("payable", 3, None)]


async def test_a_statement_adds_up_what_was_settled_together(shop: Shop, store: Store) -> None:
    """With the model and the price that all of them have, the tokens of all, and the key of the tab; page by page."""
    shop.clock.now_ms, _ = month_span_ms("2027-02")
    shop.credit(MONEY)
    one, two = [(await open_tab(shop, store, new_key(shop)))[0] for _ in range(2)]
    await settled(shop, store, one, of(one, 1), of(one, 2), of(one, 3))
    await settled(shop, store, one, of(one, 4), of(one, 5, model="n"))
    await settled(shop, store, two, of(two, 6), of(two, 7, price=6))
    await settled(shop, store, two, of(two, 8), of(two, 9, price=None))
    alone = shop.new_hold(10, one.key_id)
    await store.hold(alone)
    store.capture(alone, of(one, 10))
    await store.drain()
    lines = shop.books.reports.statement("a", "2027-02")
    told = [
        (each.amount, each.requests, each.tab_id, each.key_id, each.model, each.tokens, each.price) for each in lines
    ]
    assert told == [
        (MONEY, None, None, None, None, None, None),
        (-6, 3, one.tab_id, one.key_id, "m", 21, 5),
        (-9, 2, one.tab_id, one.key_id, None, 14, 5),
        (-13, 2, two.tab_id, two.key_id, "m", 14, None),
        (-17, 2, two.tab_id, two.key_id, "m", 14, None),
        (-10, 1, None, one.key_id, "m", 7, 5),
    ]
    assert [each.request_id for each in lines] == [None] * 5 + [alone.hold_id]
    paged: list[StatementLine] = []
    while page := shop.books.reports.statement("a", "2027-02", after=paged[-1].entry_id if paged else 0, rows_max=2):
        paged += page
    assert paged == lines
    today = shop.clock.now_ms // MS_PER_DAY
    assert sum(row.requests for row in shop.books.reports.usage("a", today, today)) == 10
    assert sum(row.cost for row in shop.books.reports.usage("a", today, today)) == MONEY - shop.money()[0]


async def test_what_is_not_kept_any_more_is_still_an_entry(shop: Shop) -> None:
    """Usage records are forgotten; entries, sums, tabs and the check stay."""
    store = await shop.open(retention=Retention(usage_days=1))
    shop.credit(MONEY)
    tab, _ = await open_tab(shop, store, new_key(shop))
    hold, _ = await settled(shop, store, tab, of(tab, 1), of(tab, 2))
    shop.books.accounts.refund(hold.hold_id, 1, "in time")
    close(store, tab)
    await store.drain()
    await store.extend_chain()
    day = shop.clock.now_ms // MS_PER_DAY
    shop.clock.now_ms += 3 * MS_PER_DAY
    assert await store.forget() == 2
    entry = shop.books.reports.entries("a")[1]
    assert (entry.amount, entry.requests) == (-3, 2)
    assert shop.books.reports.charged_requests("a", entry.entry_id) == []
    for what in (shop.books.reports.explain, lambda each: shop.books.accounts.refund(each, None, "late")):
        with pytest.raises(NotFound, match="kept"):
            what(hold.hold_id)
    assert shop.books.reports.explain_tab(tab.tab_id).requests == 2
    assert [(row.requests, row.cost) for row in shop.books.reports.usage("a", day, day)] == [(2, 3)]
    month = "2027-01"
    (line,) = [each for each in shop.books.reports.statement("a", month) if each.kind == "charge"]
    assert (line.requests, line.key_id, line.model, line.tokens) == (2, tab.key_id, None, None)
    shop.assert_right()
    await store.close()
