"""The operator's side: accounts, credits, the check, the backup."""

from pathlib import Path

import pytest

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import Failure, InsufficientQuota, InvalidValue, NotFound, StoreUnavailable
from embedmesh.rules.holds import StreamNote
from embedmesh.rules.money import AMOUNT_MAX_NANOUSD
from embedmesh.rules.tabs import Tab
from embedmesh.storage.db import Db
from embedmesh.storage.ledger.open_tab import OpenTab
from embedmesh.storage.ledger.settle_tab import SettleRequest
from embedmesh.storage.sqlite.database import SqliteEngine
from embedmesh.storage.store import Store
from tests.storage.batching import BREAKING_BATCHES, BREAKING_JOBS
from tests.storage.shop import Shop, charge, secret
from tests.storage.test_locks import open_lock


@pytest.mark.parametrize(
    "account_id", ["", "node:x", "a b", "é", "x" * 65, "a", "revenue", "credit_source", "-a", "a\n"]
)
def test_an_account_id_is_plain_and_new(shop: Shop, account_id: str) -> None:
    """Ids that are taken, or could be taken for one of our own accounts, are refused."""
    with pytest.raises(InvalidValue):
        shop.books.accounts.create(account_id)
    assert {account.account_id for account in shop.books.accounts.list()} == {
        "a",
        "revenue",
        "credit_source",
        "payouts",
    }


def test_an_account_has_the_cache_that_it_is_told(shop: Shop) -> None:
    """None, unless somebody says otherwise; its credit limit is another matter."""
    accounts = shop.books.accounts
    assert {account.cache for account in accounts.list()} == {CachePolicy.OFF}
    for policy in (CachePolicy.FREE, CachePolicy.CHARGED, CachePolicy.OFF):
        assert accounts.create(f"with-{policy}", cache=policy).cache is policy
        assert accounts.change("a", cache=policy).cache is policy
        assert accounts.change("a", credit_limit_nanousd=5) == accounts.find("a")
        assert accounts.find("a").cache is policy
    after = accounts.change("a", credit_limit_nanousd=7, cache=CachePolicy.FREE)
    assert (after.credit_limit_nanousd, after.cache) == (7, CachePolicy.FREE)
    shop.assert_right()


def test_a_cache_of_nobody_who_pays_is_refused(shop: Shop) -> None:
    """And a change that is refused in part is no change."""
    accounts = shop.books.accounts
    with pytest.raises(NotFound, match="no account nobody"):
        accounts.change("nobody", cache=CachePolicy.FREE)
    with pytest.raises(InvalidValue, match="revenue is no customer"):
        accounts.change("revenue", cache=CachePolicy.OFF)
    with pytest.raises(InvalidValue):
        accounts.change("a", credit_limit_nanousd=-1, cache=CachePolicy.FREE)
    assert {account.cache for account in accounts.list()} == {CachePolicy.OFF}


def test_a_reference_applies_once(shop: Shop) -> None:
    """The same payment told twice is credited once; a reference cannot be used for something else."""
    shop.books.accounts.create("b")
    assert shop.books.accounts.credit("a", 500, "invoice 7")
    assert not shop.books.accounts.credit("a", 500, "invoice 7")
    for account, amount in (("a", 501), ("a", -500), ("b", 500)):
        with pytest.raises(InvalidValue, match="something else"):
            shop.books.accounts.credit(account, amount, "invoice 7")
    assert shop.money() == (500, 0)
    assert shop.books.accounts.find("b").balance_nanousd == 0


@pytest.mark.parametrize(
    ("account", "amount", "reference", "failure"),
    [
        ("nobody", 1, "x", NotFound),
        ("revenue", 1, "x", InvalidValue),
        ("a", 0, "x", InvalidValue),
        ("a", 1, "", InvalidValue),
        ("a", 1, "x" * 256, InvalidValue),
        ("a", AMOUNT_MAX_NANOUSD + 1, "x", InvalidValue),
        ("a", AMOUNT_MAX_NANOUSD, "x", InvalidValue),  # with the 100 that are there it would be too much
        ("a", -61, "x", InsufficientQuota),  # 100, of which 40 are held
    ],
)
async def test_a_credit_that_makes_no_sense_changes_nothing(
    shop: Shop, store: Store, account: str, amount: int, reference: str, failure: type[Failure]
) -> None:
    """A refused credit says why, and no entry is written."""
    shop.credit(100)
    await store.hold(shop.new_hold(40))
    with pytest.raises(failure):
        shop.books.accounts.credit(account, amount, reference)
    assert shop.money() == (100, 40)
    assert shop.books.check().tallies["transfers"] == 1


