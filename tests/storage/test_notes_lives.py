"""Random lives of streams at two gateways: noted, ended, swept and killed in any order. The books are exact."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence

import msgspec
import pytest

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.holds import Hold, HoldEnd, Meter, Metered, Payable, StreamNote
from embedmesh.storage.books.reports import Explained
from embedmesh.storage.store import Store
from tests.data import quick_or
from tests.storage.shop import LASTS_MS, Shop, charge

SEEDS = quick_or(40, quick=4)
GATEWAYS = 2
STREAMS = 24
MONEY = 10**9
AMOUNT = 1_000
ENDS = [HoldEnd.CAPTURE, HoldEnd.CAPTURE, HoldEnd.RELEASE, None, None]  # None: nobody ends it


class Stream:
    """One stream, and what must be true of it."""

    def __init__(self, hold: Hold) -> None:
        self.hold = hold
        self.cost = 0
        self.tried = [0]  # costs that were to be noted, in their order
        self.noted: int | None = None  # the last of them that was acknowledged
        self.captures: list[int] = []
        self.released = False

    def charge(self) -> StreamNote:
        """What it has cost by now; with a share for one of two nodes, of one meter or of two."""
        made = msgspec.structs.replace(
            charge(self.cost, payable=self.cost // 3), node_id="n1", payables=(Payable("n2", self.cost // 3),)
        )
        if self.cost % 2:
            meters = Metered(Meter.INPUT, 1, 1_000_000), Metered(Meter.OUTPUT, self.cost - 1, 1_000_000)
            made = msgspec.structs.replace(made, meters=meters, tokens=self.cost)
        return StreamNote(self.hold, made, self.hold.deadline_ms)

    def wrong(self, told: Explained) -> str | None:
        """What is not as it must be, once it is over."""
        state = told.state, told.ended_by, told.captured
        match told.ended_by:
            case "capture":
                right = told.captured in self.captures
            case "release":
                right = self.released
            case "expire_noted" | "recover_noted":
                right = told.captured in self.tried and told.captured >= (self.noted or 0)
            case "expire" | "recover":
                right = self.noted is None
            case _:
                right = False
        return None if right else f"{state}, noted {self.noted} of {self.tried}, captures {self.captures}"


class World:
    """A store, its gateways, and their streams."""

    def __init__(self, shop: Shop, seed: int) -> None:
        self.shop = shop
        self.dice = random.Random(seed)
        self.stores: list[Store] = []
        self.lives: list[list[asyncio.Task[None]]] = [[] for _ in range(GATEWAYS)]
        self.streams: list[Stream] = []

    async def run(self) -> None:
        """Until all streams are over."""
        self.shop.credit(MONEY)
        self.stores = [await self.shop.open(lock_wait_s=5) for _ in range(GATEWAYS)]
        for _ in range(STREAMS):
            await self.begin(self.dice.randrange(GATEWAYS))
            await self.happen()
        for lives in self.lives:
            await asyncio.gather(*lives, return_exceptions=True)
        for store in self.stores:
            await store.drain()
            await store.close()
        self.shop.clock.now_ms += 100 * LASTS_MS
        store = await self.shop.open()
        await store.expire(self.shop.clock.now_ms)
        await store.close()

    async def happen(self) -> None:
        """Time passes, somebody sweeps, or a gateway is killed."""
        self.shop.clock.now_ms += self.dice.choice([0, 1, LASTS_MS // 4, LASTS_MS // 2])
        await asyncio.sleep(self.dice.choice([0, 0, 0.001, 0.003]))
        store = self.dice.choice(self.stores)
        if self.dice.random() < 0.5:
            await store.expire(self.shop.clock.now_ms)
        elif self.dice.random() < 0.1:
            await self.kill(self.stores.index(store))

    async def begin(self, at: int) -> None:
        """A stream at a gateway."""
        hold = self.shop.new_hold(AMOUNT)
        hold = msgspec.structs.replace(hold, deadline_ms=self.shop.clock.now_ms + self.dice.randrange(2 * LASTS_MS))
        self.streams.append(stream := Stream(hold))
        await self.stores[at].hold(hold)
        self.lives[at].append(asyncio.ensure_future(self.live(stream, self.stores[at])))

    async def live(self, stream: Stream, store: Store) -> None:
        """Some notes, and an end; its gateway may be killed anywhere."""
        for _ in range(self.dice.randrange(5)):
            await asyncio.sleep(self.dice.choice([0, 0, 0.001, 0.002]))
            stream.cost += self.dice.randrange(AMOUNT // 5)
            stream.tried.append(stream.cost)
            deadline_ms = self.shop.clock.now_ms + self.dice.randrange(2 * LASTS_MS)
            try:
                note = msgspec.structs.replace(stream.charge(), deadline_ms=deadline_ms)
                extended = await store.extend([note])
            except StoreUnavailable:
                continue
            if stream.hold.hold_id not in extended:
                break
            stream.noted = stream.cost
        end = self.dice.choice(ENDS)
        if end is HoldEnd.CAPTURE:
            stream.cost += self.dice.randrange(AMOUNT // 5)
            stream.captures.append(stream.cost)
            store.capture(stream.hold, stream.charge().charge)
        elif end is HoldEnd.RELEASE:
            stream.released = True
            store.release(stream.hold)

    async def kill(self, at: int) -> None:
        """What was queued is lost, what is being written becomes durable or not; another takes its place."""
        dying, lives = self.stores[at], self.lives[at]
        for life in lives:
            life.cancel()
        await asyncio.gather(*lives, return_exceptions=True)
        lives.clear()
        await dying._writer.close()
        dying._opened.close(clean=False)
        self.stores[at] = await self.shop.open(lock_wait_s=5)


def judge(world: World, told: Sequence[Explained]) -> Counter[str]:
    """How many ended how; raises where one is wrong."""
    wrong = [stream.wrong(each) for stream, each in zip(world.streams, told, strict=True)]
    assert [one for one in wrong if one is not None] == []
    return Counter(str(each.ended_by) for each in told)


@pytest.mark.parametrize("seed", range(SEEDS))
async def test_whatever_happens_a_stream_is_charged_what_was_said_of_it(shop: Shop, seed: int) -> None:
    """Its capture, or its last durable note, or nothing where there is none; once, and never more than it delivered."""
    world = World(shop, seed)
    await world.run()
    told = [shop.books.reports.explain(stream.hold.hold_id) for stream in world.streams]
    judge(world, told)
    assert shop.money() == (MONEY - sum(each.captured or 0 for each in told), 0)
    with shop.by_hand() as db:
        assert db.execute("SELECT count(*) FROM hold_notes").fetchall() == [(0,)]
    shop.assert_right()


async def test_the_lives_see_every_end(file_shop: Shop) -> None:
    """Else they would prove nothing of it."""
    seen: Counter[str] = Counter()
    for seed in range(6):
        shop = Shop(file_shop.folder.parent / f"world{seed}")
        world = World(shop, seed)
        await world.run()
        seen += judge(world, [shop.books.reports.explain(stream.hold.hold_id) for stream in world.streams])
        shop.books.close()
    assert seen.keys() == {end.value for end in HoldEnd}
