"""Whatever dies when: every line is once in the output or in the error file, and is paid once if in the output."""

import json
import os
import random
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embedmesh.jobs.files import FileBounds, FileStore
from embedmesh.rules.batches import BatchState, line_of
from embedmesh.rules.limits import BATCH_GRACE_S
from embedmesh.storage.batches import BATCH_LEASE_S
from embedmesh.storage.store import Store
from tests.data import quick_or
from tests.jobs.little_runner import PRICE, LittleRunner
from tests.jobs.stepping import Stepped
from tests.storage.batching import ROOM, asks, new_file, new_key, units_of
from tests.storage.shop import SECRET, Shop

LINES = [2, 1, 3]
MONEY = 1_000_000
TO_THE_END = 10**6
LATER_MS = int(BATCH_LEASE_S * 1000) + 1


class Fleet:
    """Two gateways of one store and one folder, and a batch."""

    def __init__(self, shop: Shop, stores: list[Store], seed: int) -> None:
        self.shop = shop
        self.stores = stores
        dice = random.Random(seed)
        self.files = [
            FileStore(
                shop.folder / "files", store.files, store.batches, SECRET, shop.clock, FileBounds(disk_free_min=0)
            )
            for store in stores
        ]
        self.runners = [
            LittleRunner(store, files, units_of(LINES), lambda: dice.random() < 0.7)
            for store, files in zip(stores, self.files, strict=True)
        ]
        self.workers: list[Stepped] = []

    async def start(self) -> None:
        self.shop.credit(MONEY)
        self.key_id = new_key(self.shop)
        for files in self.files:
            await files.open()
        await self.stores[0].files.add(new_file(self.shop), bytes_max=ROOM)

    async def new_batch(self) -> None:
        self.batch_id = (await self.stores[0].batches.create(asks(self.key_id))).batch_id
        self.paid = MONEY - self.shop.money()[0]

    async def begin(self, gateway: int, steps: int) -> Stepped:
        worker = Stepped(self.runners[gateway].work())
        self.workers.append(worker)
        await worker.go_on(steps)
        return worker

    async def crash(self) -> None:
        """All die: a task that waits for its next step would never end by itself."""
        while self.workers:
            await self.workers.pop().crash()

    async def end(self) -> None:
        """Whoever is stopped yet has died; others bring the batch to its end."""
        await self.crash()
        for tries in range(3):
            self.shop.clock.now_ms += LATER_MS
            await (await self.begin(tries % 2, TO_THE_END)).go_on(TO_THE_END)
            batch = await self.stores[0].batches.find("a", self.batch_id)
            assert batch is not None
            if batch.state.final:
                return
        raise AssertionError("the batch has not ended")

    async def check(self) -> BatchState:
        """All that must be true of a batch that is over."""
        await self.stores[0].drain()
        batch = await self.stores[0].batches.find("a", self.batch_id)
        assert batch is not None
        output, errors = [await self.lines_of(each) for each in (batch.output_file_id, batch.error_file_id)]
        if batch.units:
            assert sorted(output + errors) == list(range(sum(LINES)))
            assert (batch.completed, batch.failed, batch.total) == (len(output), len(errors), sum(LINES))
        else:
            assert output == errors == []
        assert self.shop.money() == (MONEY - self.paid - PRICE * len(output), 0)
        with self.shop.by_hand() as db:
            charged = db.execute("SELECT hold_id FROM usage WHERE tab_id = :id", {"id": self.batch_id}).fetchall()
        assert sorted(line_of(self.batch_id, hold_id) for (hold_id,) in charged) == sorted(output)  # type: ignore[type-var]
        self.shop.assert_right()
        return batch.state

    async def lines_of(self, file_id: str | None) -> list[int]:
        if file_id is None:
            return []
        assert await self.stores[0].files.find("a", file_id) is not None
        text = b"".join([part async for part in self.files[0].read(file_id)])
        return [json.loads(line)["custom_id"] for line in text.splitlines()]

    async def check_disk(self) -> None:
        """Once what died was swept, there is nothing but what rows say."""
        old = time.time() - 7_200
        folder = self.shop.folder / "files"
        for path in folder.rglob("*"):
            os.utime(path, (old, old))
        self.shop.clock.skipped_s += 7_200
        await self.files[0].sweep()
        rows = (await self.stores[0].files.page("a", limit=1_000)).files
        names = sorted(path.name for path in folder.rglob("*") if path.is_file() and path.parent.name != "stores")
        assert names == sorted(row.file_id for row in rows if row.file_id != "file-1")


@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_crash_at_any_await_loses_and_doubles_nothing(shop: Shop, store: Store, cancelled: bool) -> None:
    """One gateway dies at its first await, at its second, and so on; the other goes on. Also with a cancel between."""
    other = await shop.open()
    fleet = Fleet(shop, [store, other], seed=7)
    await fleet.start()
    steps, over = 1, False
    while not over:
        await fleet.new_batch()
        worker = await fleet.begin(0, steps)
        over = worker.over
        if cancelled:
            await store.batches.cancel("a", fleet.batch_id)
        await fleet.end()
        state = await fleet.check()
        assert state in ({BatchState.CANCELLED, BatchState.COMPLETED} if cancelled else {BatchState.COMPLETED})
        steps += 1
    assert steps > 20
    await fleet.check_disk()
    await other.close()


ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), st.integers(0, 1), st.integers(1, 40)),
        st.tuples(st.just("go on"), st.integers(0, 9), st.integers(1, 40)),
        st.tuples(st.just("crash"), st.integers(0, 9), st.just(0)),
        st.tuples(st.just("later"), st.just(0), st.sampled_from([0, LATER_MS, LATER_MS])),
        st.tuples(st.just("cancel"), st.just(0), st.just(0)),
        st.tuples(st.just("expire"), st.just(0), st.sampled_from([86_400_000, 86_400_000 + int(BATCH_GRACE_S) * 1000])),
    ),
    min_size=1,
    max_size=14,
)


@given(actions=ACTIONS, seed=st.integers(0, 2**32))
@settings(max_examples=quick_or(400, quick=20), deadline=None, suppress_health_check=list(HealthCheck))
async def test_gateways_that_stop_and_go_on_lose_and_double_nothing(
    actions: list[tuple[str, int, int]], seed: int
) -> None:
    """Slow gateways go on after others have taken over; batches are cancelled and expire; in any order."""
    with tempfile.TemporaryDirectory(prefix="embedmesh-once-", dir=_memory()) as folder:
        async with AsyncExitStack() as stack:
            shop = Shop(Path(folder))
            stack.callback(shop.books.close)
            stores = [await shop.open(), await shop.open()]
            for store in stores:
                stack.push_async_callback(store.close)
            fleet = Fleet(shop, stores, seed)
            stack.push_async_callback(fleet.crash)
            await fleet.start()
            await fleet.new_batch()
            for what, which, number in actions:
                if what == "begin":
                    await fleet.begin(which, number)
                elif what == "go on" and fleet.workers:
                    await fleet.workers[which % len(fleet.workers)].go_on(number)
                elif what == "crash" and fleet.workers:
                    await fleet.workers.pop(which % len(fleet.workers)).crash()
                elif what == "cancel":
                    await stores[1].batches.cancel("a", fleet.batch_id)
                elif what in ("later", "expire"):
                    shop.clock.now_ms += number
                    await stores[1].expire(shop.clock.now_ms)
            await fleet.end()
            await fleet.check()
            await fleet.check_disk()


def _memory() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
