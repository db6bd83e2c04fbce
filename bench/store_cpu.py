"""What the store costs a request in CPU, by the size of a batch: under a hold of its own, and under a tab.

    python -m bench.store_cpu [--store postgres] [--json]

Counted are the statements, the commits, and what Python does for them, of the gateway and of the server's session. The
least of many rounds: what the machine does besides only adds to it. A commit to a disk costs the kernel's work for that
disk, too, which differs from machine to machine: `tab_without_disk_us` is without it, and is what the gate bounds.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Literal

import msgspec

from bench.rig.command import bench
from bench.rig.postgres import serving_if
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.holds import Charge, Hold, HoldEnd
from embedmesh.rules.ids import new_id
from embedmesh.rules.tabs import Tab
from embedmesh.storage.books import Books
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.engines import engine_of
from embedmesh.storage.ledger.batch import WriteBatch
from embedmesh.storage.ledger.end_hold import EndHold
from embedmesh.storage.ledger.open_tab import CloseTab, OpenTab
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.settle_tab import SettleTab
from embedmesh.storage.ledger.writes import Stats, Write

PRICE = 100  # nano-USD a request
TABS_EACH = 10**9  # nano-USD: enough for all rounds
MS_AN_HOUR = 3_600_000
REQUESTS_MIN, ROUNDS_MIN = 2_000, 40  # of each kind
GATES_US = {"sqlite": 14.0, "postgres": 130.0}  # a request under a tab, at GATE_BATCH a batch
GATE_BATCH = 32
SHAPES = ((1, 1), (8, 1), (32, 1), (32, 8), (128, 1), (128, 8), (128, 32), (128, 128))  # requests, tabs
NO_DISK = {"sqlite": "PRAGMA synchronous = OFF", "postgres": "SET synchronous_commit = off"}
DISK = {"sqlite": "PRAGMA synchronous = FULL", "postgres": "SET synchronous_commit = on"}
CLOCK = SystemClock()


class Row(msgspec.Struct, frozen=True):
    """Microseconds a request."""

    batch: int
    tabs: int
    exact_us: float | None
    tab_us: float
    tab_median_us: float
    of_it_server_us: float
    tab_without_disk_us: float


class Figures(msgspec.Struct, frozen=True):
    """All of it. `open_and_close_us` is of one tab, 32 a batch."""

    store: str
    rows: list[Row]
    open_and_close_us: float
    ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        over = over_the_gate(self.store, self.rows)
        return over if self.ok else [*over, "the ledger does not add up"]


def over_the_gate(store: str, rows: Sequence[Row]) -> list[str]:
    """What is dearer than it may be, in words."""
    gate = GATES_US[store]
    cost = next(row.tab_without_disk_us for row in rows if (row.batch, row.tabs) == (GATE_BATCH, 1))
    return [f"{cost:.1f} µs a request under a tab at {GATE_BATCH} a batch, not {gate}"] if cost > gate else []


class Meter:
    """One connection to a store, and the CPU that its transactions take: this thread's and the server session's."""

    def __init__(self, db: Db) -> None:
        self.db = db
        self._server: Path | None = None
        if db.dialect == "postgres":
            ((pid,),) = db.execute("SELECT pg_backend_pid()").fetchall()
            self._server = Path(f"/proc/{pid}/schedstat")

    def write(self, writes: Sequence[Write]) -> tuple[float, float]:
        """One batch; microseconds of this thread and of the server."""
        batch = WriteBatch(deque(writes), CLOCK, probe=False)
        server, began = self._server_ns(), time.thread_time_ns()
        if self.db.dialect == "postgres":
            with self.db.pipelined():  # type: ignore[attr-defined]
                self._transact(batch)
        else:
            self._transact(batch)
        batch.settle(self.db)
        stats = Stats()
        for write in batch.applied:
            write.committed(stats)
        return (time.thread_time_ns() - began) / 1000, (self._server_ns() - server) / 1000

    def _transact(self, batch: WriteBatch) -> None:
        self.db.begin()
        batch.apply(self.db)
        self.db.commit()

    def _server_ns(self) -> int:
        return int(self._server.read_text().split()[0]) if self._server is not None else 0


def secret(engine: Engine) -> bytes:
    """The same for every store."""
    return bytes(32)


class Shop:
    """What is written: requests of one key."""

    def __init__(self, key_id: str) -> None:
        self.charge = Charge(
            cost_nanousd=PRICE, tokens=28, model="model", key_id=key_id, node_id="node", price=3_571_428
        )
        self._until_ms = CLOCK.unix_ms() + MS_AN_HOUR

    def hold(self) -> Hold:
        return Hold(new_id("req", CLOCK), "bench", PRICE, self._until_ms, self.charge.key_id)

    def tab(self) -> Tab:
        return Tab(new_id("tab", CLOCK), "bench", self.charge.key_id, self._until_ms)


def exact(meter: Meter, shop: Shop, batch: int) -> tuple[float, float]:
    """Hold and capture `batch` requests, in a batch each: what that cost, and how much of it the server."""
    holds = [shop.hold() for _ in range(batch)]
    placed = meter.write([PlaceHold(hold, "me", None, lambda hold: None) for hold in holds])
    ended = meter.write([EndHold(hold, HoldEnd.CAPTURE, shop.charge) for hold in holds])
    return sum(placed) + sum(ended), placed[1] + ended[1]


def under_tabs(meter: Meter, shop: Shop, tabs: Sequence[Tab], batch: int) -> tuple[float, float]:
    """Settle `batch` requests of some tabs."""
    each = batch // len(tabs)
    delivered = [[(shop.hold().hold_id, shop.charge) for _ in range(each)] for _ in tabs]
    mine, server = meter.write(
        [SettleTab(tab.tab_id, "bench", done) for tab, done in zip(tabs, delivered, strict=True)]
    )
    return mine + server, server


def opened(meter: Meter, shop: Shop, number: int) -> tuple[list[Tab], float]:
    """So many tabs, and what opening one cost."""
    tabs = [shop.tab() for _ in range(number)]
    cost = sum(meter.write([OpenTab(tab, "me", TABS_EACH, TABS_EACH) for tab in tabs]))
    return tabs, cost / number


def rounds(once: Callable[[], tuple[float, float]], batch: int) -> tuple[float, float, float]:
    """The least, the median, and how much of the least the server took: microseconds a request."""
    found = sorted(once() for _ in range(max(ROUNDS_MIN, REQUESTS_MIN // batch)))
    return found[0][0] / batch, median(cost for cost, _ in found) / batch, found[0][1] / batch


async def measure(store: Literal["sqlite", "postgres"] = "sqlite") -> Figures:
    """All figures of a new store."""
    with tempfile.TemporaryDirectory() as name, serving_if(store) as server:
        place = server.new() if server is not None else Path(name) / "store.db"
        with Books.open(place, clock=CLOCK, secret=secret) as books:
            books.accounts.create("bench")
            books.accounts.credit("bench", 10**15, "bench")
        return measure_place(place)


def measure_place(place: str | Path) -> Figures:
    """All figures of a store whose account `bench` has money."""
    with Books.open(place, clock=CLOCK, secret=secret) as books:
        shop = Shop(books.keys.create("bench", ["embeddings"])[0].key_id)
        db = engine_of(place).connect(busy_s=5)
        rows, open_and_close_us = _measure(Meter(db), shop)
        db.close()
        return Figures(db.dialect, rows, open_and_close_us, books.check().ok)


def _measure(meter: Meter, shop: Shop) -> tuple[list[Row], float]:
    rows = []
    for batch, number in SHAPES:
        tabs, _ = opened(meter, shop, number)
        under = rounds(lambda batch=batch, tabs=tabs: under_tabs(meter, shop, tabs, batch), batch)  # type: ignore[misc]
        meter.db.execute(NO_DISK[meter.db.dialect])
        without = rounds(lambda batch=batch, tabs=tabs: under_tabs(meter, shop, tabs, batch), batch)[0]  # type: ignore[misc]
        meter.db.execute(DISK[meter.db.dialect])
        alone = rounds(lambda batch=batch: exact(meter, shop, batch), batch)[0] if number == 1 else None  # type: ignore[misc]
        rows.append(Row(batch, number, alone, *under, without))
        meter.write([CloseTab(tab.tab_id, "bench") for tab in tabs])
    costs = []
    for _ in range(ROUNDS_MIN):
        tabs, cost = opened(meter, shop, GATE_BATCH)
        closing = sum(meter.write([CloseTab(tab.tab_id, "bench") for tab in tabs]))
        costs.append(cost + closing / GATE_BATCH)
    return rows, min(costs)


if __name__ == "__main__":
    bench(measure, store="which kind")
