"""Holds, captures and releases against the real store."""

import asyncio
import itertools

import pytest

from embedmesh.rules.errors import InsufficientQuota, InternalError
from embedmesh.rules.holds import MOVES, NOTED, HoldEnd, HoldState, StreamNote
from embedmesh.storage.db import refusals
from embedmesh.storage.ledger.end_hold import EXPIRED_HOLDS_MAX
from embedmesh.storage.store import Store
from tests.storage.shop import LASTS_MS, Shop, charge, crash_image, secret


@pytest.mark.parametrize(
    ("amount", "then", "balance", "held"),
    [
        (101, [], 100, 0),
        (100, [], 100, 100),
        (0, [], 100, 0),
        (90, ["release"], 100, 0),
        (90, ["capture 90"], 10, 0),
        (90, ["capture 1"], 99, 0),
        (90, ["capture 0"], 100, 0),
        (90, ["capture 91"], 100, 90),  # refused: it stays open for the sweep
        (90, ["capture 91", "release"], 100, 0),
        (90, ["capture 50", "release"], 50, 0),
        (90, ["capture 50", "capture 50"], 50, 0),
        (90, ["release", "capture 50"], 100, 0),
        (90, ["release", "release"], 100, 0),
        (90, ["expire"], 100, 90),
        (90, ["later", "expire"], 100, 0),
        (90, ["later", "expire", "capture 50"], 100, 0),
        (90, ["later", "capture 50", "expire"], 50, 0),
        (90, ["later", "release", "expire"], 100, 0),
    ],
)
async def test_what_becomes_of_a_hold(
    shop: Shop, store: Store, amount: int, then: list[str], balance: int, held: int
) -> None:
    """A hold on a balance of 100 ends once; whatever comes after that changes nothing."""
    shop.credit(100)
    hold = shop.new_hold(amount)
    if amount > 100:
        with pytest.raises(InsufficientQuota):
            await store.hold(hold)
    else:
        await store.hold(hold)
    for step in then:
        match step.split():
            case ["capture", cost]:
                store.capture(hold, charge(int(cost)))
            case ["release"]:
                store.release(hold, HoldEnd.RELEASE)
            case ["later"]:
                shop.clock.now_ms += LASTS_MS + 1
            case ["expire"]:
                await store.expire(shop.clock.now_ms)
    assert await store.drain() == 0
    assert shop.money() == (balance, held)
    shop.assert_right()


async def test_counts_tell_what_happened(shop: Shop, store: Store) -> None:
    """Every outcome is counted once: also a capture that came too late, which is never charged."""
    shop.credit(100)
    captured, released, expired, late = (shop.new_hold(10) for _ in range(4))
    for hold in (captured, released, expired, late):
        await store.hold(hold)
    with pytest.raises(InsufficientQuota):
        await store.hold(shop.new_hold(61))
    store.capture(captured, charge(10))
    store.capture(captured, charge(10))
    store.release(captured)
    store.release(released)
    store.release(late)
    store.capture(late, charge(10))
    await store.drain()
    shop.clock.now_ms += LASTS_MS + 1
    assert await store.expire(shop.clock.now_ms) == 1
    stats = store.stats
    assert (stats.holds, stats.holds_refused, stats.captured, stats.released, stats.expired) == (4, 1, 1, 2, 1)
    assert (stats.late_captures, stats.broken_writes, stats.failed_batches) == (1, 0, 0)


