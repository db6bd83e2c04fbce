"""What a large store costs: each question of a request's path and each account page, in an empty store and a full one.

    python -m bench.scale [--store postgres] [--accounts 1000000] [--transfers 5000000] [--json]

A transfer has two entries. The store is filled with its triggers off, then used as it is. No question of the request's
path may take more than twice what it takes in an empty store, no account page more than 50 ms.
"""

import contextlib
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench.fill import fill
from bench.rig.command import bench, say
from bench.rig.figures import percentile
from bench.rig.postgres import serving_if
from bench.store import CLOCK, MS_A_MINUTE, make_account, secret
from embedmesh.rules.holds import Charge, Claim, Hold
from embedmesh.rules.ids import new_id
from embedmesh.storage.books import Books
from embedmesh.storage.engines import engine_of
from embedmesh.storage.store import Store
from embedmesh.storage.times import MS_PER_DAY

RATIO_MAX, PAGE_MS_MAX = 2.0, 50.0
TIMES, WARM_UP = 300, 40
PAGE_TIMES = 15
BUSY = "busy"  # the account that has a fifth of all entries


class QuestionCost(msgspec.Struct, frozen=True):
    """A question of a request's path, in the empty store and in the full one."""

    empty_ms: float
    full_ms: float
    times: float


class Figures(msgspec.Struct, frozen=True):
    """All of it."""

    path: dict[str, QuestionCost]
    page_ms: dict[str, float]  # of account pages
    filling_s: float
    check_s: float

    @property
    def broken(self) -> list[str]:
        """The questions that are too slow."""
        slow = [f"{name}: {each.times:.2f} times" for name, each in self.path.items() if each.times > RATIO_MAX]
        return slow + [f"{name}: {each:.0f} ms" for name, each in self.page_ms.items() if each > PAGE_MS_MAX]


async def median_ms(ask: Callable[[], Awaitable[Any]], times: int = TIMES) -> float:
    """Of one call after the other."""
    took = []
    for number in range(times + WARM_UP):
        began = time.perf_counter()
        await ask()
        if number >= WARM_UP:
            took.append(time.perf_counter() - began)
    return 1000 * percentile(took, 50)


async def path(store: Store, books: Books, account: str) -> dict[str, float]:
    """Milliseconds of each question that a request puts to the store, and of the sweeps."""
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
        store.keys._keys_changed()  # as after a change of any key
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
        async def answer() -> Any:
            return ask()

        return answer

    reports = books.reports
    first = reports.entries(BUSY, rows_max=100)
    questions: dict[str, Callable[[], Any]] = {
        "the account": lambda: books.accounts.find(BUSY),
        "its latest entries": lambda: reports.entries(BUSY, rows_max=100),
        "entries far back": lambda: reports.entries(BUSY, before=first[-1].entry_id // 2, rows_max=100),
        "usage of a month": lambda: reports.usage(BUSY, today - 30, today),
        "its keys": lambda: books.keys.list(BUSY),
        "a request explained": lambda: reports.explain(str(first[0].request_id)),
        "a page of accounts": lambda: books.accounts.list(rows_max=100),
    }
    return {name: await median_ms(timed(ask), PAGE_TIMES) for name, ask in questions.items()}


async def measure(
    store: Literal["sqlite", "postgres"] = "sqlite",
    accounts: int = 1_000_000,
    transfers: int = 5_000_000,
    folder: Path | None = None,
) -> Figures:
    """A new store, empty and filled."""
    with tempfile.TemporaryDirectory(dir=folder) as name, serving_if(store) as server:
        at = server.new() if server is not None else Path(name) / "store.db"
        return await measure_store(at, Path(name), accounts, transfers)


async def measure_store(at: str | Path, folder: Path, accounts: int, transfers: int) -> Figures:
    """A store at a path or a DSN: empty, filled, and what it took to fill."""
    make_account(at)
    store = await Store.open(at, folder=folder, clock=CLOCK, secret=secret)
    with Books.open(at, clock=CLOCK, secret=secret) as books:
        say("measuring the empty store")
        empty = await path(store, books, "bench")
    await store.close()
    began = time.perf_counter()
    say(f"filling it: {accounts:,} accounts, {2 * transfers:,} entries")
    db = engine_of(at).connect(busy_s=5)
    fill(db, accounts, transfers, BUSY, CLOCK.unix_ms())
    db.close()
    filling_s = time.perf_counter() - began
    say("covering it by the chain")
    store = await Store.open(at, folder=folder, clock=CLOCK, secret=secret)
    with contextlib.suppress(Exception):
        await store.extend_chain()
    with Books.open(at, clock=CLOCK, secret=secret) as books:
        say("measuring the full store")
        full, account_pages = await path(store, books, "bench"), await pages(books)
        say("checking it, as `ledger check` does")
        began = time.perf_counter()
        books.check()  # the fill is not balanced: only its time is of interest
        check_s = time.perf_counter() - began
    await store.close()
    questions = {name: QuestionCost(each, full[name], full[name] / each) for name, each in empty.items()}
    return Figures(questions, account_pages, filling_s, check_s)


if __name__ == "__main__":
    bench(measure, transfers="each has two entries", folder="on the disk to measure (default: the temporary one)")
