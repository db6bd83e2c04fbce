"""Locks, full and read-only disks, disks that hang or lie: nothing is lost, nothing unheld goes on."""

import asyncio
import contextlib
import errno
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from embedmesh.rules.errors import InsufficientQuota, SetupError, StoreUnavailable
from embedmesh.rules.holds import Hold, HoldEnd
from embedmesh.storage.ledger.end_hold import EndHold
from embedmesh.storage.ledger.group_commit import QUEUE_WRITES_MAX, WRITE_PROBE_EVERY_S, Writer
from embedmesh.storage.ledger.place_hold import PlaceHold
from embedmesh.storage.ledger.writes import Stats, Write
from embedmesh.storage.sqlite.commit import CHECKPOINT_COMMITS, SqliteMedium
from embedmesh.storage.sqlite.database import SqliteDb, SqliteEngine
from embedmesh.storage.sqlite.driver import driver
from embedmesh.storage.store import Store
from tests.storage.shop import Shop, charge, crash_image


@pytest.fixture
def shop(file_shop: Shop) -> Shop:
    """All of this is about files."""
    return file_shop


RECOVERS_S = 1.5  # the store tries at least every second; half a second for a slow machine


@contextmanager
def locked(shop: Shop) -> Iterator[None]:
    """Another process writes."""
    db = SqliteEngine(shop.path).connect(busy_s=1)
    db.begin()
    try:
        yield
    finally:
        db.rollback()
        db.close()


