"""What a durable hold costs: holds a second with many callers, and the time a hold adds at 200 requests a second.

    python -m bench.store [--store postgres] [--json] [--folder DIR]

The folder should be on the disk that the store will live on: the fsync of that disk is most of what is measured.
"""

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import uvloop

from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.ids import new_id
from embedmesh.storage.books import Books
from embedmesh.storage.db import Engine
from embedmesh.storage.store import Store

SECRET = bytes(32)
PRICE = 100  # nano-USD a hold
MS_A_MINUTE = 60_000
CHARGE = Charge(cost_nanousd=PRICE, tokens=28, model="model", key_id="key", node_id="node")


class WallClock:
    """The real clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def unix_ms(self) -> int:
        return time.time_ns() // 1_000_000


CLOCK = WallClock()


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
    """`callers` loops of hold and capture, as fast as they go."""
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
        "p50_ms": 1000 * statistics.median(took),
        "p99_ms": 1000 * statistics.quantiles(took, n=100)[98],
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
        "p50_ms": 1000 * statistics.median(took),
        "p99_ms": 1000 * statistics.quantiles(took, n=100)[98],
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
    return 1000 * statistics.median(took)


async def find_us(store: Store, token: str, times: int = 20_000) -> float:
    """Microseconds to find, or not to find, a key."""
    began = time.perf_counter()
    for _ in range(times):
        await store.keys.find(token)
    return 1e6 * (time.perf_counter() - began) / times


async def measure(folder: Path, url: str | None, seconds: float) -> dict[str, object]:
    place: str | Path = url or folder / "store.db"
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        books.accounts.create("bench")
        books.accounts.credit("bench", 10**15, "bench")
        _, token = books.keys.create("bench", ["embeddings"])
    store = await Store.open(place, folder=folder, clock=CLOCK, secret=secret)
    figures: dict[str, object] = {
        "fsync_ms": fsync_ms(folder),
        "throughput": [await throughput(store, callers, seconds) for callers in (1, 32, 64)],
        "latency": await latency(store, 200, 2 * seconds),
        "find_key_us": await find_us(store, token),
        "find_junk_us": await find_us(store, "em_" + "x" * 38),
    }
    await store.close()
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        began = time.perf_counter()
        report = books.check()
        figures["check"] = {"ok": report.ok, "seconds": time.perf_counter() - began, **report.tallies}
    if isinstance(place, Path):
        figures["bytes_per_request"] = place.stat().st_size / max(1, report.tallies["holds_captured"])
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite", help="which kind")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--seconds", type=float, default=2.0, help="a measurement")
    args = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=args.folder))
        url = None
        if args.store == "postgres":
            from bench.postgres import serving

            url = stack.enter_context(serving(on_disk=True)).new()
        runner = stack.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        figures = runner.run(measure(Path(folder), url, args.seconds))
    if args.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        for row in value if isinstance(value, list) else [value]:
            print(f"{name:18}", shown(row))


def shown(row: object) -> str:
    """One measurement on one line."""
    if isinstance(row, dict):
        return "  ".join(f"{key} {shown(value)}" for key, value in row.items())
    return f"{row:,.3f}" if isinstance(row, float) else str(row)


if __name__ == "__main__":
    main()
