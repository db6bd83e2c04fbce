"""Ten thousand locks are opened, abandoned, and end at the same moment, while others lock and are served.

    python -m bench.locks [--store postgres] [--locks 10000] [--span-s 60] [--json]

Two gateways' sides of one store, each with its sweep. Many accounts with many keys open all the locks that they may;
one account in peace locks, redeems at the other gateway and pays, all the time. All abandoned locks must be released
soon after the next sweep, the account in peace must never be refused, and the books must be exact.
"""

import asyncio
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Literal

import msgspec

from bench.rig.command import CannotRun, bench, say, wrong
from bench.rig.figures import percentile
from bench.rig.postgres import serving_if
from bench.store import CLOCK, secret
from embedmesh.flow.expire import SWEEP_EVERY_S, expire
from embedmesh.rules.confidential import LockTerms
from embedmesh.rules.errors import RateLimited
from embedmesh.rules.holds import Charge, Hold
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import LOCKS_OF_ACCOUNT_MAX, LOCKS_OF_KEY_MAX
from embedmesh.rules.money import cost_nanousd
from embedmesh.storage.books import Books
from embedmesh.storage.store import Store

UNITS, PRICE, MONEY = 100, 1_000_000, 10**9
PEACE = "peace"
PEACE_SPAN_MS, PEACE_PAUSE_S = 30_000, 0.02
AT_ONCE = 64  # locks that are being opened
LATE_S_MAX = SWEEP_EVERY_S + 3.0  # after its expiry: a sweep, and forty batches on a busy machine
ENDS = """
    SELECT locks.expires_ms, holds.ended_ms, holds.ended_by FROM locks JOIN holds ON holds.hold_id = locks.hold_id
    WHERE locks.account_id <> :peace
"""


class LockFigures(msgspec.Struct, frozen=True):
    """Of one store."""

    store: str
    locks: int
    opened_per_s: float
    refused_above_the_bound: int  # of one more for each key
    released: int
    released_too_early: int
    late_s_max: float  # after their expiry
    peaceful: int  # locked, redeemed and paid
    peaceful_refused: int
    peaceful_p50_ms: float
    peaceful_p99_ms: float
    held_nanousd: int
    books: list[str]  # broken promises

    @property
    def broken(self) -> list[str]:
        """What was not as it must be."""
        keys = self.locks // LOCKS_OF_KEY_MAX
        return wrong(
            {
                f"{self.locks - self.released} locks were not released": self.released != self.locks,
                f"{self.released_too_early} were released before their expiry": self.released_too_early > 0,
                f"one was released {self.late_s_max:.1f} s after its expiry": self.late_s_max > LATE_S_MAX,
                f"only {self.refused_above_the_bound} keys met their bound": self.refused_above_the_bound < keys,
                f"{self.peaceful_refused} locks of the account in peace were refused": self.peaceful_refused > 0,
                "the account in peace was not served": not self.peaceful,
                f"{self.held_nanousd} nano-USD are still held": self.held_nanousd > 0,
                f"the books: {self.books}": bool(self.books),
            }
        )


def new_lock(account_id: str, key_id: str, expires_ms: int) -> tuple[LockTerms, Hold]:
    """Terms and hold."""
    hold_id = new_id("req", CLOCK)
    terms = LockTerms(
        lock_id=int(hold_id[-12:], 16), account_id=account_id, key_id=key_id, hold_id=hold_id, node_id="node",
        identity=bytes(32), node_key=bytes(32), scheme="hpke-1", model="m", units=UNITS, price=PRICE,
        expires_ms=expires_ms,
    )  # fmt: skip
    return terms, Hold(hold_id, account_id, cost_nanousd(UNITS, PRICE), expires_ms, key_id)


class Peace:
    """One account that is not to be bothered."""

    def __init__(self, stores: Sequence[Store]) -> None:
        self._stores = stores
        self.took_s: list[float] = []
        self.refused = 0

    async def live(self) -> None:
        """Lock at one gateway, redeem at another and pay, until cancelled."""
        number = 0
        while True:
            opens, redeems = self._stores[number % 2], self._stores[(number + 1) % 2]
            number += 1
            began = time.perf_counter()
            try:
                terms, hold = new_lock(PEACE, "key_of_peace", CLOCK.unix_ms() + PEACE_SPAN_MS)
                await opens.locks.open(terms, hold)
                found = await redeems.locks.find(PEACE, terms.lock_id)
                mine = await redeems.locks.redeem(found, b"b" * 32, CLOCK.unix_ms() + 60_000)
                assert isinstance(mine, Hold)
            except Exception as error:  # noqa: BLE001 - that is what is counted
                say(f"in peace: {type(error).__name__}: {error}")
                self.refused += 1
            else:
                self.took_s.append(time.perf_counter() - began)
                redeems.capture(mine, Charge(7, 7, model="m", key_id="key_of_peace", node_id="node"), b"sealed")
            await asyncio.sleep(PEACE_PAUSE_S)