@contextmanager
def full_disk(shop: Shop) -> Iterator[None]:
    """No file may grow past what the WAL has now: the kernel refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    wal = shop.path.with_name(shop.path.name + "-wal")
    resource.setrlimit(resource.RLIMIT_FSIZE, (wal.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


async def until_healthy(store: Store | Writer) -> None:
    async with asyncio.timeout(RECOVERS_S):
        while not store.healthy():
            await asyncio.sleep(0.01)


async def test_a_short_lock_only_delays(shop: Shop, store: Store) -> None:
    """While another process writes for a moment, holds wait, and the event loop does not."""
    shop.credit(1_000)
    with locked(shop):
        task = asyncio.create_task(store.hold(shop.new_hold(10)))
        began = time.monotonic()
        turns = 0
        while time.monotonic() - began < 0.1:
            await asyncio.sleep(0.001)
            turns += 1
        assert turns > 20
        assert not task.done()
    await task
    assert store.healthy()


@pytest.mark.story
async def test_a_long_lock_refuses_holds_and_keeps_captures(shop: Shop, store: Store) -> None:
    """Within 2 s holds are refused; captures wait, and are written once the lock is gone; reads go on."""
    shop.credit(1_000)
    _, token = shop.books.keys.create("a", ["embeddings"])
    hold = shop.new_hold(100)
    await store.hold(hold)
    with locked(shop):
        store.capture(hold, charge(60))
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.hold(shop.new_hold(10))
        assert time.monotonic() - began < 2.0
        assert not store.healthy()
        assert await store.keys.find(token) is not None
    await until_healthy(store)
    assert await store.drain() == 0
    assert shop.money() == (940, 0)


@pytest.mark.story
async def test_a_full_disk(shop: Shop, store: Store) -> None:
    """Holds are refused within 2 s, captures are kept, and the store comes back by itself."""
    shop.credit(10_000)
    holds = [shop.new_hold(100) for _ in range(10)]
    await asyncio.gather(*map(store.hold, holds))
    with full_disk(shop):
        for hold in holds:
            store.capture(hold, charge(60))
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            await store.hold(shop.new_hold(10))
        assert time.monotonic() - began < 2.0
        assert not store.healthy()
    await until_healthy(store)
    await store.hold(shop.new_hold(10))
    assert shop.money() == (9_400, 10)
    assert store.stats.captured == 10
    assert shop.fatal == []
    shop.assert_right()


@pytest.mark.story
async def test_a_store_that_is_read_only_for_a_while(shop: Shop) -> None:
    """The same with a store that cannot be written: it is tried again without any request."""
    shop.credit(1_000)
    db = SqliteEngine(shop.path).connect(busy_s=0, read_only=True)
    writer = make_writer(db, shop)
    place = new_place(hold := shop.new_hold(100))
    writer.submit(place)
    with pytest.raises(StoreUnavailable):
        await place.outcome
    assert not writer.healthy()
    writer.submit(EndHold(hold, HoldEnd.CAPTURE, charge(1)))
    await asyncio.sleep(0)
    assert writer.waiting() == 1
    db.execute("PRAGMA query_only = 0")
    await until_healthy(writer)
    assert writer.waiting() == 0
    assert shop.money() == (1_000, 0)
    await writer.close()
    db.close()


@pytest.mark.story
async def test_an_idle_store_notices_a_full_disk(shop: Shop, store: Store) -> None:
    """The sweep has nothing to write, and writes something; the store comes back without being asked for anything."""
    await store.expire(shop.clock.now_ms)
    with full_disk(shop):
        await store.expire(shop.clock.now_ms)  # it wrote a moment ago
        assert store.healthy()
        shop.clock.skipped_s += WRITE_PROBE_EVERY_S
        with pytest.raises(StoreUnavailable):
            await store.expire(shop.clock.now_ms)
        assert not store.healthy()
    await until_healthy(store)
    probed = shop.books._db.execute("SELECT count(*) FROM facts WHERE name = 'probed_ms'").fetchone()
    assert probed == (1,)


async def test_a_store_is_probed_once_in_a_while(shop: Shop, store: Store) -> None:
    """Not with every batch: a row that means nothing is written after a few seconds, and only once somebody asks."""
    shop.credit(1)
    await store.hold(shop.new_hold(1))
    find = "SELECT count(*) FROM facts WHERE name = 'probed_ms'"
    assert shop.books._db.execute(find).fetchone() == (0,)
    shop.clock.skipped_s += WRITE_PROBE_EVERY_S + 0.1
    with pytest.raises(InsufficientQuota):  # which writes nothing else
        await store.hold(shop.new_hold(1))
    assert shop.books._db.execute(find).fetchone() == (1,)


def make_writer(db: SqliteDb, shop: Shop, sync_wal: Callable[[], None] = lambda: None) -> Writer:
    return Writer(SqliteMedium(db, shop.clock, sync_wal), shop.clock, Stats(), shop.fatal.append)


def new_place(hold: Hold) -> PlaceHold:
    return PlaceHold(hold, "me", None, lambda hold: None)


class SlowDisk(SqliteDb):
    """A connection whose COMMIT (or checkpoint) waits, as on a disk that does not answer, or fails."""

    def __init__(self, db: SqliteDb, waits: str = "COMMIT") -> None:
        super().__init__(db.connection)
        self.waits = waits
        self.answers = threading.Event()
        self.error: driver.Error | None = None

    def execute(self, statement: str, values: Any = None) -> Any:
        self.wait(statement)
        return super().execute(statement, values)

    def commit(self) -> None:
        self.wait("COMMIT")
        super().commit()

    def wait(self, statement: str) -> None:
        if statement.startswith(self.waits):
            self.answers.wait()
            if self.error is not None:
                raise self.error


def disk_error(name: str) -> driver.OperationalError:
    error = driver.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    return error


def wal_sync_fails() -> None:
    raise OSError(errno.EIO, "the disk is broken")


@pytest.mark.story
async def test_a_disk_that_hangs(shop: Shop) -> None:
    """A hold is refused within 2 s though its COMMIT still runs; should that succeed, the money is free again."""
    shop.credit(1_000)
    store = await shop.open()
    medium = vars(store._writer._medium)
    slow = medium["_db"] = SlowDisk(medium["_db"])
    began = time.monotonic()
    with pytest.raises(StoreUnavailable):
        await store.hold(shop.new_hold(100))
    assert time.monotonic() - began < 2.2
    await asyncio.sleep(0.05)
    assert not store.healthy()
    slow.answers.set()
    await until_healthy(store)
    assert await store.drain() == 0
    assert store.stats.holds == store.stats.released == 1
    assert shop.money() == (1_000, 0)
    await store.close()


async def test_after_a_failed_fsync_nothing_is_acknowledged(shop: Shop) -> None:
    """The process is told to end; holds are refused at once; nothing is tried again."""
    shop.credit(1_000)
    slow = SlowDisk(SqliteEngine(shop.path).connect(busy_s=0))
    slow.error = disk_error("SQLITE_IOERR")
    slow.answers.set()
    writer = make_writer(slow, shop, wal_sync_fails)
    place = new_place(shop.new_hold(100))
    writer.submit(place)
    with pytest.raises(StoreUnavailable):
        await place.outcome
    assert len(shop.fatal) == 1
    slow.error = None
    assert not writer.healthy()
    with pytest.raises(StoreUnavailable):
        writer.submit(new_place(shop.new_hold(1)))
    await writer.drained()
    await writer.close()
    slow.close()
    assert shop.money() == (1_000, 0)


@pytest.mark.parametrize(("error", "ends"), [("SQLITE_IOERR", True), ("SQLITE_FULL", False), (None, False)])
async def test_the_wal_is_checkpointed(shop: Shop, error: str | None, ends: bool) -> None:
    """Every so many commits the WAL goes into the database; a full disk only puts that off, a broken one ends us."""
    shop.credit(1_000)
    slow = SlowDisk(SqliteEngine(shop.path).connect(busy_s=0), waits="PRAGMA wal_checkpoint")
    slow.error = disk_error(error) if error else None
    slow.answers.set()
    slow.execute("PRAGMA wal_autocheckpoint = 0")
    writer = make_writer(slow, shop)
    before = shop.path.stat().st_size
    for _ in range(CHECKPOINT_COMMITS - 1):
        writer.submit(place := new_place(shop.new_hold(0)))
        await place.outcome
    assert shop.path.stat().st_size == before
    writer.submit(place := new_place(shop.new_hold(0)))
    await place.outcome
    writer.submit(place := new_place(shop.new_hold(0)))
    if ends:
        with pytest.raises(StoreUnavailable):
            await place.outcome
    else:
        await place.outcome
    assert bool(shop.fatal) == ends
    assert (shop.path.stat().st_size > before) == (error is None)
    await writer.close()
    slow.close()


class Bug(Write):
    """A write that breaks in a way that nobody foresaw."""

    def prepare(self, db: Any, now_ms: int) -> set[str]:
        raise RuntimeError("a bug of ours")


async def test_a_writer_that_breaks_says_so(shop: Shop, store: Store) -> None:
    """A bug inside the writer ends the process loudly: nobody waits for a writer that is gone."""
    shop.credit(100)
    place = asyncio.create_task(store.hold(shop.new_hold(10)))
    await asyncio.sleep(0)
    bug: Any = Bug()
    store._writer.submit(bug)
    with pytest.raises(StoreUnavailable):
        await place
    assert len(shop.fatal) == 1
    assert "RuntimeError" in shop.fatal[0]
    assert not store.healthy()
    with pytest.raises(StoreUnavailable):
        await store.hold(shop.new_hold(10))
    with pytest.raises(StoreUnavailable):
        await store.expire(shop.clock.now_ms)


async def test_keys_that_cannot_be_looked_up(shop: Shop, store: Store) -> None:
    """A store that cannot be read is a StoreUnavailable, never a key that is said to be wrong."""
    _, token = shop.books.keys.create("a", ["embeddings"])
    db = SqliteEngine(shop.path).connect(busy_s=1)
    db.execute("ALTER TABLE keys RENAME TO lost")
    db.close()
    with pytest.raises(StoreUnavailable):
        await store.keys.find(token)


async def test_a_store_that_cannot_be_written_at_start(shop: Shop) -> None:
    """A gateway does not start on a full disk; it says so in one line, and starts once there is room."""
    store = await shop.open()
    for _ in range(20):
        await store.hold(shop.new_hold(0))
    image = crash_image(shop.path, shop.path.parent / "crash")
    await store.close()
    with full_disk(shop), pytest.raises(SetupError):
        await shop.open(image)
    heir = await shop.open(image)
    assert heir.stats.recovered == 20
    await heir.close()


async def test_a_full_queue_refuses_holds_and_takes_captures(
    shop: Shop, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits is bounded: holds are refused at once, a release is left to the sweep, a capture is never refused."""
    monkeypatch.setattr("embedmesh.storage.store.WRITE_WAIT_S", 60.0)  # eight thousand of them, on a busy machine
    shop.credit(100_000)
    paid, lost = shop.new_hold(1), shop.new_hold(1)
    await store.hold(paid)
    await store.hold(lost)
    tasks = [asyncio.create_task(store.hold(shop.new_hold(1))) for _ in range(QUEUE_WRITES_MAX + 5)]
    await asyncio.sleep(0)  # all have been asked, none was written
    store.capture(paid, charge(1))
    store.release(lost)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    refused = [outcome for outcome in outcomes if outcome is not None]
    assert len(refused) == 5
    assert all(isinstance(outcome, StoreUnavailable) for outcome in refused)
    await store.drain()
    assert (store.stats.captured, store.stats.released) == (1, 0)


