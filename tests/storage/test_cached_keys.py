"""For how long a key is remembered, all that is known of it, and the note of when it was used."""

import asyncio
import gc
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.ports import Caller
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.cached.keys import KNOWN_S, UNKNOWN_MAX, UNKNOWN_S, KeyRing
from embedmesh.storage.ledger.writes import Change
from embedmesh.storage.secrets.tokens import hash_token, make_token
from embedmesh.storage.store import Store
from tests.storage.shop import SECRET, HandClock, Shop


@pytest.fixture
def shop(file_shop: Shop) -> Shop:
    """All of this is about what a gateway has in memory."""
    return file_shop


@pytest.fixture
def asked(store: Store, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the store is asked for keys, one each time."""
    made: list[str] = []
    ask = store.keys._reads.ask

    async def counting(statement: str, values: Any) -> Any:
        made.append(statement)
        return await ask(statement, values)

    monkeypatch.setattr(store.keys._reads, "ask", counting)
    return made


@pytest.fixture
def standing(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> Shop:
    """Spans are as long as the test says."""
    monkeypatch.setattr(shop.clock, "monotonic", lambda: 1_000.0 + shop.clock.skipped_s)
    return shop


@pytest.mark.parametrize(("good", "span_s"), [(True, KNOWN_S), (False, UNKNOWN_S)])
async def test_a_key_is_remembered_for_so_long(
    standing: Shop, store: Store, asked: list[str], good: bool, span_s: float
) -> None:
    """A good one, and for a shorter time that there is none: it might be made any moment."""
    token = standing.books.keys.create("a", ["embeddings"])[1] if good else make_token("em", SECRET)
    for skipped_s, times in ((0.0, 1), (span_s, 1), (span_s + 0.001, 2)):
        standing.clock.skipped_s = skipped_s
        assert (await store.keys.find(token) is not None) == good
        assert len(asked) == times


async def test_a_key_that_is_looked_up_again_takes_no_others_place(
    standing: Shop, store: Store, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often one that is none is tried, a good key stays remembered."""
    monkeypatch.setattr("embedmesh.storage.cached.keys.KNOWN_MAX", 2)
    good, unknown = standing.books.keys.create("a", ["embeddings"])[1], make_token("em", SECRET)
    for _ in range(3):
        await store.keys.find(good)
        await store.keys.find(unknown)
        standing.clock.skipped_s += UNKNOWN_S + 0.001
    assert len(asked) == 4


# -- keys that anybody may have made up --------------------------------------------------------------------------------

ROW = ("a", "key_1", "embeddings", None, None, None, None, "off", None, None, None, None)


class GatedReads:
    """Answers when the gate is open, for `good` keys at once."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.good: set[bytes] = set()
        self.asked = 0

    async def ask(self, statement: str, values: Any) -> Any:
        self.asked += 1
        if values["token_hash"] not in self.good:
            await self.gate.wait()
        return [ROW] if values["token_hash"] in self.good else []

    def close(self) -> None:
        """Nothing to let go of."""


class ScriptedChanges:
    """Changes that happen when the test says so."""

    change: Callable[[], None]

    def on(self, kind: str, call: Callable[[], None]) -> None:
        self.change = call


class Ring:
    """A key ring over a store that is written by hand."""

    def __init__(self) -> None:
        self.reads, self.changes = GatedReads(), ScriptedChanges()
        nobody: Any = None  # writes
        changes: Any = self.changes
        self.keys = KeyRing(self.reads, nobody, changes, HandClock(), SECRET)

    def make(self) -> str:
        token = make_token("em", SECRET)
        self.reads.good.add(hash_token(token, SECRET))
        return token


def made_up() -> str:
    """Well-formed, as anybody can make one who has read `tokens.py`."""
    return make_token("em", secrets.token_bytes(32))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_made_up_keys_are_refused_without_a_query() -> None:
    """At once, also while the store does not answer; they fill no memory, and one of ours is found meanwhile."""
    ring = Ring()
    good = ring.make()
    for _ in range(100):
        assert await ring.keys.find(made_up()) is None
    assert (ring.reads.asked, ring.keys._unknown, ring.keys._known) == (0, {}, {})
    assert await ring.keys.find(good) is not None


async def test_revoked_keys_delay_no_others() -> None:
    """Stamped keys that the store has not: those that are good are found while it still looks for the others."""
    ring = Ring()
    new, remembered = ring.make(), ring.make()
    assert await ring.keys.find(remembered) is not None
    others = [asyncio.create_task(ring.keys.find(make_token("em", SECRET))) for _ in range(100)]
    await settled()

    async def all_are_found() -> int:
        """How often the store was asked for that."""
        before = ring.reads.asked
        async with asyncio.timeout(5):
            for token in (new, remembered):
                assert await ring.keys.find(token) is not None
        return ring.reads.asked - before

    assert (await all_are_found(), await all_are_found()) == (1, 0)
    ring.changes.change()
    assert (await all_are_found(), await all_are_found()) == (2, 0)
    ring.reads.gate.set()
    assert await asyncio.gather(*others) == [None] * 100


async def test_revoked_keys_push_out_none_that_are_known_and_fill_no_memory() -> None:
    ring = Ring()
    ring.reads.gate.set()
    good = [ring.make() for _ in range(5)]
    for token in good:
        await ring.keys.find(token)
    for _ in range(UNKNOWN_MAX + 50):
        await ring.keys.find(make_token("em", SECRET))
    asked = ring.reads.asked
    for token in good:
        assert await ring.keys.find(token) is not None
    assert (ring.reads.asked, len(ring.keys._unknown), len(ring.keys._known)) == (asked, UNKNOWN_MAX, 5)


async def test_all_that_a_key_may_do_is_known(shop: Shop, store: Store) -> None:
    """Its models by their ids, which may have spaces, both its rates, and its account's cache."""
    shop.books.accounts.change("a", cache=CachePolicy.CHARGED)
    limits = Limits(models=("acme/one two", "m"), requests_a_minute=5, tokens_a_minute=700)
    key, token = shop.books.keys.create("a", ["embeddings"], limits=limits)
    models = frozenset({"acme/one two", "m"})
    scopes = frozenset({"embeddings"})
    assert await store.keys.find(token) == Caller("a", key.key_id, scopes, models, 5, 700, CachePolicy.CHARGED)


@pytest.mark.parametrize(("used", "healthy", "written"), [(True, True, 1), (False, True, 0), (True, False, 0)])
async def test_uses_are_noted_where_there_are_some_and_the_store_is_there(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch, used: bool, healthy: bool, written: int
) -> None:
    submitted: list[object] = []
    monkeypatch.setattr(store._writer, "submit", submitted.append)
    monkeypatch.setattr(store._writer, "healthy", lambda: healthy)
    if used:
        await store.keys.find(shop.books.keys.create("a", ["embeddings"])[1])
    store.keys.note_uses_now()
    assert len(submitted) == written


async def test_a_note_that_could_not_be_written_troubles_nobody(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for it: the loop is not told of an error that was never looked at."""
    told: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: told.append(context))
    submitted: list[Change[int]] = []
    monkeypatch.setattr(store._writer, "submit", submitted.append)
    await store.keys.find(shop.books.keys.create("a", ["embeddings"])[1])
    store.keys.note_uses_now()
    submitted.pop().failed("the disk is full")
    await asyncio.sleep(0)
    gc.collect()
    assert told == []


async def test_uses_are_kept_while_the_store_takes_no_writes(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written down once it does again."""
    _, token = shop.books.keys.create("a", ["embeddings"])
    found = await store.keys.find(token)
    assert found is not None
    with monkeypatch.context() as away:
        away.setattr(store._writer, "healthy", lambda: False)
        store.keys.note_uses_now()
    assert list(store.keys._used) == [found.key_id]
    store.keys.note_uses_now()
    await store.drain()
    assert not store.keys._used
