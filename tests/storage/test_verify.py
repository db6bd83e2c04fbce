"""After a gateway that did not close its store, the next one verifies the ledger before it serves."""

from pathlib import Path

import pytest

from embedmesh.rules.errors import SetupError
from embedmesh.storage.ledger.check import verify
from embedmesh.storage.opening import RUNNING
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge, crash_image


@pytest.fixture
def shop(file_shop: Shop) -> Shop:
    """All of this is about files."""
    return file_shop


PAGE_BYTES = 4096

LOST_WRITES = {
    "available_is_not_negative": "UPDATE accounts SET held = balance + 1 WHERE account_id = 'a'",
    "held_is_sum_of_holds_and_tabs": "UPDATE accounts SET held = held - 1 WHERE account_id = 'a'",
    "everything_sums_to_zero": "DELETE FROM entries WHERE account_id = 'a'",
    "balance_is_sum_of_entries": "UPDATE accounts SET balance = balance + 1 WHERE account_id = 'a'",
}


async def trade(shop: Shop, store: Store) -> None:
    """Some holds, one of them captured, one open."""
    shop.credit(1_000)
    paid = shop.new_hold(100)
    await store.hold(paid)
    await store.hold(shop.new_hold(50))
    store.capture(paid, charge(80, payable=30))
    await store.drain()


def damage(path: Path, statement: str) -> None:
    """Change the file as nothing of ours could."""
    db = SqliteEngine(path).connect(busy_s=1)
    db.execute("PRAGMA foreign_keys = OFF")
    db.execute("PRAGMA ignore_check_constraints = ON")
    triggers = db.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'").fetchall()
    for name, _ in triggers:
        db.execute(f"DROP TRIGGER {name}")
    db.execute(statement)
    for _, sql in triggers:
        db.execute(sql)
    db.close()


def running(shop: Shop) -> bool:
    """Whether the store says that a gateway has it."""
    return (
        shop.books._db.execute("SELECT 1 FROM facts WHERE name LIKE :like", {"like": f"{RUNNING}%"}).fetchone()
        is not None
    )


@pytest.mark.parametrize("promise", LOST_WRITES)
async def test_a_broken_ledger_is_not_served_after_a_crash(shop: Shop, store: Store, promise: str) -> None:
    """One line says which promise is broken and what to look at; the store is left as it was found."""
    await trade(shop, store)
    image = crash_image(shop.path, shop.path.parent / "crash")
    damage(image, LOST_WRITES[promise])
    for _ in range(2):  # the second start finds the same
        with pytest.raises(SetupError, match=rf"{promise}.*embedmesh ledger check"):
            await shop.open(image)


async def test_a_damaged_file_is_not_served_after_a_crash(shop: Shop) -> None:
    """A page that never reached the disk is found though no sum shows it."""
    store = await shop.open()
    await trade(shop, store)
    await store.close()
    shop.books.close()
    image = crash_image(shop.path, shop.path.parent / "crash")
    db = SqliteEngine(image).connect(busy_s=1)
    db.execute("INSERT INTO facts VALUES (:name, '1')", {"name": RUNNING})
    [(root,)] = db.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'usage'").fetchall()
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    db.close()
    with image.open("r+b") as file:
        file.seek((root - 1) * PAGE_BYTES)
        file.write(bytes(PAGE_BYTES))
    with pytest.raises(SetupError, match=r"file_is_whole.*embedmesh ledger check"):
        await shop.open(image)


async def test_a_sound_ledger_is_served_after_a_crash(shop: Shop, store: Store) -> None:
    """What was open is released; then the store is as any other."""
    await trade(shop, store)
    heir = await shop.open(crash_image(shop.path, shop.path.parent / "crash"))
    assert heir.stats.recovered == 1
    await heir.close()


async def test_a_store_that_was_closed_says_so(shop: Shop) -> None:
    """From its opening until everything is written; so a warm start has nothing to verify."""
    store = await shop.open()
    assert running(shop)
    await store.close()
    assert not running(shop)


async def test_verifying_a_large_store_ends_in_time(
    shop: Shop, store: Store, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When its time is up the rest is left to `embedmesh ledger check`, and that is logged."""
    monkeypatch.setattr("embedmesh.storage.ledger.check.VERIFY_STEPS", 1)
    await trade(shop, store)
    db = SqliteEngine(shop.path).connect(busy_s=1)
    assert verify(db, seconds_max=0.0) == []
    assert "embedmesh ledger check" in caplog.text
    caplog.clear()
    assert verify(db) == []
    assert caplog.text == ""
    db.close()