async def test_money_that_is_not_held_can_be_taken_back(shop: Shop, store: Store) -> None:
    """A correction is a new transfer the other way."""
    shop.credit(100)
    await store.hold(shop.new_hold(40))
    assert shop.books.accounts.credit("a", -60, "refund 1")
    assert shop.money() == (40, 40)
    assert shop.books.accounts.find("a").available_nanousd == 0
    shop.assert_right()


BREAKING = {
    "transfers_sum_to_zero": ["UPDATE entries SET amount = amount + 1 WHERE account_id = 'revenue'"],
    "entries_have_transfers": ["INSERT INTO entries VALUES ('revenue', 1, 0)"],
    "everything_sums_to_zero": ["UPDATE entries SET amount = amount + 1 WHERE account_id = 'revenue'"],
    "balance_is_sum_of_entries": ["UPDATE accounts SET balance = balance + 1 WHERE account_id = 'revenue'"],
    "held_is_sum_of_holds_and_tabs": ["UPDATE accounts SET held = held - 1 WHERE account_id = 'a'"],
    "available_is_not_negative": ["UPDATE accounts SET held = balance + 1 WHERE account_id = 'a'"],
    "holds_end_once": ["UPDATE holds SET captured = amount + 1 WHERE state = 'captured'"],
    "notes_end_with_their_holds": ["UPDATE hold_notes SET cost = 51"],
    "notes_can_be_charged": ["UPDATE hold_notes SET charge = replace(charge, '20', '21')"],
    "tabs_end_once": ["UPDATE tabs SET ended_ms = 1"],
    "tabs_captured_what_was_settled": ["UPDATE tabs SET requests = requests + 1"],
    "requests_have_holds_or_tabs": ["DELETE FROM tabs"],
    "settlements_are_their_usage": ["UPDATE usage SET cost = cost + 1 WHERE tab_id IS NOT NULL"],
    "usage_of_tabs_is_settled": ["UPDATE usage SET settlement = 2 WHERE settlement = 1"],
    "requests_are_charged_once": ["UPDATE usage SET tab_id = 'tab_1', settlement = 1"],
    "payables_of_tabs_are_recorded": ["UPDATE usage SET payable = payable - 1 WHERE tab_id IS NOT NULL"],
    "settlements_match_their_digests": ["UPDATE usage SET tokens = tokens + 1 WHERE tab_id IS NOT NULL"],
    "captured_holds_are_charged": ["DELETE FROM transfers WHERE kind = 'charge'"],
    "captured_holds_have_usage": ["DELETE FROM usage"],
    "payables_are_recorded": ["UPDATE usage SET payable = payable - 1"],
    "refunds_are_of_charges": ["UPDATE transfers SET amount = amount + 80 WHERE kind = 'refund'"],
    "usage_adds_up": ["UPDATE usage_days SET cost = cost + 1"],
    "customers_were_charged_what_they_used": ["UPDATE usage_days SET cost = cost + 1"],
    "keys_draw_from_all_above": ["DELETE FROM key_draws"],
    "drawn_is_held_below": ["UPDATE drawn SET held = held + 1"],
    "drawn_days_add_up": ["UPDATE drawn_days SET cost = cost + 1"],
    "meters_add_up": ["""UPDATE usage SET price = NULL, meters = '[["input",7,1]]'"""],
    "locks_have_holds": ["UPDATE locks SET units = 1000 * units"],
    "locks_have_claims": ["UPDATE claims SET body_hash = key_hash"],
    "holds_have_one_lock": [
        "CREATE TABLE more AS SELECT * FROM locks",
        "DROP TABLE locks",
        "ALTER TABLE more RENAME TO locks",
        "INSERT INTO locks SELECT * FROM locks",
    ],
    "audit_holds": ["UPDATE acts SET object_id = 'b' WHERE act_id = 1"],
    "chain_holds": ["UPDATE transfers SET created_ms = created_ms + 1 WHERE kind = 'refund'"],
}
BREAKING_SQLITE = {
    "references_are_whole": [
        "DELETE FROM accounts WHERE account_id = 'node:n1'",
    ],
    "file_is_whole": [
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_schema SET sql = replace(sql, '(deadline_ms)', '(created_ms)') WHERE name = 'holds_open'",
    ],
}