VICTIM = """
import asyncio, os, sys, time
from pathlib import Path
from tests.storage.shop import Shop


from embedmesh.rules.errors import SetupError, StoreUnavailable

async def main():
    shop = Shop(Path(sys.argv[1]))
    shop.credit(1000)
    store = await shop.open()
    await store.hold(shop.new_hold(1))
    print("ready", flush=True)
    sys.stdin.readline()
    try:
        await store.hold(shop.new_hold(1))
        print("acknowledged", flush=True)
    except StoreUnavailable:
        print("refused", len(shop.fatal), flush=True)
    os._exit(0)

asyncio.run(main())
"""


STRACE = ["strace", "-f", "-e", "trace=fsync,fdatasync", "-e", "inject=fsync,fdatasync:error=EIO"]
STRACE_S = 30.0  # it takes a few milliseconds; a tracer that loses its victim must fail this test, not hang the run


def kill(process: subprocess.Popen[str]) -> None:
    """End it whatever it does: waiting for a process that a tracer has stopped would never end."""
    process.kill()
    process.wait(STRACE_S)
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def test_a_real_failed_fsync(tmp_path: Path) -> None:
    """When the kernel says that an fsync failed, the hold is refused and the process is told to end."""
    with contextlib.ExitStack() as started:
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.callback(kill, victim)
        assert victim.stdin is not None and victim.stdout is not None
        assert victim.stdout.readline() == "ready\n"
        trace, told = tmp_path / "trace", tmp_path / "told"
        try:
            with told.open("w") as stream:
                tracer = subprocess.Popen([*STRACE, "-o", str(trace), "-p", str(victim.pid)], stderr=stream, text=True)
        except FileNotFoundError:
            pytest.skip("strace is not installed: nothing else makes one process's fsync fail")
        started.callback(kill, tracer)
        while "attached" not in told.read_text():
            if tracer.poll() is not None:
                pytest.skip(f"this system does not let one process trace another: {told.read_text().strip()}")
            time.sleep(0.01)
        answer, _ = victim.communicate("\n", timeout=STRACE_S)
        assert answer == "refused 1\n"
        assert "EIO" in trace.read_text()
