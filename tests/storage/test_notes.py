"""Holds of streams: extended, noted, and captured at their last durable note where their gateway does not end them."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from embedmesh.rules.holds import Charge, Claim, Hold, Meter, Metered, Payable, StreamNote
from embedmesh.storage.books import Books
from embedmesh.storage.db import refusals
from embedmesh.storage.ledger.end_hold import Expire
from embedmesh.storage.ledger.extend_holds import ExtendHolds
from embedmesh.storage.ledger.lost_holds import LostHolds, note_text
from embedmesh.storage.store import Store
from tests.storage.shop import LASTS_MS, Shop, charge, crash_image, secret

MONEY = 1_000
AMOUNT = 100
METERS = (Metered(Meter.INPUT, 7, 1_000_000), Metered(Meter.OUTPUT, 33, 1_000_000))
DELIVERED = Charge(
    40, 40, "m", "key_1", "n1", user_hash="u", meters=METERS, payables=(Payable("n1", 12), Payable("n2", 3))
)


def noted(hold: Hold, cost: int | Charge, *, lasts_ms: int = 2 * LASTS_MS) -> StreamNote:
    """What a stream has cost by now."""
    return StreamNote(hold, charge(cost) if isinstance(cost, int) else cost, hold.deadline_ms - LASTS_MS + lasts_ms)


async def streaming(shop: Shop, store: Store, *, amount: int = AMOUNT) -> Hold:
    """A hold."""
    shop.credit(MONEY)
    hold = shop.new_hold(amount)
    await store.hold(hold)
    return hold


def notes_of(shop: Shop) -> list[tuple[str, int]]:
    with shop.by_hand() as db:
        return [tuple(row) for row in db.execute("SELECT hold_id, cost FROM hold_notes ORDER BY hold_id").fetchall()]


@pytest.mark.parametrize(
    ("then", "balance", "held", "ended_by"),
    [
        (["note 40"], MONEY, AMOUNT, None),
        (["note 40", "later", "expire"], MONEY, AMOUNT, None),  # it lasts longer
        (["note 40", "later", "later", "expire"], MONEY - 40, 0, "expire_noted"),
        (["note 40", "later", "note 70", "later", "expire"], MONEY, AMOUNT, None),
        (["note 40", "note 70", "later", "later", "expire"], MONEY - 70, 0, "expire_noted"),
        (["note 70", "note 40", "later", "later", "expire"], MONEY - 40, 0, "expire_noted"),
        (["note 100", "later", "later", "expire"], MONEY - AMOUNT, 0, "expire_noted"),
        (["note 0", "later", "later", "expire"], MONEY, 0, "expire_noted"),
        (["note 40", "later", "later", "expire", "capture 90"], MONEY - 40, 0, "expire_noted"),
        (["note 40", "later", "later", "expire", "release"], MONEY - 40, 0, "expire_noted"),
        (["note 40", "later", "later", "expire", "expire"], MONEY - 40, 0, "expire_noted"),
        (["note 40", "capture 90", "later", "later", "expire"], MONEY - 90, 0, "capture"),
        (["note 40", "capture 10"], MONEY - 10, 0, "capture"),
        (["note 40", "release", "later", "later", "expire"], MONEY, 0, "release"),
        (
            ["note 40", "capture 101", "later", "later", "expire"],
            MONEY - 40,
            0,
            "expire_noted",
        ),  # refused: a bug of ours
        (["capture 90", "note 40"], MONEY - 90, 0, "capture"),
        (["release", "note 40", "later", "expire"], MONEY, 0, "release"),
        (["later", "note 40", "expire"], MONEY, AMOUNT, None),  # late, but before anybody has ended it
        (["later", "expire", "note 40"], MONEY, 0, "expire"),
        (["note 101", "later", "expire"], MONEY, 0, "expire"),  # not covered: as if nothing was said
        (["note -1", "later", "expire"], MONEY, 0, "expire"),
        (["note 40", "note 101", "later", "later", "expire"], MONEY - 40, 0, "expire_noted"),
        (["note 40", "start again"], MONEY - 40, 0, "recover_noted"),
        (["note 40", "start again", "capture 90"], MONEY - 40, 0, "recover_noted"),
        (["start again", "note 40"], MONEY, 0, "recover"),
    ],
)
async def test_what_becomes_of_a_stream(
    shop: Shop, then: list[str], balance: int, held: int, ended_by: str | None
) -> None:
    """A hold of 100 ends once: as its gateway says, else at its last note. Only an open one keeps its note."""
    store = await shop.open()
    hold = await streaming(shop, store)
    for step in then:
        match step.split():
            case ["note", cost]:
                await store.extend([noted(hold, int(cost))])
            case ["capture", cost]:
                store.capture(hold, charge(int(cost)))
            case ["release"]:
                store.release(hold)
            case ["later"]:
                shop.clock.now_ms += LASTS_MS + 1
                hold = msgspec.structs.replace(hold, deadline_ms=shop.clock.now_ms + LASTS_MS)
            case ["expire"]:
                await store.drain()
                await store.expire(shop.clock.now_ms)
            case ["start", "again"]:
                await store.close()
                store = await shop.open()
    assert await store.drain() == 0
    await store.close()
    assert shop.money() == (balance, held)
    told = shop.books.reports.explain(hold.hold_id)
    assert told.ended_by == ended_by
    assert (notes_of(shop) != []) is (held > 0 and "note 40" in then)
    shop.assert_right()


async def test_a_capture_at_a_note_is_like_any_other(shop: Shop, store: Store) -> None:
    """Entries, payables, usage with its meters, sums by day and the chain: nothing tells it apart but what ended it."""
    ordinary = await streaming(shop, store)
    lost = shop.new_hold(AMOUNT)
    await store.hold(lost)
    await store.extend([noted(lost, DELIVERED)])
    store.capture(ordinary, DELIVERED)
    await store.drain()
    shop.clock.now_ms += 2 * LASTS_MS + 1
    assert await store.expire(shop.clock.now_ms) == 1
    stats = store.stats
    assert (stats.captured, stats.captured_at_notes, stats.expired, stats.holds_extended) == (1, 1, 0, 1)
    one, other = (shop.books.reports.explain(hold.hold_id) for hold in (ordinary, lost))
    assert one.bought == other.bought and one.captured == other.captured == 40
    assert [(m.kind, m.source_id, m.target_id, m.amount) for m in one.moves] == [
        (m.kind, m.source_id, m.target_id, m.amount) for m in other.moves
    ]
    with shop.by_hand() as db:
        kept = db.execute("SELECT meters, user_hash FROM usage").fetchall()
    assert len(kept) == 2 and len({tuple(row) for row in kept}) == 1
    assert await store.extend_chain() == 7
    report = shop.books.check()
    assert report.ok and report.tallies["holds_captured_at_notes"] == 1 and report.recovered == []
    shop.books.accounts.refund(lost.hold_id, 40, "sorry")
    assert shop.money() == (MONEY - 40, 0)
    shop.assert_right()


async def test_many_streams_are_extended_by_a_few_statements(shop: Shop, store: Store) -> None:
    """The ids of those that are open come back; one that is not covered, or has ended, does not disturb the others."""
    shop.credit(10**6)
    holds = [shop.new_hold(AMOUNT) for _ in range(300)]
    await asyncio.gather(*map(store.hold, holds))
    store.release(holds[7])
    await store.drain()
    before = store.stats.commits
    notes = [noted(hold, 101 if at == 9 else at % 100) for at, hold in enumerate(holds)]
    extended = await store.extend(notes)
    assert extended == {hold.hold_id for hold in holds} - {holds[7].hold_id, holds[9].hold_id}
    assert store.stats.commits - before <= 3
    assert (store.stats.holds_extended, store.stats.broken_writes) == (298, 1)
    assert await store.extend([]) == frozenset()
    with shop.by_hand() as db:
        ((lasting,),) = db.execute(
            "SELECT count(*) FROM holds WHERE deadline_ms = :until_ms", {"until_ms": notes[0].deadline_ms}
        ).fetchall()
    assert lasting == 298
    shop.assert_right()


async def test_of_two_notes_in_one_batch_the_later_counts(shop: Shop, store: Store) -> None:
    hold = await streaming(shop, store)
    both = await asyncio.gather(store.extend([noted(hold, 40)]), store.extend([noted(hold, 41)]))
    assert set(both) == {frozenset({hold.hold_id})}
    assert notes_of(shop) == [(hold.hold_id, 41)]


async def test_no_hold_ends_sooner_by_a_note(shop: Shop, store: Store) -> None:
    hold = await streaming(shop, store)
    await store.extend([noted(hold, 40, lasts_ms=1)])
    assert shop.books.reports.explain(hold.hold_id).deadline_ms == hold.deadline_ms


async def test_what_ends_in_the_same_batch_leaves_no_note(shop: Shop, store: Store) -> None:
    """Whichever came first: a note is of an open hold."""
    for first in ("note", "end"):
        hold = await streaming(shop, store)
        if first == "note":
            extending = asyncio.ensure_future(store.extend([noted(hold, 40)]))
            await asyncio.sleep(0)
            store.capture(hold, charge(50))
        else:
            store.capture(hold, charge(50))
            extending = asyncio.ensure_future(store.extend([noted(hold, 40)]))
        assert await extending == frozenset()
        await store.drain()
        assert notes_of(shop) == [] and not store._noted
    shop.assert_right()


async def test_ordinary_holds_cost_no_statement_more(shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only who was extended has a note to delete."""
    hold = await streaming(shop, store)
    monkeypatch.setattr("embedmesh.storage.ledger.end_hold.drop_notes", None)
    store.capture(hold, charge(50))
    assert await store.drain() == 0
    assert shop.money() == (MONEY - 50, 0)


