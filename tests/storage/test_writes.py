"""What a write says to whoever waits for it: once, whatever becomes of its batch, and nothing to who has gone."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from embedmesh.rules.errors import InsufficientQuota, InternalError, SetupError, StoreUnavailable
from embedmesh.rules.holds import Hold, HoldEnd, Payable
from embedmesh.storage import instance
from embedmesh.storage.instance import take_instance
from embedmesh.storage.ledger.end_hold import EndHold, Expire
from embedmesh.storage.ledger.group_commit import QUEUE_WRITES_MAX
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.writes import Change, Stats
from embedmesh.storage.secrets.tokens import make_token
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, HandClock, Shop, charge

HOLD = Hold("req_1", "a", 1, 0)
GONE = [None, "cancelled"]


def waiting(kind: str) -> PlaceHold | Expire | Change[int]:
    if kind == "hold":
        return PlaceHold(HOLD, "me", None, lambda hold: None)
    return Expire(0) if kind == "sweep" else Change(lambda db, now_ms: 7)


@pytest.mark.parametrize("kind", ["hold", "sweep", "change"])
@pytest.mark.parametrize("gone", [False, True])
async def test_a_batch_that_failed_is_told_to_who_still_waits(kind: str, gone: bool) -> None:
    write = waiting(kind)
    if gone:
        write.outcome.cancel()
    write.failed("the disk is full")
    assert write.outcome.cancelled() == gone
    if not gone:
        with pytest.raises(StoreUnavailable, match="the disk is full"):
            write.outcome.result()


@pytest.mark.parametrize(
    ("kind", "failure", "says"),
    [
        ("hold", InternalError, "The ledger refused to hold money for this request."),
        ("sweep", StoreUnavailable, "The store refused the change."),
    ],
)
@pytest.mark.parametrize("gone", [False, True])
async def test_a_write_that_is_refused_tells_who_still_waits(
    kind: str, failure: type[Exception], says: str, gone: bool
) -> None:
    write = waiting(kind)
    if gone:
        write.outcome.cancel()
    write.refused(ValueError("values that nobody may see"))
    assert write.outcome.cancelled() == gone
    if not gone:
        with pytest.raises(failure) as told:
            write.outcome.result()
        assert str(told.value) == says


@pytest.mark.parametrize("kind", ["sweep", "change"])
async def test_a_batch_that_is_durable_is_told_to_who_still_waits(shop: Shop, store: Store, kind: str) -> None:
    """And to who has gone nothing, without harm to the batch."""
    write, other = waiting(kind), waiting(kind)
    write.outcome.cancel()
    store._writer.submit(write)
    store._writer.submit(other)
    assert await other.outcome == (0 if kind == "sweep" else 7)


async def test_a_change_that_the_store_refuses_is_told(shop: Shop, store: Store) -> None:
    """Alone: the hold in the same batch is placed."""
    shop.credit(10)
    bad: Change[object] = Change(lambda db, now_ms: db.execute("INSERT INTO facts (name, value) VALUES ('x', NULL)"))
    store._writer.submit(bad)
    await store.hold(shop.new_hold(1))
    with pytest.raises(StoreUnavailable, match="refused the change"):
        await bad.outcome
    assert store.stats.broken_writes == 1
    assert shop.money() == (10, 1)


def test_the_end_of_a_hold_is_never_given_up() -> None:
    """It is kept until it is durable: to be told otherwise would be a bug."""
    with pytest.raises(AssertionError, match=r"^a kept write is tried until it is durable$"):
        EndHold(HOLD, HoldEnd.CAPTURE, charge(1)).failed("x")


async def test_a_hold_that_was_given_up_when_it_is_durable_is_given_back() -> None:
    """Its caller was told no, or has gone, while the batch was on its way."""
    given_back: list[Hold] = []
    write = PlaceHold(HOLD, "me", None, given_back.append)
    write._placed = True
    write.outcome.cancel()
    stats = Stats()
    write.committed(stats)
    assert (given_back, stats.holds) == ([HOLD], 1)
    refused = PlaceHold(HOLD, "me", None, given_back.append)
    refused.outcome.cancel()
    refused.committed(stats)
    assert len(given_back) == 1


@pytest.mark.parametrize("applied", [False, True])
async def test_a_hold_whose_batch_failed_is_given_back_where_the_store_may_have_it(
    file_shop: Shop, applied: bool
) -> None:
    """Nobody knows once its statement was run; before that there is nothing to give back."""
    given_back: list[Hold] = []
    write = PlaceHold(HOLD, "me", None, given_back.append)
    if applied:
        with file_shop.by_hand() as db:
            PlaceHold.apply_all(db, file_shop.clock.now_ms, [write])
    write.failed("the disk is full")
    with pytest.raises(StoreUnavailable, match="the disk is full"):
        await write.outcome
    assert given_back == ([HOLD] if applied else [])


async def test_who_has_gone_before_the_batch_is_passed_over(shop: Shop, store: Store) -> None:
    """Nothing is held for it, and nothing given back; those behind it are told what became of theirs."""
    shop.credit(100)
    given_back: list[Hold] = []
    gone, live, poor = (PlaceHold(shop.new_hold(60), "me", None, given_back.append) for _ in range(3))
    gone.outcome.cancel()
    for write in (gone, live, poor):
        store._writer.submit(write)
    assert await live.outcome is None
    with pytest.raises(InsufficientQuota):
        await poor.outcome
    assert (store.stats.commits, store.stats.holds, given_back) == (1, 1, [])
    assert shop.money() == (100, 60)


def test_the_end_of_a_hold_names_the_accounts_whose_money_it_moves(file_shop: Shop) -> None:
    """A charge goes to revenue, and from there to each node that has a share; a release stays with the customer."""
    shares = (Payable("n1", 1), Payable("n2", 1))
    with file_shop.by_hand() as db:
        capture = EndHold(HOLD, HoldEnd.CAPTURE, msgspec.structs.replace(charge(9), payables=shares))
        assert capture.prepare(db, 0) == {"a", "revenue", "node:n1", "node:n2"}
        assert EndHold(HOLD, HoldEnd.RELEASE).prepare(db, 0) == {"a"}


async def test_junk_is_no_key_and_asks_nobody(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_reads", None)
    monkeypatch.setattr(store.keys, "_reads", None)
    assert await store.keys.find("junk") is None
    with pytest.raises(AttributeError):
        await store.keys.find(make_token("em", SECRET))


async def test_uses_that_cannot_be_written_down_now_are_later(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where too much waits, and by the clock; nothing is asked of a store that is away."""
    key, token = shop.books.keys.create("a", ["embeddings"])
    await store.keys.find(token)
    with monkeypatch.context() as full:
        full.setattr("embedmesh.storage.ledger.group_commit.QUEUE_WRITES_MAX", 0)
        store.keys.note_uses_now()
    assert shop.books.keys.find(key.key_id).last_used_ms is None
    assert QUEUE_WRITES_MAX > 0
    monkeypatch.setattr("embedmesh.storage.cached.keys.NOTE_USE_S", 0.01)
    noting = asyncio.ensure_future(store.keys.note_uses())
    while shop.books.keys.find(key.key_id).last_used_ms is None:
        await asyncio.sleep(0.01)
    noting.cancel()


