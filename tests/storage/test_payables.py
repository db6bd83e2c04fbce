"""What nodes get of a captured hold: several of them, once each, together at most the cost."""

import asyncio

import msgspec
import pytest

from embedmesh.rules.holds import Charge, Payable
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge


def split(cost: int, *payables: Payable) -> Charge:
    return msgspec.structs.replace(charge(cost), payables=payables)


@pytest.mark.parametrize(
    ("payables", "taken"),
    [
        ((Payable("n1", 30), Payable("n1", 30)), False),  # one node twice
        ((Payable("n1", 30), Payable("n2", 10), Payable("n1", 1)), False),
        ((Payable("n1", 60), Payable("n2", 41)), False),  # together more than the caller pays
        ((Payable("n1", 30), Payable("n2", 30)), True),
        ((Payable("n1", 0), Payable("n2", 100)), True),
    ],
)
async def test_a_hold_pays_each_node_once(shop: Shop, store: Store, payables: tuple[Payable, ...], taken: bool) -> None:
    """Several nodes may have a share of one request, one share each; what is refused leaves the hold as it was."""
    shop.credit(1_000)
    hold = shop.new_hold(100)
    await store.hold(hold)
    store.capture(hold, split(100, *payables))
    await store.drain()
    balances = {one.account_id: one.balance_nanousd for one in shop.books.accounts.list()}
    if taken:
        assert balances == {
            "a": 900,
            "credit_source": -1_000,
            "payouts": 0,
            "revenue": 100 - sum(each.nanousd for each in payables),
            **{f"node:{each.node_id}": each.nanousd for each in payables},
        }
    else:
        assert shop.money() == (1_000, 100)
        assert store.stats.broken_writes == 1
    shop.assert_right()


async def test_holds_that_end_together_pay_new_nodes_each(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every node of a batch that is paid for the first time has an account from then on; none begins the batch anew."""
    monkeypatch.delattr("embedmesh.storage.ledger.batch.WriteBatch.apply_again")
    shop.credit(1_000)
    holds = [shop.new_hold(10), shop.new_hold(10)]
    await asyncio.gather(*map(store.hold, holds))
    store.capture(holds[0], split(10, Payable("n1", 3)))
    store.capture(holds[1], split(10, Payable("n2", 4)))
    await store.drain()
    balances = {one.account_id: one.balance_nanousd for one in shop.books.accounts.list()}
    assert (balances["node:n1"], balances["node:n2"], balances["revenue"]) == (3, 4, 13)
    shop.assert_right()


async def test_many_holds_pay_the_same_two_nodes(shop: Shop, store: Store) -> None:
    """Once a hold is not once a node."""
    shop.credit(1_000)
    holds = [shop.new_hold(10) for _ in range(20)]
    await asyncio.gather(*map(store.hold, holds))
    for hold in holds:
        store.capture(hold, split(10, Payable("n1", 3), Payable("n2", 4)))
    await store.drain()
    balances = {one.account_id: one.balance_nanousd for one in shop.books.accounts.list()}
    assert (balances["node:n1"], balances["node:n2"], balances["revenue"]) == (60, 80, 60)
    shop.assert_right()