async def test_another_gateways_sweep_captures_at_the_note(shop: Shop, store: Store) -> None:
    """And its owner, late, hears of it: what it has delivered since is not charged, and counted."""
    hold = await streaming(shop, store)
    await store.extend([noted(hold, 40)])
    other = await shop.open()
    assert other.stats.recovered == other.stats.captured_at_notes == 0
    shop.clock.now_ms += 2 * LASTS_MS + 1
    assert await other.expire(shop.clock.now_ms) == 1
    assert await store.extend([noted(hold, 60)]) == frozenset()
    store.capture(hold, charge(90))
    await store.drain()
    assert (store.stats.late_captures, other.stats.captured_at_notes) == (1, 1)
    assert shop.money() == (MONEY - 40, 0)
    shop.assert_right()
    await other.close()


@pytest.mark.parametrize(
    ("changed", "balance"), [("noted anew", MONEY), ("noted at first", MONEY), ("captured", MONEY - 50)]
)
async def test_what_changes_once_it_was_found_overdue_stays(
    shop: Shop, store: Store, changed: str, balance: int
) -> None:
    """PostgreSQL finds what is overdue before it has the account's lock."""
    hold = await streaming(shop, store)
    first = noted(hold, 40, lasts_ms=LASTS_MS)
    before = (None, None) if changed == "noted at first" else (40, note_text(first.charge))
    if changed != "noted at first":
        await store.extend([first])
    if changed == "captured":
        store.capture(hold, charge(50))
        await store.drain()
    else:
        await store.extend([noted(hold, 60, lasts_ms=LASTS_MS)])

    class FoundBefore(Expire):
        def prepare(self, db: Any, now_ms: int) -> set[str]:
            self._overdue = LostHolds([(hold.hold_id, "a", AMOUNT, hold.deadline_ms, *before)])
            return {"a"}

    store._writer.submit(sweep := FoundBefore(hold.deadline_ms + 1))
    await sweep.outcome
    assert shop.money()[0] == balance
    assert (store.stats.captured_at_notes, store.stats.broken_writes) == (0, 0)
    shop.assert_right()
    await store.expire(hold.deadline_ms + 1)
    assert shop.money() == (MONEY - (50 if changed == "captured" else 60), 0)
    shop.assert_right()


