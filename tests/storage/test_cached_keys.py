"""For how long a key is remembered, all that is known of it, and the note of when it was used."""

import asyncio
import gc
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import Overloaded
from embedmesh.rules.ports import Caller
from embedmesh.storage.books.keys import Limits
from embedmesh.storage.cached.keys import GUESSES_MAX, KNOWN_S, UNKNOWN_MAX, UNKNOWN_S, KeyRing
from embedmesh.storage.ledger.writes import Change
from embedmesh.storage.secrets.tokens import checksum, hash_token, make_token
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
OLD = "em_" + "0123456789abcdefABCDEFghijklMNOP"
OLD += checksum(OLD)  # as keys were before they had a stamp


class GatedReads:
    """Answers when the gate is open, for `good` keys at once. `at_one_time` is the most that it was asked."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.good: set[bytes] = set()
        self.asked = self.asking = self.at_one_time = 0

    async def ask(self, statement: str, values: Any) -> Any:
        self.asked += 1
        self.asking += 1
        self.at_one_time = max(self.at_one_time, self.asking)
        try:
            if values["token_hash"] not in self.good:
                await self.gate.wait()
            return [ROW] if values["token_hash"] in self.good else []
        finally:
            self.asking -= 1

    def close(self) -> None:
        """Nothing to let go of."""


class Told:
    """Topics that change when the test says so."""

    change: Callable[[], None]

    def on(self, topic: str, call: Callable[[], None]) -> None:
        self.change = call


class Ring:
    """A key ring over a store that is written by hand."""

    def __init__(self) -> None:
        self.reads, self.topics = GatedReads(), Told()
        nobody: Any = None  # writes
        topics: Any = self.topics
        self.keys = KeyRing(self.reads, nobody, topics, HandClock(), SECRET)

    def make(self, token: str | None = None) -> str:
        token = token or make_token("em", SECRET)
        self.reads.good.add(hash_token(token, SECRET))
        return token

    def flood(self, count: int) -> list["asyncio.Task[Caller | None]"]:
        return [asyncio.create_task(self.keys.find(made_up())) for _ in range(count)]


def made_up() -> str:
    """Well-formed, as anybody can make one who has read `tokens.py`."""
    return make_token("em", secrets.token_bytes(32))


async def settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_made_up_keys_are_looked_up_one_at_a_time_and_few_of_them_wait() -> None:
    """Those beyond are told to come again; when all have their answer, so have all places."""
    ring = Ring()
    tasks = ring.flood(3 * GUESSES_MAX)
    await settled()
    refused = [task for task in tasks if task.done()]
    assert all(isinstance(task.exception(), Overloaded) for task in refused)
    assert (len(refused), ring.reads.asking) == (2 * GUESSES_MAX, 1)
    for task in tasks[:2]:  # whoever goes makes room
        task.cancel()
    await settled()
    tasks = tasks[2:GUESSES_MAX] + ring.flood(2)
    await settled()
    assert not any(task.done() for task in tasks)
    ring.reads.gate.set()
    assert await asyncio.gather(*tasks) == [None] * GUESSES_MAX
    assert (ring.reads.at_one_time, ring.keys._guesses) == (1, 0)


async def test_keys_of_ours_never_wait_behind_made_up_ones() -> None:
    """One that was never seen here, one that is remembered, and one that was, before some key was changed."""
    ring = Ring()
    new, remembered, old = ring.make(), ring.make(), ring.make(OLD)
    for token in (remembered, old):
        assert await ring.keys.find(token) is not None
    strangers = ring.flood(3 * GUESSES_MAX)
    await settled()

    async def all_are_found() -> int:
        """How often the store was asked for that."""
        before = ring.reads.asked
        async with asyncio.timeout(5):
            for token in (new, remembered, old):
                assert await ring.keys.find(token) is not None
        return ring.reads.asked - before

    assert (await all_are_found(), await all_are_found()) == (1, 0)
    ring.topics.change()
    assert (await all_are_found(), await all_are_found()) == (3, 0)
    ring.reads.gate.set()
    await asyncio.gather(*strangers, return_exceptions=True)


async def test_a_key_of_before_there_were_stamps_is_good_still() -> None:
    """It is looked up in the turn of those that may be made up, until it is known."""
    ring = Ring()
    ring.make(OLD)
    tasks = ring.flood(GUESSES_MAX - 1)
    await settled()
    looking = asyncio.create_task(ring.keys.find(OLD))
    await settled()
    assert not looking.done()
    ring.reads.gate.set()
    assert await looking is not None
    await asyncio.gather(*tasks)


async def test_made_up_keys_push_out_none_that_are_known_and_fill_no_memory() -> None:
    ring = Ring()
    ring.reads.gate.set()
    good = [ring.make() for _ in range(5)]
    for token in good:
        await ring.keys.find(token)
    for _ in range(UNKNOWN_MAX + 50):
        await ring.keys.find(made_up())
    asked = ring.reads.asked
    for token in good:
        assert await ring.keys.find(token) is not None
    assert (ring.reads.asked, len(ring.keys._unknown), len(ring.keys._known)) == (asked, UNKNOWN_MAX, 5)


async def test_all_that_a_key_may_do_is_known(shop: Shop, store: Store) -> None:
    """Its models by their ids, which may have spaces, both its rates, and its account's cache."""
    shop.books.accounts.set_cache("a", CachePolicy.CHARGED)
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
