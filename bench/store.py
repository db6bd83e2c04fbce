"""What a durable hold costs: holds a second with many callers, the time a hold adds at 200 requests a second, and CPU a
request by the size of a batch, under holds and under tabs (see bench.store_cpu).

    python -m bench.store [--store postgres] [--json] [--folder DIR]

The folder should be on the disk that the store will live on: the fsync of that disk is most of what is measured.
"""

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench import store_cpu
from bench.rig.command import bench
from bench.rig.figures import percentile
from bench.rig.postgres import serving_if
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.ids import new_id
from embedmesh.storage.books import Books
from embedmesh.storage.db import Engine
from embedmesh.storage.store import Store

SECRET = bytes(32)
PRICE = 100  # nano-USD a hold
MS_A_MINUTE = 60_000
CHARGE = Charge(cost_nanousd=PRICE, tokens=28, model="model", key_id="key", node_id="node")


CLOCK = SystemClock()


def secret(engine: Engine) -> bytes:
    """The same for every store."""
    return SECRET


def new_hold() -> Hold:
    return Hold(new_id("req", CLOCK), "bench", PRICE, CLOCK.unix_ms() + MS_A_MINUTE)


async def one_request(store: Store) -> float:
    """Hold, then capture. Seconds until the hold was durable."""
    hold = new_hold()
    began = time.perf_counter()
    await store.hold(hold)
    took = time.perf_counter() - began
    store.capture(hold, CHARGE)
    return took


async def throughput(store: Store, callers: int, seconds: float) -> dict[str, float]:
    """`callers` loops of hold and capture without a pause."""
    took: list[float] = []
    until = time.perf_counter() + seconds

    async def caller() -> None:
        while time.perf_counter() < until:
            took.append(await one_request(store))

    commits, writes, cpu = store.stats.commits, store.stats.writes, time.process_time()
    began = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(callers)))
    await store.drain()
    wall = time.perf_counter() - began
    return {
        "callers": callers,
        "holds_per_s": len(took) / wall,
        **{f"p{each}_ms": 1000 * percentile(took, each) for each in (50, 99)},
        "cpu_us_per_hold_and_capture": 1e6 * (time.process_time() - cpu) / len(took),
        "writes_per_commit": (store.stats.writes - writes) / (store.stats.commits - commits),
    }


async def latency(store: Store, per_s: int, seconds: float) -> dict[str, float]:
    """Requests at an even rate, whatever the store does meanwhile."""
    tasks = []
    began = time.perf_counter()
    for number in range(int(per_s * seconds)):
        await asyncio.sleep(max(0.0, began + number / per_s - time.perf_counter()))
        tasks.append(asyncio.create_task(one_request(store)))
    took = await asyncio.gather(*tasks)
    return {
        "requests_per_s": per_s,
        **{f"p{each}_ms": 1000 * percentile(took, each) for each in (50, 99)},
    }


def fsync_ms(folder: Path) -> float:
    """The bare disk: the median of appending 4 KiB and fdatasync."""
    took = []
    descriptor = os.open(folder / "fsync", os.O_WRONLY | os.O_CREAT, 0o600)
    for _ in range(200):
        began = time.perf_counter()
        os.write(descriptor, bytes(4096))
        os.fdatasync(descriptor)
        took.append(time.perf_counter() - began)
    os.close(descriptor)
    return 1000 * percentile(took, 50)


async def find_us(store: Store, token: str, times: int = 20_000) -> float:
    """Microseconds to find, or not to find, a key."""
    began = time.perf_counter()
    for _ in range(times):
        await store.keys.find(token)
    return 1e6 * (time.perf_counter() - began) / times


class Figures(msgspec.Struct, frozen=True):
    """All of it."""

    store: str
    fsync_ms: float
    throughput: list[dict[str, float]]
    latency: dict[str, float]
    find_key_us: float
    find_junk_us: float
    check_s: float
    tallies: dict[str, int]
    bytes_per_request: float | None  # of a store in one file
    cpu_us: list[store_cpu.Row]
    open_and_close_a_tab_us: float
    ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        wrong = [] if self.ok else ["the ledger does not add up"]
        return wrong + store_cpu.over_the_gate(self.store, self.cpu_us)


def make_account(store: str | Path) -> str:
    """A new store's account `bench`, with money; its key."""
    with Books.open(store, clock=CLOCK, secret=secret) as books:
        books.accounts.create("bench")
        books.accounts.credit("bench", 10**15, "bench")
        return books.keys.create("bench", ["embeddings"])[1]


async def measure(
    store: Literal["sqlite", "postgres"] = "sqlite", folder: Path | None = None, seconds: float = 2.0
) -> Figures:
    """All figures of a new store."""
    with tempfile.TemporaryDirectory(dir=folder) as name, serving_if(store) as server:
        return await measure_store(Path(name), server.new() if server is not None else None, seconds)


async def measure_store(folder: Path, dsn: str | None, seconds: float) -> Figures:
    """All figures of a store in `folder`, or at `dsn`."""
    path = folder / "store.db"
    token = make_account(dsn or path)
    store = await Store.open(dsn or path, folder=folder, clock=CLOCK, secret=secret)
    found: dict[str, Any] = {
        "fsync_ms": fsync_ms(folder),
        "throughput": [await throughput(store, callers, seconds) for callers in (1, 32, 64)],
        "latency": await latency(store, 200, 2 * seconds),
        "find_key_us": await find_us(store, token),
        "find_junk_us": await find_us(store, "em_" + "x" * 38),
    }
    await store.close()
    cpu = store_cpu.measure_place(dsn or path)
    found |= {"store": cpu.store, "cpu_us": cpu.rows, "open_and_close_a_tab_us": cpu.open_and_close_us}
    with Books.open(dsn or path, clock=CLOCK, secret=secret) as books:
        began = time.perf_counter()
        report = books.check()
        found |= {"check_s": time.perf_counter() - began, "tallies": report.tallies, "ok": report.ok}
    size = None if dsn else path.stat().st_size / max(1, report.tallies["holds_captured"])
    return Figures(bytes_per_request=size, **found)


if __name__ == "__main__":
    bench(
        measure,
        store="which kind",
        folder="on the disk to measure (default: the temporary one)",
        seconds="a measurement",
    )