async def test_a_release_is_written_however_long_the_queue_is(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hold without a note may be left to the sweep, which releases it; one with a note it would charge."""
    hold, other = await streaming(shop, store), shop.new_hold(AMOUNT)
    await store.hold(other)
    await store.extend([noted(hold, 40)])
    monkeypatch.setattr(store._writer, "full", lambda: True)
    store.release(hold)
    store.release(other)
    await store.drain()
    assert shop.money() == (MONEY, AMOUNT)
    assert shop.books.reports.explain(hold.hold_id).ended_by == "release"


async def test_whose_accounts_are_locked(shop: Shop) -> None:
    """Whose money a capture at a note moves; and the customer while it is noted, so that no sweep comes between."""
    hold = shop.new_hold(AMOUNT)
    row = hold.hold_id, "a", AMOUNT, 0, 40, note_text(DELIVERED)
    assert LostHolds([row]).accounts == {"a", "revenue", "node:n1", "node:n2"}
    assert LostHolds([(*row[:4], None, None)]).accounts == {"a"}
    with shop.by_hand() as db:
        assert ExtendHolds([noted(hold, 40), noted(hold, 101)]).prepare(db, 0) == {"a"}


async def test_a_killed_gateways_streams_are_charged_what_was_noted(file_shop: Shop, tmp_path: Path) -> None:
    """What was acknowledged is charged, what was not is not; a hold without a note is released, an ended one stays."""
    shop = file_shop
    store = await shop.open()
    shop.credit(10_000)
    holds = [shop.new_hold(AMOUNT) for _ in range(6)]
    for hold in holds:
        await store.hold(hold)
    await store.extend([noted(hold, DELIVERED) for hold in holds[:4]])
    await store.extend([noted(holds[0], 77)])
    store.capture(holds[1], charge(90))
    store.release(holds[2])
    await store.drain()
    image = crash_image(shop.path, tmp_path / "crash")
    heir = await shop.open(image)
    assert (heir.stats.recovered, heir.stats.captured_at_notes) == (2, 2)
    assert await heir.expire(shop.clock.now_ms + 10 * LASTS_MS) == 0
    with Books.open(image, clock=shop.clock, secret=secret) as books:
        account = books.accounts.find("a")
        assert (account.balance_nanousd, account.held_nanousd) == (10_000 - 77 - 90 - 40, 0)
        assert books.check().broken == []
        ends = [books.reports.explain(hold.hold_id).ended_by for hold in holds]
    assert ends == ["recover_noted", "capture", "release", "recover_noted", "recover", "recover"]
    await heir.close()
    await store.close()


@pytest.mark.parametrize("after", ["expire", "start again"])
@pytest.mark.parametrize(
    "broken",
    ["no JSON", "{}", note_text(charge(41)), note_text(charge(40, payable=41)), note_text(charge(40)) + "x"],
)
async def test_a_note_that_cannot_be_charged_stops_nobody(shop: Shop, broken: str, after: str) -> None:
    """As somebody with a shell could write it: the check finds it, its hold is released, and others are charged."""
    store = await shop.open()
    hold, other = await streaming(shop, store), shop.new_hold(AMOUNT)
    await store.hold(other)
    await store.extend([noted(hold, 40), noted(other, 40)])
    with shop.by_hand() as db:
        db.execute("UPDATE hold_notes SET charge = :text WHERE hold_id = :id", {"text": broken, "id": hold.hold_id})
    [found] = shop.books.check().broken
    assert (found.promise, found.subject) == ("notes_can_be_charged", f"note of {hold.hold_id}")
    if after == "expire":
        shop.clock.now_ms += 2 * LASTS_MS + 1
        await store.expire(shop.clock.now_ms)
    else:
        await store.close()
        store = await shop.open()
    assert shop.money() == (MONEY - 40, 0)
    assert shop.books.reports.explain(hold.hold_id).state == "released"
    shop.assert_right()
    await store.close()


async def test_a_request_with_an_idempotency_key_may_come_again(shop: Shop, store: Store) -> None:
    """What was captured at its note has no reply to repeat: the next request with its key is one of its own."""
    shop.credit(MONEY)
    claim = Claim(b"k" * 32, b"b" * 32)
    hold, again = shop.new_hold(AMOUNT), shop.new_hold(AMOUNT)
    assert await store.hold(hold, claim) is None
    await store.extend([noted(hold, 40)])
    prior = await store.hold(again, claim)
    assert prior is not None and prior.state == "open"
    shop.clock.now_ms += 2 * LASTS_MS + 1
    await store.expire(shop.clock.now_ms)
    assert await store.hold(again, claim) is None
    store.capture(again, charge(50), b"the reply")
    await store.drain()
    assert shop.money() == (MONEY - 90, 0)
    shop.assert_right()


NOTE = "INSERT INTO hold_notes (hold_id, cost, charge, noted_ms) VALUES"
END = "UPDATE holds SET state = 'captured', ended_ms = 1, captured = {}, ended_by = '{}' WHERE hold_id = 'req_000000'"
RELEASE = "UPDATE holds SET state = 'released', ended_ms = 1, ended_by = '{}' WHERE hold_id = 'req_000000'"


@pytest.mark.parametrize(
    ("tampering", "says"),
    [
        (f"{NOTE} ('nothing', 1, '', 0)", "open hold, which covers it"),
        (f"{NOTE} ('req_000001', 101, '', 0)", "open hold, which covers it"),
        (f"{NOTE} ('req_000002', 1, '', 0)", "open hold, which covers it"),
        (f"{NOTE} ('req_000001', -1, '', 0)", "CHECK|cost_check"),
        ("UPDATE hold_notes SET cost = 101", "open hold, which covers it"),
        ("UPDATE hold_notes SET hold_id = 'req_000001'", "open hold, which covers it"),
        (END.format(41, "expire_noted"), "captured at its note"),
        (END.format(39, "recover_noted"), "captured at its note"),
        (RELEASE.format("expire"), "captured at its note"),
        (RELEASE.format("recover"), "captured at its note"),
        (END.format(40, "expire"), "CHECK|holds_are_captured_by"),
        (RELEASE.format("expire_noted"), "CHECK|holds_are_captured_by|captured at its note"),
        (END.format(5, "expire_noted").replace("req_000000", "req_000001"), "captured at its note"),
        ("UPDATE holds SET deadline_ms = deadline_ms + 1 WHERE hold_id = 'req_000001'", "keeps its terms"),
        ("UPDATE holds SET deadline_ms = deadline_ms - 1 WHERE hold_id = 'req_000000'", "keeps its terms"),
        ("UPDATE holds SET owner = 'me' WHERE hold_id = 'req_000000'", "keeps its terms"),
    ],
)
async def test_the_store_defends_notes(shop: Shop, store: Store, tampering: str, says: str) -> None:
    """No statement, from whatever program, charges a lost stream for another amount than is noted."""
    shop._numbers = iter(range(10**6))
    with shop.by_hand() as db:
        shop.books.accounts.credit("a", MONEY, "money")
        holds = [shop.new_hold(AMOUNT) for _ in range(3)]
        for hold in holds:
            await store.hold(hold)
        await store.extend([noted(holds[0], 40)])
        store.release(holds[2])
        await store.drain()
        with pytest.raises(refusals(), match=says):
            db.execute(tampering)


async def test_the_check_finds_a_note_of_a_hold_that_has_ended(shop: Shop, store: Store) -> None:
    """As a program with a bug would leave it."""
    hold = await streaming(shop, store)
    await store.extend([noted(hold, 40)])
    store._noted.clear()
    store.capture(hold, charge(50))
    await store.drain()
    [found] = shop.books.check().broken
    assert (found.promise, found.detail) == ("notes_end_with_their_holds", "cost 40, hold captured of 100")