async def test_each_capture_that_came_too_late_is_counted_and_logged(
    shop: Shop, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """By its hold's id: the operator can find out what was delivered for nothing."""
    shop.credit(100)
    holds = [shop.new_hold(10), shop.new_hold(10)]
    for hold in holds:
        await store.hold(hold)
        store.release(hold)
        await store.drain()
        store.capture(hold, charge(10))
        await store.drain()
    assert (store.stats.late_captures, store.stats.captured) == (2, 0)
    assert caplog.messages == [
        f"hold {hold.hold_id} had ended before it was captured: delivered, not charged" for hold in holds
    ]


async def test_money_for_ten_lets_exactly_ten_spend(shop: Shop, store: Store) -> None:
    """Of 64 at once with money for 10, exactly 10 get it, whatever the order; the commits are shared."""
    shop.credit(1_000)
    for _ in range(10):
        holds = [shop.new_hold(100) for _ in range(64)]
        outcomes = await asyncio.gather(*(store.hold(hold) for hold in holds), return_exceptions=True)
        good = [hold for hold, outcome in zip(holds, outcomes, strict=True) if outcome is None]
        assert len(good) == 10
        assert all(isinstance(outcome, InsufficientQuota) for outcome in outcomes if outcome is not None)
        for hold in good:
            store.release(hold)
    await store.drain()
    assert shop.money() == (1_000, 0)
    assert store.stats.commits < 64
    shop.assert_right()


async def test_a_node_gets_its_share(shop: Shop, store: Store) -> None:
    """The customer pays the cost; the node's share comes out of it, the rest is revenue."""
    shop.credit(1_000)
    for _ in range(2):
        hold = shop.new_hold(100)
        await store.hold(hold)
        store.capture(hold, charge(100, payable=30))
    await store.drain()
    balances = {account.account_id: account.balance_nanousd for account in shop.books.accounts.list()}
    assert balances == {"a": 800, "revenue": 140, "node:n1": 60, "credit_source": -1_000, "payouts": 0}
    shop.assert_right()


async def test_one_bad_write_does_not_sink_the_others(shop: Shop, store: Store) -> None:
    """A write that the store's rules refuse is counted; the batch around it becomes durable."""
    shop.credit(1_000)
    first, prior, last = shop.new_hold(1), shop.new_hold(2), shop.new_hold(3)
    await store.hold(first)
    store.capture(first, charge(1, payable=2))  # more to the node than the caller pays
    outcomes = await asyncio.gather(*map(store.hold, (prior, prior, last)), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), InternalError, type(None)]
    assert store.stats.broken_writes == 2
    assert shop.money() == (1_000, 6)
    shop.assert_right()


async def test_a_caller_that_goes_while_its_hold_is_written_leaves_nothing_held(shop: Shop, store: Store) -> None:
    """Whenever the caller's task is cancelled, the money is free again once the queue is written."""
    shop.credit(1_000)
    for pauses in range(12):  # from before the batch begins until after it is durable
        task = asyncio.create_task(store.hold(hold := shop.new_hold(100)))
        for _ in range(pauses):
            await asyncio.sleep(0.0001 if pauses > 3 else 0)
        task.cancel()
        try:
            await task
        except asyncio.CancelledError:
            pass
        else:
            store.release(hold)
        await store.drain()
        assert shop.money() == (1_000, 0)
    shop.assert_right()


async def test_a_sweep_releases_any_number_of_holds(shop: Shop, store: Store) -> None:
    """A sweep goes on until no hold is past its deadline, a bounded number at a time; live ones stay."""
    shop.credit(10_000)
    count = 2 * EXPIRED_HOLDS_MAX + 1
    await asyncio.gather(*(store.hold(shop.new_hold(1)) for _ in range(count)))
    shop.clock.now_ms += LASTS_MS
    live = shop.new_hold(5)
    await store.hold(live)
    assert await store.expire(shop.clock.now_ms) == 0  # not past it yet
    assert await store.expire(shop.clock.now_ms + 1) == count == store.stats.expired
    assert shop.money() == (10_000, 5)


async def test_a_dead_gateways_holds_are_released_and_listed(file_shop: Shop) -> None:
    """After a crash nothing stays held, what was durable stays, and what was in flight is counted and listed."""
    shop = file_shop
    store = await shop.open()
    shop.credit(1_000)
    paid, in_flight = shop.new_hold(100), shop.new_hold(200)
    await store.hold(paid)
    await store.hold(in_flight)
    store.capture(paid, charge(60))
    await store.drain()
    store.capture(in_flight, charge(200))  # queued, and lost with the process
    image = crash_image(shop.path, shop.path.parent / "crash")
    heir = await shop.open(image)
    try:
        assert heir.stats.recovered == 1
        heir.capture(in_flight, charge(200))
        await heir.drain()
        assert heir.stats.late_captures == 1
        with shop.books.open(image, clock=shop.clock, secret=secret) as books:
            account = books.accounts.find("a")
            assert (account.balance_nanousd, account.held_nanousd) == (940, 0)
            report = books.check()
            assert report.ok
            assert [row.hold_id for row in report.recovered] == [in_flight.hold_id]
    finally:
        await heir.close()
        await store.close()


