"""What a large store costs: each question of a request's path and each account page, in an empty store and a full one.

    python -m bench.scale [--store postgres] [--accounts 1000000] [--transfers 5000000] [--json]

A transfer has two entries. The store is filled with its triggers off, then used as it is. No question of the request's
path may take more than twice what it takes in an empty store, no account page more than 50 ms.
"""

import argparse
import asyncio
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench.fill import fill
from bench.store import CLOCK, MS_A_MINUTE, secret
from embedmesh.rules.holds import Charge, Claim, Hold
from embedmesh.rules.ids import new_id
from embedmesh.storage.books import Books
from embedmesh.storage.db import Db
from embedmesh.storage.engines import engine_of
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY

RATIO_MAX, PAGE_MS_MAX = 2.0, 50.0
TIMES, WARM_UP = 300, 40
PAGE_TIMES = 15
BUSY = "busy"  # the account that has a fifth of all entries


async def median_ms(ask: Callable[[], Awaitable[Any]], times: int = TIMES) -> float:
    """Of one after the other."""
    took = []
    for number in range(times + WARM_UP):
        began = time.perf_counter()
        await ask()
        if number >= WARM_UP:
            took.append(time.perf_counter() - began)
    return 1000 * statistics.median(took)


async def path(store: Store, books: Books, account: str) -> dict[str, float]:
    """Milliseconds of each question that a request asks the store, and of the sweeps."""
    _, token = books.keys.create(account, ["embeddings"])

    def hold() -> Hold:
        return Hold(new_id("req", CLOCK), account, 100, CLOCK.unix_ms() + MS_A_MINUTE, "key_1")

    charge = Charge(cost_nanousd=100, tokens=28, model="model", key_id="key_1", node_id="n1")

    async def hold_and_capture() -> None:
        one = hold()
        await store.hold(one)
        store.capture(one, charge)
        await store.drain()

    async def hold_and_release() -> None:
        one = hold()
        await store.hold(one, Claim(new_id("k", CLOCK).encode()[-32:], bytes(32)))
        store.release(one)
        await store.drain()

    async def find_key() -> None:
        store.keys._forget()  # as for a key that was not seen for a while
        assert await store.keys.find(token) is not None

    return {
        "hold and capture": await median_ms(hold_and_capture),
        "hold with an Idempotency-Key, and release": await median_ms(hold_and_release),
        "find a key": await median_ms(find_key),
        "look for changes": await median_ms(store.changes.look),
        "sweep": await median_ms(lambda: store.expire(CLOCK.unix_ms())),
        "cover by the chain": await median_ms(store.extend_chain, 50),
    }


async def pages(books: Books) -> dict[str, float]:
    """Milliseconds of each account page of the busy account."""
    today = CLOCK.unix_ms() // MS_PER_DAY

    def timed(ask: Callable[[], Any]) -> Callable[[], Awaitable[Any]]:
        async def asked() -> Any:
            return ask()

        return asked

    reports = books.reports
    first = reports.entries(BUSY, rows_max=100)
    asked = {
        "the account": lambda: books.accounts.find(BUSY),
        "its latest entries": lambda: reports.entries(BUSY, rows_max=100),
        "entries far back": lambda: reports.entries(BUSY, before=first[-1].entry_id // 2, rows_max=100),
        "usage of a month": lambda: reports.usage(BUSY, today - 30, today),
        "its keys": lambda: books.keys.list(BUSY),
        "a request explained": lambda: reports.explain(str(first[0].request_id)),
        "a page of accounts": lambda: books.accounts.list(rows_max=100),
    }
    return {name: await median_ms(timed(ask), PAGE_TIMES) for name, ask in asked.items()}


async def measure(place: str | Path, folder: Path, accounts: int, transfers: int, say: Callable[[str], None]) -> Any:
    """Empty, filled, and what it took to fill."""
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        books.accounts.create("bench")
        books.accounts.credit("bench", 10**15, "bench")
    store = await Store.open(place, folder=folder, clock=CLOCK, secret=secret)
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        say("measuring the empty store")
        empty = await path(store, books, "bench")
    await store.close()
    began = time.perf_counter()
    say(f"filling it: {accounts:,} accounts, {2 * transfers:,} entries")
    db: Db = engine_of(place).connect(busy_s=5)
    fill(db, accounts, transfers, BUSY, CLOCK.unix_ms())
    db.close()
    filling_s = time.perf_counter() - began
    say("covering it by the chain")
    store = await Store.open(place, folder=folder, clock=CLOCK, secret=secret)
    with contextlib.suppress(Exception):
        await store.extend_chain()
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        say("measuring the full store")
        full, shown = await path(store, books, "bench"), await pages(books)
        say("checking it, as `ledger check` does")
        began = time.perf_counter()
        books.check()  # the fill is not balanced: only its time is of interest
        check_s = time.perf_counter() - began
    await store.close()
    found = {"empty_ms": empty, "full_ms": full, "page_ms": shown}
    return found | {"filling_s": filling_s, "check_s": check_s}


def main(arguments: list[str]) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite", help="which kind")
    parser.add_argument("--accounts", type=int, default=1_000_000)
    parser.add_argument("--transfers", type=int, default=5_000_000, help="each has two entries")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure (default: the temporary one)")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    asked: Any = parser.parse_args(arguments)
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=asked.folder)))
        place: str | Path = folder / "store.db"
        if asked.store == "postgres":
            from bench.postgres import serving

            place = stack.enter_context(serving(on_disk=True)).new()
        found = asyncio.run(measure(place, folder, asked.accounts, asked.transfers, console.print))
    ratios = {name: found["full_ms"][name] / each for name, each in found["empty_ms"].items()}
    slow = [name for name, ratio in ratios.items() if ratio > RATIO_MAX]
    slow += [name for name, each in found["page_ms"].items() if each > PAGE_MS_MAX]
    if asked.json:
        print(msgspec.json.encode({"ok": not slow, **found, "ratios": ratios}).decode())
        return 1 if slow else 0
    table = Table("question", "empty, ms", "full, ms", "ratio", title=f"{asked.store}, {asked.accounts:,} accounts")
    for name, each in found["empty_ms"].items():
        table.add_row(name, f"{each:.3f}", f"{found['full_ms'][name]:.3f}", f"{ratios[name]:.2f}")
    for name, each in found["page_ms"].items():
        table.add_row(name, "", f"{each:.3f}", "")
    Console().print(table)
    Console().print(f"`ledger check`: {found['check_s']:.0f} s")
    print("TOO SLOW: " + ", ".join(slow) if slow else "No question is slower than it may be.")
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
