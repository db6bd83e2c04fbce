"""A request that is charged by several meters: what is kept of them, and that the check recomputes its cost."""

import pytest

from embedmesh.rules.holds import Charge, Meter, Metered, Payable
from embedmesh.rules.money import bill_nanousd
from embedmesh.storage.db import refusals
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge

METERS = (Metered(Meter.INPUT, 10, 20_000), Metered(Meter.OUTPUT, 5, 60_001), Metered(Meter.IMAGES, 1, 3_000_000))
KEPT = '[["input",10,20000,false],["output",5,60001,false],["images",1,3000000,false]]'
TOKENS = 15  # without the image
COST = 4  # 3.500005 nano-USD, rounded up once; 5 if each meter was


def metered(cost: int = COST, tokens: int = TOKENS, meters: tuple[Metered, ...] = METERS) -> Charge:
    return Charge(cost, tokens, "m", "key_1", "n1", meters=meters, payables=(Payable("n1", 1),))


async def capture(shop: Shop, store: Store, *charges: Charge) -> None:
    shop.credit(10**18)
    for one in charges:
        hold = shop.new_hold(one.cost_nanousd)
        await store.hold(hold)
        store.capture(hold, one)
    await store.drain()


async def test_the_meters_are_kept_and_add_up(shop: Shop, store: Store) -> None:
    """Beside the sum of the tokens, without a price; a request of one meter has none."""
    assert bill_nanousd(METERS) == COST
    await capture(shop, store, metered(), charge(100))
    with shop.by_hand() as db:
        rows = db.execute("SELECT tokens, price, cost, meters FROM usage ORDER BY cost").fetchall()
    assert [tuple(row) for row in rows] == [(TOKENS, None, COST, KEPT), (7, None, 100, None)]
    report = shop.books.check()
    assert "meters_add_up" in report.promises and report.ok


async def test_amounts_that_no_integer_of_a_store_holds_add_up(shop: Shop, store: Store) -> None:
    """The product of quantity and price may need more than 64 bits; the cost does not."""
    meters = (Metered(Meter.INPUT, 300_000, 10**15), Metered(Meter.CACHED, 1, 1))
    assert bill_nanousd(meters) == 3 * 10**14 + 1
    await capture(shop, store, metered(3 * 10**14 + 1, 300_001, meters))
    shop.assert_right()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (metered(cost=5), "cost 5, meters 4; tokens 15, meters 15"),
        (metered(cost=3), "cost 3, meters 4; tokens 15, meters 15"),
        (metered(tokens=16), "cost 4, meters 4; tokens 16, meters 15"),
    ],
)
async def test_a_cost_that_is_not_what_its_meters_say_is_found(
    shop: Shop, store: Store, wrong: Charge, says: str
) -> None:
    """Among rows that are right, and with nothing else broken."""
    await capture(shop, store, metered(), wrong, charge(100), metered())
    [broken] = shop.books.check().broken
    assert (broken.promise, broken.detail) == ("meters_add_up", says)


async def test_every_page_is_looked_at(shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedmesh.storage.ledger.check.METERED_ROWS_AT_ONCE", 2)
    await capture(shop, store, *[metered()] * 5, metered(cost=6), metered(), metered(cost=5))
    assert [one.detail[:6] for one in shop.books.check().broken] == ["cost 6", "cost 5"]


@pytest.mark.parametrize("text", ["no JSON", '[["smoke",1,2]]', '{"input": 1}'])
async def test_meters_that_cannot_be_read_are_found(shop: Shop, store: Store, text: str) -> None:
    """As what somebody with a shell could add."""
    await capture(shop, store, charge(0))
    with shop.by_hand() as db:
        name = "usage_never_changes"
        off = f"DROP TRIGGER {name}" + (" ON usage" if db.dialect == "postgres" else "")
        db.execute(off)
        db.execute("UPDATE usage SET meters = :text", {"text": text})
    [broken] = shop.books.check().broken
    assert (broken.promise, broken.detail) == ("meters_add_up", "its meters cannot be read")


async def test_a_record_has_a_price_or_meters(shop: Shop, store: Store) -> None:
    """The store itself refuses both."""
    await capture(shop, store, charge(0))
    with shop.by_hand() as db, pytest.raises(refusals()):
        db.execute(
            "INSERT INTO usage (hold_id, account_id, key_id, model, node_id, tokens, price, cost, payable, day, meters)"
            " VALUES ('h', 'a', 'k', 'm', 'n', 1, 1, 1, 0, 1, '[]')"
        )
