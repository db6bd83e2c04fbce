"""What the schema defends of batches, and what the check sees where its defences were down."""

import pytest

from embedmesh.storage.db import refusals
from embedmesh.storage.store import Store
from tests.storage.batching import BREAKING_BATCHES, begun, completed, new_key, work_off
from tests.storage.shop import Shop
from tests.storage.test_books import without_defences


@pytest.mark.parametrize(("promise", "breaking"), BREAKING_BATCHES)
async def test_the_check_sees_what_was_done_to_batches(shop: Shop, store: Store, promise: str, breaking: str) -> None:
    """Each column that matters is broken once, and the promise is named."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, lease, units[:1], key_id, failing=1)
    shop.assert_right()
    with shop.by_hand() as db:
        without_defences(db)
        db.execute(breaking)
    assert promise in {broken.promise for broken in shop.books.check().broken}


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        ("UPDATE batches SET state = 'validating'", "only moves on"),
        ("UPDATE batches SET state = 'completed', ended_ms = 1", "only moves on|ends with its tab"),
        ("UPDATE batches SET state = 'expired', ended_ms = 1", "ends with its tab"),
        ("UPDATE batches SET completed = 0", "only grows"),
        ("UPDATE batches SET cost = cost - 1", "only grows"),
        ("UPDATE batches SET cost = amount + 1", "CHECK|check"),
        ("UPDATE batches SET epoch = 0", "only grows"),
        ("UPDATE batches SET completed = total + 1", "CHECK|check"),
        ("UPDATE batches SET account_id = 'b'", "keeps its terms"),
        ("UPDATE batches SET expires_ms = expires_ms + 1", "keeps its terms"),
        ("DELETE FROM batches", "until its end"),
        ("UPDATE batch_units SET state = 'open', segment = NULL WHERE state = 'done'", "done once"),
        ("UPDATE batch_units SET lines = 5 WHERE state = 'open'", "done once"),
        ("DELETE FROM batch_units", "until their batch has ended"),
        ("UPDATE batch_units SET state = 'done' WHERE state = 'open'", "CHECK|check"),
        (
            "INSERT INTO batch_units (batch_id, unit, first_byte, bytes, first_line, lines, tokens) "
            "SELECT batch_id, 9, 0, 1, 0, 1, 1 FROM batches",
            "before its batch is in progress",
        ),
        ("UPDATE files SET bytes = 1", "keeps its terms"),
        ("UPDATE files SET account_id = 'b'", "keeps its terms"),
        ("UPDATE tabs SET amount = 0", "keeps its terms"),
        (
            "INSERT INTO tabs (tab_id, account_id, key_id, owner, amount, opened_ms, deadline_ms) "
            "SELECT 'tab_0', account_id, key_id, 'gw_1', 0, 1, 1 FROM batches",
            "CHECK|check",
        ),
    ],
)
async def test_the_store_defends_its_batches(shop: Shop, store: Store, tampering: str, says: str) -> None:
    """No statement, from whatever program, can break a promise that the schema makes."""
    shop.credit(1_000)
    shop.books.accounts.create("b")
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3, 2])
    await work_off(store, lease, units[:1], key_id, failing=1)
    with shop.by_hand() as db, pytest.raises(refusals(), match=says):
        db.execute(tampering)
    shop.assert_right()


@pytest.mark.parametrize(
    "tampering",
    [
        "UPDATE batches SET state = 'in_progress', ended_ms = NULL",
        "UPDATE batches SET completed = completed + 1",
        "UPDATE batches SET output_file_id = 'file-another'",
        "UPDATE batches SET epoch = epoch + 1",
    ],
)
async def test_what_is_over_stays_as_it_is(shop: Shop, store: Store, tampering: str) -> None:
    """But for being swept and forgotten."""
    shop.credit(1_000)
    key_id = new_key(shop)
    lease, units = await begun(store, shop, key_id, [3])
    await work_off(store, lease, units, key_id)
    await completed(store, shop, lease)
    with shop.by_hand() as db, pytest.raises(refusals(), match=r"ends once|only moves on"):
        db.execute(tampering)
    shop.assert_right()
