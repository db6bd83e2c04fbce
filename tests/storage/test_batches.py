"""A batch in the store: its money, its units, its leases, its end; on both kinds of stores."""


from embedmesh.rules.batches import BatchState, line_request_id
from embedmesh.storage.store import Store
from tests.storage.batching import begun, completed, new_key, work_off
from tests.storage.shop import Shop


async def test_a_batch_is_charged_line_by_line_and_gives_the_rest_back(store: Store, shop: Shop) -> None:
    """All of its money is held; what its lines cost is taken, what failed costs nothing, nothing stays held."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id)
    assert shop.money() == (1_000, 50)
    await work_off(store, lease, units, key_id, failing=1)
    assert shop.money() == (970, 20)
    batch = await completed(store, shop, lease, failed=2)
    assert (batch.state, batch.total, batch.completed, batch.failed) == (BatchState.COMPLETED, 5, 3, 2)
    assert shop.money() == (970, 0)
    shop.assert_right()
    explained = shop.books.reports.explain(line_request_id(batch.batch_id, 1))
    assert (explained.tab_id, explained.captured) == (batch.batch_id, 10)