async def open_all(stores: Sequence[Store], locks: int, expires_ms: int) -> int:
    """All of them, and one more for each key; how many of those were refused."""
    refused = 0
    for first in range(0, locks, LOCKS_OF_KEY_MAX):
        account, key_id = f"a{first // LOCKS_OF_ACCOUNT_MAX}", f"key_{first // LOCKS_OF_KEY_MAX}"
        number = min(LOCKS_OF_KEY_MAX, locks - first)
        for at in range(0, number, AT_ONCE):
            opening = (
                stores[each % 2].locks.open(*new_lock(account, key_id, expires_ms))
                for each in range(at, min(at + AT_ONCE, number))
            )
            await asyncio.gather(*opening)
        if number < LOCKS_OF_KEY_MAX:
            break
        try:
            await stores[0].locks.open(*new_lock(account, key_id, expires_ms))
        except RateLimited:
            refused += 1
    return refused


async def measure_store(kind: str, at: str | Path, folder: Path, locks: int, span_s: float) -> LockFigures:
    """A new store at a path or a DSN."""
    accounts = [PEACE, *(f"a{number}" for number in range(-(-locks // LOCKS_OF_ACCOUNT_MAX)))]
    with Books.open(at, clock=CLOCK, secret=secret) as books:
        for account in accounts:
            books.accounts.create(account)
            books.accounts.credit(account, MONEY, f"of {account}")
        async with AsyncExitStack() as stack:
            stores = []
            for name in ("one", "two"):
                stores.append(store := await Store.open(at, folder=folder / name, clock=CLOCK, secret=secret))
                stack.push_async_callback(store.close)
                for each in (*store.background(), expire(store, CLOCK)):
                    stack.callback(asyncio.ensure_future(each).cancel)
            peace = Peace(stores)
            living = asyncio.create_task(peace.live())
            say(f"opening {locks:,} locks")
            began, expires_ms = time.perf_counter(), CLOCK.unix_ms() + int(1000 * span_s)
            refused = await open_all(stores, locks, expires_ms)
            opened_s = time.perf_counter() - began
            if opened_s > span_s:
                raise CannotRun(f"Opening them took {opened_s:.0f} s on this machine: give --span-s, or fewer --locks.")
            say(f"abandoning them until {span_s + LATE_S_MAX:.0f} s are over")
            await asyncio.sleep(span_s + LATE_S_MAX + 1.0 - opened_s)
            living.cancel()
            await asyncio.wait([living])
            await asyncio.gather(*(store.drain() for store in stores))
            # What the account in peace has open yet is its last request, which was cut off.
            held = sum(books.accounts.find(account).held_nanousd for account in accounts[1:])
            ends = books._db.execute(ENDS, {"peace": PEACE}).fetchall()
            broken = [f"{each.promise}: {each.subject}" for each in books.check().broken]
    late_s = [(ended_ms - expires_ms) / 1000 for expires_ms, ended_ms, _ in ends if ended_ms is not None]
    return LockFigures(
        store=kind,
        locks=locks,
        opened_per_s=locks / opened_s,
        refused_above_the_bound=refused,
        released=sum(ended_by == "expire" for _, _, ended_by in ends),
        released_too_early=sum(each < 0 for each in late_s),
        late_s_max=max(late_s, default=0.0),
        peaceful=len(peace.took_s),
        peaceful_refused=peace.refused,
        peaceful_p50_ms=1000 * percentile(peace.took_s, 50),
        peaceful_p99_ms=1000 * percentile(peace.took_s, 99),
        held_nanousd=held,
        books=broken,
    )


async def measure(
    store: Literal["sqlite", "postgres"] = "sqlite", locks: int = 10_000, span_s: float = 60.0
) -> LockFigures:
    """On the disk of the temporary folder."""
    with tempfile.TemporaryDirectory() as name, serving_if(store) as server:
        at = server.new() if server is not None else Path(name) / "store.db"
        return await measure_store(store, at, Path(name), locks, span_s)


if __name__ == "__main__":
    bench(measure, span_s="seconds until all of them end; they are opened before")