@pytest.mark.parametrize(("state", "end", "after"), list(itertools.product(HoldState, HoldEnd, HoldState)))
async def test_sql_allows_exactly_the_moves_of_the_table(
    shop: Shop, store: Store, state: HoldState, end: HoldEnd, after: HoldState
) -> None:
    """Whoever writes to the file, a hold makes the moves of rules.holds.MOVES and no other."""
    shop.credit(100)
    hold = shop.new_hold(10)
    await store.hold(hold)
    if end in NOTED.values():
        await store.extend([StreamNote(hold, charge(10), hold.deadline_ms)])
    if state is HoldState.CAPTURED:
        store.capture(hold, charge(10))
    elif state is HoldState.RELEASED:
        store.release(hold)
    await store.drain()
    captured = 10 if after is HoldState.CAPTURED else None
    move = {"state": after.value, "end": end.value, "captured": captured, "hold_id": hold.hold_id}
    move["ended_ms"] = 0 if after is not HoldState.OPEN else None
    update = (
        "UPDATE holds SET state = :state, ended_by = :end, captured = :captured, ended_ms = :ended_ms "
        "WHERE hold_id = :hold_id"
    )
    with shop.by_hand() as db:
        if MOVES.get((state, end)) is after:
            assert db.execute(update, move).rowcount == 1
        else:
            with pytest.raises(refusals()):
                db.execute(update, move)


