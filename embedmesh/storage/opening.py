"""Opening a store for a gateway: its connections, its name, and what a gateway that died has left."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from embedmesh.rules.errors import SetupError, StoreAway
from embedmesh.rules.holds import HoldEnd
from embedmesh.rules.ports import Clock
from embedmesh.storage.cached.changes import Bell, Timer
from embedmesh.storage.db import Db, errors
from embedmesh.storage.instance import Instance
from embedmesh.storage.ledger.check import verify
from embedmesh.storage.ledger.group_commit import Medium
from embedmesh.storage.ledger.holds import HOLDS, end_holds
from embedmesh.storage.migrate import migrate, refuse_another_version
from embedmesh.storage.reads import Reads, SqliteReads
from embedmesh.storage.secrets.secret import FACTS, check_secret
from embedmesh.storage.sqlite.commit import SqliteMedium
from embedmesh.storage.sqlite.database import OPEN_BUSY_S, GatewayLock, SqliteDb, SqliteEngine

RUNNING = "gateway_running"  # a fact of an SQLite store while a gateway has it open


class Opened:
    """The connections of a store that was opened, and what has to be let go of at the end."""

    def __init__(
        self,
        instance: Instance,
        recovered: int,
        reads: Reads,
        key_reads: Reads,
        bell: Bell,
        medium: Callable[[Clock], Medium],
        close: Callable[[bool], None],
    ) -> None:
        """`key_reads` are for who asks: nobody waits to be known behind what those who are known want to know."""
        self.instance = instance
        self.recovered = recovered
        self.reads = reads
        self.key_reads = key_reads
        self.bell = bell
        self.medium = medium
        self._close = close

    def close(self, *, clean: bool) -> None:
        """`clean`: all was written."""
        self.bell.close()
        self.reads.close()
        if self.key_reads is not self.reads:
            self.key_reads.close()
        self._close(clean)
        self.instance.close()


async def open_sqlite(
    engine: SqliteEngine, instance: Instance, key_secret: bytes, clock: Clock, lock_wait_s: float
) -> Opened:
    """A file: brought to this version, verified and released by whoever is alone with it. Raises SetupError."""
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
        writes.execute("PRAGMA busy_timeout = 0")  # the writer waits by itself, without blocking the event loop
        writes.execute("PRAGMA wal_autocheckpoint = 0")  # the writer checkpoints by itself, and sees the errors
        opened.append(reads := engine.connect(busy_s=0, read_only=True))
        await lock.share(lock_wait_s)
        wal = os.open(f"{engine.path}-wal", os.O_RDONLY)  # the kernel tells it of every failed write-back from now on
    except BaseException:
        for db in opened:
            db.close()
        if lock is not None:
            lock.close()
        raise

    def close(clean: bool) -> None:
        if clean:
            with suppress(*errors()):  # then the next start verifies, for nothing
                writes.execute(FACTS["delete_fact"], {"name": running})
        writes.close()
        os.close(wal)
        lock.close()

    def medium(clock: Clock) -> Medium:
        return SqliteMedium(writes, clock, partial(os.fdatasync, wal))

    at_once = SqliteReads(reads)  # nobody waits
    return Opened(instance, recovered, at_once, at_once, Timer(), medium, close)


def prepare(db: Db, owner: str, running: str | None, key_secret: bytes, now_ms: int, *, alone: bool) -> int:
    """Check the secret, verify an SQLite ledger if a gateway died, and release what it left open.

    `alone`: no other gateway is there, so that all open holds are dead ones'. Returns how many were released.
    """
    try:
        db.begin()
        check_secret(db, key_secret)
        if running is not None:
            _verify(db, running, now_ms, alone=alone)
        if alone:
            left = db.execute(HOLDS["open_holds"]).fetchall()
        else:
            left = db.execute(HOLDS["holds_of_owner"], {"owner": owner}).fetchall()
        if left:
            db.lock_accounts({account_id for _, account_id in left})
        rows = [{"hold_id": hold_id, "ended_by": HoldEnd.RECOVER.value} for hold_id, _ in left]
        recovered = len(end_holds(db, now_ms, rows))
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
    """After gateways that did not close the store: look at what a lost write may have broken. Raises SetupError."""
    left = db.execute("SELECT name FROM facts WHERE name LIKE :like", {"like": f"{RUNNING}%"}).fetchall()
    if alone and left and (broken := verify(db)):
        first = broken[0]
        raise SetupError(
            f"The ledger does not add up after a crash ({first.promise}: {first.subject}: {first.detail}): "
            "keep the store's files, see `embedmesh ledger check --offline`, and restore a backup."
        )
    if alone:
        for (name,) in left:
            db.execute(FACTS["delete_fact"], {"name": name})
    db.execute(FACTS["set_fact"], {"name": running, "value": str(now_ms)})
