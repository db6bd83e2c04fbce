"""A real store in a folder of its own, with a clock that the test moves."""

import shutil
import time
from pathlib import Path

from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.storage.books import Books
from embedmesh.storage.sqlite import SqliteStore

SECRET = bytes(range(32))
START_MS = 1_800_000_000_000
LASTS_MS = 60_000


class HandClock:
    """Wall time moves only when told; spans are real, because the disk is, and `skipped_s` longer."""

    def __init__(self) -> None:
        self.now_ms = START_MS
        self.skipped_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.skipped_s

    def unix_ms(self) -> int:
        return self.now_ms


class Shop:
    """One store, its books, and shorthands: amounts are nano-USD, `a` is the only customer."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "data" / "store.db"
        self.clock = HandClock()
        self.fatal: list[str] = []
        self.books = Books.open(self.path, clock=self.clock, key_secret=SECRET)
        self.books.create_account("a")
        self._numbers = iter(range(10**6))

    def credit(self, amount: int) -> None:
        assert self.books.credit("a", amount, f"payment {next(self._numbers)}")

    async def open(self, path: Path | None = None, *, lock_wait_s: float = 0.0) -> SqliteStore:
        return await SqliteStore.open(
            path or self.path,
            clock=self.clock,
            key_secret=SECRET,
            owner="me",
            on_fatal=self.fatal.append,
            lock_wait_s=lock_wait_s,
        )

    def new_hold(self, amount: int) -> Hold:
        return Hold(f"req_{next(self._numbers):06}", "a", amount, self.clock.now_ms + LASTS_MS)

    def money(self) -> tuple[int, int]:
        """Balance and held of the customer."""
        account = self.books.account("a")
        return account.balance_nanousd, account.held_nanousd

    def assert_right(self) -> None:
        assert self.books.check().broken == []


def charge(cost: int, payable: int = 0) -> Charge:
    return Charge(
        cost_nanousd=cost,
        tokens=7,
        model="m",
        key_id="key_1",
        node_id="n1",
        user_hash=None,
        payables=(Payable("n1", payable),) if payable else (),
    )


def crash_image(path: Path, folder: Path) -> Path:
    """What a killed process would leave: the files as they are now, nothing flushed, copied elsewhere."""
    folder.mkdir()
    for file in (path, path.with_name(path.name + "-wal")):
        if file.exists():
            shutil.copy(file, folder / file.name)
    return folder / path.name