BREAKING_POSTGRES = {
    "triggers_are_on": [
        "CREATE TRIGGER idle BEFORE DELETE ON holds FOR EACH ROW EXECUTE FUNCTION refuse('x')",
        "ALTER TABLE holds DISABLE TRIGGER idle",
    ],
    "constraints_are_valid": ["ALTER TABLE holds ADD CONSTRAINT more CHECK (amount >= 0) NOT VALID"],
}


def without_defences(db: Db) -> None:
    """No trigger and no constraint is in force any more, whatever a kind of store has."""
    if db.dialect == "sqlite":
        db.execute("PRAGMA foreign_keys = OFF")
        db.execute("PRAGMA ignore_check_constraints = ON")
        for (trigger,) in db.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
            db.execute(f"DROP TRIGGER {trigger}")
        return
    triggers = "SELECT tgname, tgrelid::regclass FROM pg_trigger WHERE NOT tgisinternal"
    for trigger, table in db.execute(triggers.replace("::", " :: ")).fetchall():
        db.execute(f"DROP TRIGGER {trigger} ON {table}")
    constraints = "SELECT conname, conrelid::regclass FROM pg_constraint WHERE contype IN ('c', 'f') AND conrelid <> 0"
    for constraint, table in db.execute(constraints.replace("::", " :: ")).fetchall():
        db.execute(f"ALTER TABLE {table} DROP CONSTRAINT {constraint}")


def test_every_promise_has_a_way_to_break_it(shop: Shop) -> None:
    """The tables above cover the whole check."""
    more = BREAKING_SQLITE if shop.place == shop.path else BREAKING_POSTGRES
    assert {*BREAKING, *more, *(promise for promise, _ in BREAKING_BATCHES + BREAKING_JOBS)} == set(
        shop.books.check().promises
    )


@pytest.mark.parametrize("promise", [*BREAKING, *BREAKING_SQLITE, *BREAKING_POSTGRES])
async def test_the_check_sees_each_broken_promise(shop: Shop, store: Store, promise: str) -> None:
    """A store that is right passes; one that somebody broke with the schema's defences down is named for it."""
    shop.credit(1_000)
    parent, _ = shop.books.keys.create("a", ["keys"])
    child, _ = shop.books.keys.create_below(parent.key_id, ["keys"])
    paid, open_hold = shop.new_hold(100, child.key_id), shop.new_hold(50, child.key_id)
    await store.hold(paid)
    await store.hold(open_hold)
    assert await store.extend([StreamNote(open_hold, charge(20, key_id=child.key_id), open_hold.deadline_ms)])
    store.capture(paid, charge(80, payable=30, key_id=child.key_id))
    opening = OpenTab(Tab("tab_1", "a", child.key_id, shop.clock.now_ms + 1), "me", 10, 10)
    store._writer.submit(opening)
    assert await opening.outcome == 10
    for cost in (3, 4):
        settling = SettleRequest("tab_1", shop.new_hold(5), charge(cost, payable=1, key_id=child.key_id))
        store._writer.submit(settling)
    await open_lock(shop, store)
    await store.drain()
    shop.books.accounts.refund(paid.hold_id, 5, "sorry")
    await store.extend_chain()
    report = shop.books.check()
    assert report.broken == []
    assert (report.head.transfers, report.head.blocks) == (6, 1)
    assert report.tallies["holds_captured"] == report.tallies["tabs_live"] == 1
    assert report.tallies["holds_open"] == 2
    assert report.tallies["requests_settled"] == 2
    breaking = BREAKING | (BREAKING_SQLITE if shop.place == shop.path else BREAKING_POSTGRES)
    if promise not in breaking:
        return  # of the other kind of store
    with shop.by_hand() as db:
        without_defences(db)
        for statement in breaking[promise]:
            db.execute(statement)
    report = shop.books.check()
    assert not report.ok
    assert promise in {broken.promise for broken in report.broken}


