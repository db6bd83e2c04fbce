"""The hashes of the chain stay what they were, and a walk along it says where it stops to fit."""

import pytest

from embedmesh.storage.ledger.chain import START, ChainHead, follow, link
from embedmesh.storage.store import Store
from tests.storage.shop import Shop
from tests.storage.test_books import without_defences

CREDIT = (1, "credit", "credit_source", "a", 100, None, "payment 1", 1_800_000_000_000)
CHARGE = (2, "charge", "a", "revenue", 30, "req_1", None, 1_800_000_000_001)


def test_a_blocks_hash_is_the_same_in_every_release() -> None:
    """Who noted one down years ago finds it again; it depends on the block before."""
    first, both = link(START, [CREDIT]), link(START, [CREDIT, CHARGE])
    assert (first.hex(), both.hex()) == (
        "2f241e23062fa5bbec71a4e557a8562916c1560c4aa6b869faad7233f0b86da1",
        "96bee14d53ae77a4bbec1b255112c649544ceb48db1631df06095dd8ffd8281a",
    )
    assert link(first, [CHARGE]).hex() == "321c9661d2032d7031e33fbe1a8c9f48da732d6a11e11aeba62882467e4a241c"


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        ("UPDATE transfers SET amount = 9 WHERE transfer_id = 4", "transfers 3 to 4, or acts up to 5, were changed"),
        ("DELETE FROM transfers WHERE transfer_id > 2", "transfers 3 to 4, or acts up to 5, were changed"),
        (
            "UPDATE blocks SET last_transfer = 5 WHERE last_transfer = 4",
            "transfers 3 to 5, or acts up to 5, were changed",
        ),
        ("SELECT 1", None),
    ],
)
async def test_the_walk_ends_at_the_first_block_that_does_not_fit(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, tampering: str, says: str | None
) -> None:
    """It tells which transfers were changed, and vouches for what lies before them."""
    monkeypatch.setattr("embedmesh.storage.ledger.chain.TRANSFERS_A_BLOCK", 2)
    heads = []
    for _ in range(2):
        shop.credit(1)
        shop.credit(1)
        await store.extend_chain()
        heads.append(shop.books.check().head)
    assert [(head.transfers, head.blocks) for head in heads] == [(2, 1), (4, 2)]
    with shop.by_hand() as db:
        without_defences(db)
        db.execute(tampering)
        assert follow(db) == (heads[0 if says else 1], says)


async def test_a_chain_that_does_not_fit_from_its_beginning_vouches_for_nothing(shop: Shop, store: Store) -> None:
    shop.credit(1)
    await store.extend_chain()
    with shop.by_hand() as db:
        without_defences(db)
        db.execute("DELETE FROM transfers")
        assert follow(db) == (ChainHead(START.hex(), 0, 0), "transfers 1 to 1, or acts up to 2, were changed")