ACCOUNT = "INSERT INTO accounts (account_id, kind, balance, held, created_ms) VALUES"
ENTRY = "INSERT INTO entries (account_id, transfer_id, amount) VALUES"
HOLD = (
    "INSERT INTO holds (hold_id, account_id, amount, state, ended_by, owner, created_ms, deadline_ms, ended_ms) VALUES"
)
TRANSFER = (
    "INSERT INTO transfers (transfer_id, kind, source_id, target_id, amount, hold_id, reference, created_ms) VALUES"
)


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        ("UPDATE entries SET amount = amount + 1", "append-only"),
        ("DELETE FROM entries", "append-only"),
        ("UPDATE transfers SET amount = 0", "append-only"),
        ("DELETE FROM transfers", "append-only"),
        (f"{ENTRY} ('revenue', 1, 5)", "one side of its transfer"),
        (f"{ENTRY} ('a', 99, 5)", "one side of its transfer|entries_transfer_id_fkey"),
        ("UPDATE accounts SET held = balance + 1 WHERE account_id = 'a'", "CHECK|accounts_check"),
        ("UPDATE accounts SET balance = held - 1 WHERE account_id = 'a'", "CHECK|accounts_check"),
        ("UPDATE accounts SET credit_limit = 1 WHERE account_id = 'revenue'", "CHECK|accounts_check"),
        ("UPDATE accounts SET cache = 'on' WHERE account_id = 'a'", "CHECK|accounts_cache_check"),
        ("UPDATE accounts SET cache = NULL WHERE account_id = 'a'", "NOT NULL|not-null"),
        ("UPDATE accounts SET cache = 'free' WHERE account_id = 'revenue'", "CHECK|accounts_check"),
        ("UPDATE accounts SET kind = 'node'", "keeps its id"),
        ("DELETE FROM accounts", "never deleted"),
        (f"{ACCOUNT} ('b', 'customer', 5, 0, 0)", "starts empty"),
        ("UPDATE holds SET amount = 1", "keeps its terms|ends once"),
        ("DELETE FROM holds", "never deleted"),
        ("UPDATE usage SET cost = 1", "append-only"),
        ("DELETE FROM usage", "kept until"),
        ("DELETE FROM usage_days", "sums of usage"),
        (f"{TRANSFER} (99, 'charge', 'a', 'revenue', 10, 'req_000001', NULL, 0)", "UNIQUE|once_a_hold"),
        (f"{TRANSFER} (99, 'charge', 'a', 'revenue', 11, 'req_000001', NULL, 0)", "hold captured"),
        (f"{TRANSFER} (99, 'charge', 'a', 'payouts', 10, 'req_000001', NULL, 0)", "hold captured"),
        (f"{TRANSFER} (99, 'payable', 'revenue', 'a', 1, 'req_000001', NULL, 0)", "to a node"),
        (f"{TRANSFER} (99, 'payable', 'a', 'node:n1', 1, 'req_000001', NULL, 0)", "from revenue"),
        (f"{TRANSFER} (99, 'refund', 'revenue', 'a', 11, 'req_000001', 'x', 0)", "at most what its hold captured"),
        (f"{TRANSFER} (99, 'refund', 'payouts', 'a', 1, 'req_000001', 'x', 0)", "at most what its hold captured"),
        (f"{TRANSFER} (99, 'payout', 'node:n1', 'payouts', 3, NULL, 'x', 0)", "what a node has"),
        (f"{TRANSFER} (99, 'payout', 'revenue', 'payouts', 1, NULL, 'x', 0)", "what a node has"),
        (f"{TRANSFER} (99, 'credit', 'credit_source', 'a', 5, NULL, 'payment 0', 0)", "UNIQUE|reference"),
        (f"{TRANSFER} (99, 'credit', 'credit_source', 'a', -5, NULL, 'x', 0)", "CHECK|amount_check"),
        (f"{TRANSFER} (99, 'credit', 'a', 'a', 5, NULL, 'x', 0)", "between the credit source"),
        (f"{TRANSFER} (99, 'credit', 'credit_source', 'nobody', 5, NULL, 'x', 0)", "between the credit source"),
        (f"{TRANSFER} (99, 'credit', 'credit_source', 'revenue', 5, NULL, 'x', 0)", "between the credit source"),
        (f"{TRANSFER} (99, 'credit', 'a', 'credit_source', 91, NULL, 'x', 0)", "CHECK|accounts_check"),
        (f"{TRANSFER} (0, 'credit', 'credit_source', 'a', 5, NULL, 'x', 0)", "after all blocks"),
        ("UPDATE blocks SET created_ms = 0", "append-only"),
        ("DELETE FROM blocks", "append-only"),
        (f"{HOLD} ('h', 'a', 1, 'released', 'release', 'me', 0, 0, 0)", "starts open"),
    ],
)
async def test_the_store_defends_itself(shop: Shop, store: Store, tampering: str, says: str) -> None:
    """No statement, from whatever program, can break a promise that the schema makes."""
    shop.credit(100)
    hold = shop.new_hold(10)
    await store.hold(hold)
    store.capture(hold, charge(10, payable=2))
    await store.drain()
    assert await store.extend_chain() == 3
    with shop.by_hand() as db, pytest.raises(refusals(), match=says):
        db.execute(tampering)
    assert shop.money() == (90, 0)
    shop.assert_right()


@pytest.mark.parametrize("amount", [91, -1])
async def test_a_hold_without_cover_is_never_a_row(shop: Shop, store: Store, amount: int) -> None:
    """Whoever inserts it: too much leaves no row, and less than nothing is refused."""
    shop.credit(90)
    with shop.by_hand() as db:
        try:
            placed = db.execute(f"{HOLD} ('h', 'a', {amount}, 'open', NULL, 'me', 0, 0, NULL)").rowcount
        except refusals():
            placed = 0
    assert placed == 0
    assert shop.money() == (90, 0)
    shop.assert_right()


async def test_a_replaced_row_is_refused(file_shop: Shop) -> None:
    """SQLite's REPLACE deletes a row: the triggers see that."""
    file_shop.credit(1)
    with file_shop.by_hand() as db, pytest.raises(refusals(), match="append-only"):
        db.execute("REPLACE INTO transfers SELECT * FROM transfers")