async def test_a_name_is_taken_once_and_there_are_so_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instance, "GATEWAYS_MAX", 2)
    taken = [take_instance(tmp_path, HandClock()) for _ in range(2)]
    assert len({each.name for each in taken}) == 2
    with pytest.raises(SetupError, match="2 gateways use"):
        take_instance(tmp_path, HandClock())
    for each in taken:
        each.close()


async def test_prices_are_read_anew_when_they_change_and_now_and_then(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.storage.test_money_books import MODEL

    monkeypatch.setattr("embedmesh.storage.cached.prices.READ_PRICES_S", 0.02)
    watching = [asyncio.ensure_future(each) for each in (store.prices.watch(), store.changes.watch())]
    shop.books.prices.set("m", 5)
    while store.prices.of(MODEL, "a") != 5:
        await asyncio.sleep(0.01)
    shop.books.prices.set("m", 6, from_ms=shop.clock.now_ms + 50)
    shop.clock.now_ms += 50
    while store.prices.of(MODEL, "a") != 6:
        await asyncio.sleep(0.01)

    async def away(*_: object) -> None:
        raise StoreUnavailable("away")

    monkeypatch.setattr(store._reads, "ask", away)
    await asyncio.sleep(0.1)
    assert store.prices.of(MODEL, "a") == 6
    assert not any(each.done() for each in watching)
    for each in watching:
        each.cancel()


async def test_upkeep_extends_the_chain_and_forgets(shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Now and then, and again after the store was away."""
    from embedmesh.storage.upkeep import upkeep

    monkeypatch.setattr("embedmesh.storage.upkeep.EXTEND_EVERY_S", 0.01)
    monkeypatch.setattr("embedmesh.storage.upkeep.FORGET_EVERY_S", 0.02)
    forgot: list[int] = []
    forget = store.forget

    async def counted() -> int:
        forgot.append(1)
        if len(forgot) == 1:
            raise StoreUnavailable("away")
        return await forget()

    monkeypatch.setattr(store, "forget", counted)
    shop.credit(5)
    keeping = asyncio.ensure_future(upkeep(store.extend_chain, store.forget, shop.clock))
    while shop.books.check().head.transfers != 1 or len(forgot) < 2:
        await asyncio.sleep(0.01)
    keeping.cancel()
