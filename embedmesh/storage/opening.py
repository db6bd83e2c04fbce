"""Opening a store for a gateway: its connections, its name, and what a gateway that died has left."""

import logging
import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec

from embedmesh.rules.errors import SetupError, StoreAway
from embedmesh.rules.holds import HoldEnd
from embedmesh.rules.ports import Clock
from embedmesh.rules.tabs import TabState
from embedmesh.storage.cached.changes import Bell, PollTimer
from embedmesh.storage.db import Db, errors
from embedmesh.storage.instance import Instance
from embedmesh.storage.ledger.check import verify
from embedmesh.storage.ledger.group_commit import Medium
from embedmesh.storage.ledger.job_tab import drop_attempts
from embedmesh.storage.ledger.lost_holds import LostHolds
from embedmesh.storage.ledger.open_tab import end_tabs
from embedmesh.storage.ledger.writes import as_rows
from embedmesh.storage.migrate import migrate, refuse_another_version
from embedmesh.storage.reads import Reads, SqliteReads
from embedmesh.storage.secrets.secret import check_secret
from embedmesh.storage.sql import BATCHES_SQL, FACTS_SQL, HOLDS_SQL, JOBS_SQL, SLOTS_SQL, TABS_SQL
from embedmesh.storage.sqlite.commit import SqliteMedium
from embedmesh.storage.sqlite.database import OPEN_BUSY_S, GatewayLock, SqliteDb, SqliteEngine
from embedmesh.system import sync_data

RUNNING = "gateway_running"  # a fact of an SQLite store while a gateway has it open
PLACE = "store_place"  # a fact of an SQLite store: where its file was when a gateway opened it last

log = logging.getLogger(__name__)


class Left(NamedTuple):
    """How many holds and tabs dead gateways had left. `noted` are holds with a note, that were charged for it."""

    holds: int
    noted: int
    tabs: int


class Opened(msgspec.Struct, frozen=True, kw_only=True):
    """The connections of a store that was opened. `recovered` is what of dead gateways was released.

    `key_reads` look up keys only, so that no other read delays them. `on_close` is told whether all was written.
    """

    instance: Instance
    recovered: "Left"
    reads: Reads
    key_reads: Reads
    bell: Bell
    medium: Callable[[Clock], Medium]
    on_close: Callable[[bool], None]

    def close(self, *, clean: bool) -> None:
        """`clean`: all was written."""
        self.bell.close()
        self.reads.close()
        if self.key_reads is not self.reads:
            self.key_reads.close()
        self.on_close(clean)
        self.instance.close()


async def open_sqlite(
    engine: SqliteEngine, instance: Instance, key_secret: bytes, clock: Clock, lock_wait_s: float
) -> Opened:
    """A file. A gateway that is alone with it migrates, verifies and releases. Raises SetupError."""
    lock: GatewayLock | None = None
    opened: list[SqliteDb] = []
    try:
        opened.append(writes := engine.connect(busy_s=OPEN_BUSY_S))
        lock = GatewayLock(engine.path)
        await lock.take(lock_wait_s)
        running = f"{RUNNING} {instance.name}"
        if lock.alone:
            migrate(engine, writes)
        else:
            refuse_another_version(engine, writes)
        recovered = prepare(writes, instance.name, running, key_secret, clock.unix_ms(), alone=lock.alone)
        _note_place(writes, engine.path.absolute())
        writes.execute("PRAGMA busy_timeout = 0")  # the writer waits by itself, without blocking the event loop
        writes.execute("PRAGMA wal_autocheckpoint = 0")  # the writer checkpoints by itself, and sees the errors
        opened.append(reads := engine.connect(busy_s=0, read_only=True))
        await lock.share(lock_wait_s)
        wal = os.open(f"{engine.path}-wal", os.O_RDONLY)  # from now on the kernel reports every failed write-back to it
    except BaseException:
        for db in opened:
            db.close()
        if lock is not None:
            lock.close()
        raise

    def close(clean: bool) -> None:
        if clean:
            with suppress(*errors()):  # then the next start verifies, for nothing
                writes.execute(FACTS_SQL["delete_fact"], {"name": running})
        writes.close()
        os.close(wal)
        lock.close()

    at_once = SqliteReads(reads)  # nobody waits
    return Opened(
        instance=instance,
        recovered=recovered,
        reads=at_once,
        key_reads=at_once,
        bell=PollTimer(),
        medium=lambda clock: SqliteMedium(writes, clock, partial(sync_data, wal)),
        on_close=close,
    )