async def test_a_backup_is_a_whole_store(file_shop: Shop, tmp_path: Path) -> None:
    """A copy taken while a gateway writes can be put in its place: it passes the check and has everything durable."""
    shop = file_shop
    store = await shop.open()
    shop.credit(1_000)
    key, token = shop.books.keys.create("a", ["embeddings"])
    paid, in_flight = shop.new_hold(100), shop.new_hold(200)
    await store.hold(paid)
    await store.hold(in_flight)
    await store.hold(streams := shop.new_hold(20))
    await store.extend([StreamNote(streams, charge(6), streams.deadline_ms)])
    store.capture(paid, charge(70))
    tab = Tab("tab_1", "a", key.key_id, in_flight.deadline_ms)
    store._writer.submit(opening := OpenTab(tab, store._opened.instance.name, 10, 10))
    assert await opening.outcome == 10
    under = shop.new_hold(4)
    store._writer.submit(SettleRequest("tab_1", under, charge(4, key_id=key.key_id)))
    await store.drain()
    copy = tmp_path / "copy.db"
    shop.books.backup(copy)
    await store.hold(shop.new_hold(1))  # after it: not in the copy
    assert copy.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.glob("*.part")) == []
    restored = await shop.open(copy)
    try:
        stats = restored.stats
        assert (stats.recovered, stats.captured_at_notes, stats.tabs_recovered) == (1, 1, 1)
        assert await restored.keys.find(token) is not None
        with shop.books.open(copy, clock=shop.clock, secret=secret) as books:
            assert books.check().ok
            account = books.accounts.find("a")
            assert (account.balance_nanousd, account.held_nanousd) == (920, 0)
            assert books.reports.explain(under.hold_id).captured == 4
    finally:
        await restored.close()
    await store.close()


def test_a_backup_that_cannot_be_written_leaves_nothing(file_shop: Shop, tmp_path: Path) -> None:
    """Where there is no such folder, or a folder is in its place, there is a plain refusal."""
    shop = file_shop
    with pytest.raises(StoreUnavailable):
        shop.books.backup(tmp_path / "nowhere" / "copy.db")
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(StoreUnavailable):
        shop.books.backup(target, overwrite=True)
    assert list(tmp_path.glob("*.part")) == []


def test_a_backup_overwrites_only_when_told(file_shop: Shop, tmp_path: Path) -> None:
    """An earlier backup, or any file, stays as it was unless its owner says that it may go."""
    shop = file_shop
    target = tmp_path / "copy.db"
    target.write_bytes(b"dear to me")
    with pytest.raises(InvalidValue, match="exists"):
        shop.books.backup(target)
    assert target.read_bytes() == b"dear to me"
    shop.books.backup(target, overwrite=True)
    assert target.read_bytes().startswith(b"SQLite format 3")
    assert target.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", ".lock"])
async def test_a_backup_is_never_written_over_the_store(
    file_shop: Shop, tmp_path: Path, suffix: str, overwrite: bool
) -> None:
    """Whatever the path: its own, by a detour, or a link; the store goes on."""
    shop = file_shop
    store = await shop.open()
    file = shop.path.with_name(shop.path.name + suffix)
    link, other_name = tmp_path / "link", tmp_path / "other"
    link.symlink_to(file)
    other_name.hardlink_to(file)
    for target in (file, file.parent / ".." / file.parent.name / file.name, link, other_name):
        with pytest.raises(InvalidValue, match="the store itself"):
            shop.books.backup(target, overwrite=overwrite)
    shop.credit(10)
    await store.hold(shop.new_hold(10))
    shop.assert_right()
    await store.close()


def test_the_books_say_when_the_store_is_locked(file_shop: Shop) -> None:
    """A statement that another writer keeps from running is a StoreUnavailable, not the driver's error."""
    shop = file_shop
    db = SqliteEngine(shop.path).connect(busy_s=1)
    db.begin()
    shop.books._db.execute("PRAGMA busy_timeout = 1")  # the real wait is seconds
    with pytest.raises(StoreUnavailable):
        shop.books.accounts.create("b")
    db.execute("ROLLBACK")
    db.close()
    assert isinstance(shop.books.accounts.create("b").created_ms, int)
