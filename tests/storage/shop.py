"""A real store in a folder of its own, or in a database of its own, with a clock that the test moves."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from embedmesh.rules.holds import Charge, Hold, Payable
from embedmesh.storage.books import Books
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.engines import engine_of
from embedmesh.storage.store import Store
from embedmesh.storage.upkeep import Retention

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


def secret(engine: Engine) -> bytes:
    """The key secret of every store of the tests."""
    return SECRET


@cache
def _new_store() -> bytes:
    """A store that nothing has happened in: 20 ms of CPU."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"
        Books.open(path, clock=HandClock(), secret=secret).close()
        assert [file.name for file in Path(folder).iterdir()] == ["store.db"]
        return path.read_bytes()


def copy_of_new(path: Path) -> None:
    """As `Books.open` would make it there."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.touch(0o600)
    path.write_bytes(_new_store())


class Shop:
    """One store, its books, and shorthands: amounts are nano-USD, `a` is the only customer."""

    def __init__(self, folder: Path, url: str | None = None, *, new: bool = True) -> None:
        """At a `postgresql://` address, or in a file of the folder."""
        self.folder = folder / "data"
        self.path = self.folder / "store.db"
        self.place = url or self.path
        self.clock = HandClock()
        self.fatal: list[str] = []
        if url is None and not self.path.exists():
            copy_of_new(self.path)
        self.books = Books.open(self.place, clock=self.clock, secret=secret)
        if new:
            self.books.accounts.create("a")
        self._numbers = iter(range(10**6))

    def credit(self, amount: int) -> None:
        assert self.books.accounts.credit("a", amount, f"payment {next(self._numbers)}")

    async def open(
        self, path: Path | None = None, *, lock_wait_s: float = 0.0, retention: Retention | None = None
    ) -> Store:
        """A gateway's side of it; several may be open."""
        return await Store.open(
            path or self.place,
            folder=path.parent if path else self.folder,
            clock=self.clock,
            secret=secret,
            on_fatal=self.fatal.append,
            lock_wait_s=lock_wait_s,
            retention=retention,
        )

    @contextmanager
    def by_hand(self) -> Iterator[Db]:
        """What somebody with a shell could do to the store."""
        db = engine_of(self.place).connect(busy_s=1)
        try:
            yield db
        finally:
            db.close()

    def new_hold(self, amount: int, key_id: str | None = None, *, account_id: str = "a") -> Hold:
        return Hold(f"req_{next(self._numbers):06}", account_id, amount, self.clock.now_ms + LASTS_MS, key_id)

    def money(self) -> tuple[int, int]:
        """Balance and held of the customer."""
        account = self.books.accounts.find("a")
        return account.balance_nanousd, account.held_nanousd

    def assert_right(self) -> None:
        assert self.books.check().broken == []


def charge(cost: int, payable: int = 0, *, key_id: str = "key_1") -> Charge:
    return Charge(
        cost_nanousd=cost,
        tokens=7,
        model="m",
        key_id=key_id,
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