def _note_place(db: SqliteDb, path: Path) -> None:
    """Note where the file is. Where it was before there still is another: then one is a copy, which is told once."""
    with suppress(*errors(), UnicodeEncodeError):  # what cannot be noted now is noted at the next start
        found = db.execute(FACTS_SQL["find_fact"], {"name": PLACE}).fetchone()
        before = None if found is None else Path(found[0])
        if before == path:
            return
        with suppress(OSError):
            if before is not None and before.exists() and not before.samefile(path):
                log.warning(
                    "the store %s is a copy: that of %s is there, too. They do not know of each other: what is spent "
                    "at one is not spent at the other", path, before,
                )  # fmt: skip
        db.execute(FACTS_SQL["set_fact"], {"name": PLACE, "value": str(path)})


def prepare(db: Db, owner: str, running: str | None, key_secret: bytes, now_ms: int, *, alone: bool) -> Left:
    """Check the secret, verify an SQLite ledger if a gateway died, and end what it left open: see `LostHolds`.

    `alone`: there is no other gateway, so that all open holds and live tabs are those of dead ones. Returns how many
    there were.
    """
    try:
        db.begin()
        check_secret(db, key_secret)
        if running is not None:
            _verify(db, running, now_ms, alone=alone)
        if alone:
            holds = LostHolds(db.execute(HOLDS_SQL["open_holds"]).fetchall())
            tabs = db.execute(TABS_SQL["live_tabs"]).fetchall()
        else:
            holds = LostHolds(db.execute(HOLDS_SQL["holds_of_owner"], {"owner": owner}).fetchall())
            tabs = db.execute(TABS_SQL["tabs_of_owner"], {"owner": owner}).fetchall()
        batches = db.execute(BATCHES_SQL["batches_of_owner"], {"owner": None if alone else owner}).fetchall()
        attempts = db.execute(JOBS_SQL["open_requests"], {"owner": None if alone else owner}).fetchall()
        if accounts := holds.accounts | {row[-1] for row in (*tabs, *batches, *attempts)}:
            db.lock_accounts(accounts)
        db.execute(SLOTS_SQL["drop_all_slots" if alone else "drop_slots_of"], {} if alone else {"owner": owner})
        ended = holds.end(db, now_ms, HoldEnd.RECOVER)
        ended_ids = end_tabs(db, now_ms, [tab_id for tab_id, _ in tabs], TabState.RECOVERED)
        db.execute(BATCHES_SQL["free_these"], as_rows([(batch_id,) for batch_id, _ in batches]))
        drop_attempts(db, now_ms, [(job_id, attempt) for job_id, attempt, _ in attempts])
        recovered = Left(len(ended.released()), len(ended.captured()), len(ended_ids()))
        db.commit()
    except errors() as error:
        away = StoreAway if db.dialect == "postgres" else SetupError
        raise away(f"The store cannot be written: {error}. Is its disk full or read-only?") from None
    finally:
        with suppress(*errors()):
            if db.in_transaction:
                db.rollback()
    return recovered


def _verify(db: Db, running: str, now_ms: int, *, alone: bool) -> None:
    """After gateways that did not close the store: check what a lost write may have broken. Raises SetupError."""
    if alone:
        left = db.execute("SELECT name FROM facts WHERE name LIKE :like", {"like": f"{RUNNING}%"}).fetchall()
        if left and (broken := verify(db)):
            first = broken[0]
            raise SetupError(
                f"The ledger does not add up after a crash ({first.promise}: {first.subject}: {first.detail}): "
                "keep the store's files, see `embedmesh ledger check --offline`, and restore a backup."
            )
        for (name,) in left:
            db.execute(FACTS_SQL["delete_fact"], {"name": name})
    db.execute(FACTS_SQL["set_fact"], {"name": running, "value": str(now_ms)})
