"""A gateway's side of a store on a PostgreSQL server: how it writes, reads, and hears of changes.

Loaded only where there is such a store. A transaction runs in a thread of its own, which waits for the server; a lost
session is opened again. If a session is lost during COMMIT, nobody knows what became of the batch: it counts as failed,
what must be kept is written again (and changes nothing where it was written), and holds are given back.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import psycopg

from embedmesh.rules.errors import SetupError, StoreUnavailable
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import Clock
from embedmesh.storage.cached.changes import CHANGES_POLL_S
from embedmesh.storage.db import Row, errors, refusals
from embedmesh.storage.instance import Instance
from embedmesh.storage.ledger.batch import WriteBatch
from embedmesh.storage.migrate import is_empty, migrate, refuse_another_version
from embedmesh.storage.opening import Opened, prepare
from embedmesh.storage.postgres.database import PostgresDb, PostgresEngine

SESSIONS = 2  # one may be slow
READ_S_MAX = 1.5  # as for a hold


def open_postgres(engine: PostgresEngine, instance: Instance, key_secret: bytes, clock: Clock) -> Opened:
    """A database. Its store is made if there is none. Blocks. Raises SetupError."""
    opened: list[PostgresDb] = []
    try:
        opened.append(writes := engine.connect())
        if is_empty(engine, writes):
            migrate(engine, writes)
        else:
            refuse_another_version(engine, writes)
        opened.append(listening := engine.connect())
        while not _named(listening, instance.name):
            instance.rename(new_id("gw", clock))
        recovered = prepare(writes, instance.name, None, key_secret, clock.unix_ms(), alone=False)
    except BaseException:
        for db in opened:
            db.close()
        raise
    return Opened(
        instance=instance,
        recovered=recovered,
        reads=PostgresReads(engine),
        key_reads=PostgresReads(engine),
        bell=Listener(engine, listening),
        medium=lambda clock: PostgresMedium(engine, writes),
        on_close=lambda clean: None,
    )


def _named(db: PostgresDb, name: str) -> bool:
    """Take a name for as long as the session lasts, if no other gateway of the store has it.

    It is waited for as long as for any lock: the session of our own last process may be just ending. Under another name
    its holds would not be released until they expire.
    """
    number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big", signed=True)
    try:
        db.execute("SELECT pg_advisory_lock(:number)", {"number": number})
    except psycopg.errors.LockNotAvailable:
        return False
    return True


class PostgresMedium:
    """Implements the protocol `Medium` over a session that is opened again after a loss."""

    def __init__(self, engine: PostgresEngine, db: PostgresDb) -> None:
        self._engine = engine
        self._db = db
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="transaction")

    async def write(self, batch: WriteBatch, *, patient: bool) -> None:
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._write, batch))

    async def between_batches(self) -> None:
        """Nothing to do: the server looks after itself."""

    async def close(self) -> None:
        # In the thread: it may still be waiting for the server, which is bounded by the session's own timeouts.
        self._thread.submit(self._db.close)
        self._thread.shutdown(wait=False)

    def _write(self, batch: WriteBatch) -> None:
        if self._db.lost:
            self._db.close()
            self._db = reconnected(self._engine)
        try:
            try:
                with self._db.pipelined():
                    self._db.begin()
                    batch.apply(self._db)
                    self._db.commit()
            except refusals():
                self._db.rollback()
                self._db.begin()
                batch.apply_again(self._db)
                self._db.commit()
            batch.settle(self._db)
        except psycopg.Error:
            with suppress(psycopg.Error):
                if not self._db.lost:
                    self._db.rollback()
            raise


def reconnected(engine: PostgresEngine, *, read_only: bool = False) -> PostgresDb:
    """A new session. Raises the driver's error, as a statement on a session that is lost does."""
    try:
        return engine.connect(read_only=read_only)
    except SetupError:
        raise psycopg.OperationalError("no session could be opened") from None


class PostgresReads:
    """Implements the protocol `Reads`."""

    def __init__(self, engine: PostgresEngine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(max_workers=SESSIONS, thread_name_prefix="read")
        self._idle: SimpleQueue[PostgresDb] = SimpleQueue()

    async def ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        asking = asyncio.get_running_loop().run_in_executor(self._threads, self._ask, statement, values)
        try:
            async with asyncio.timeout(READ_S_MAX):
                return await asking
        except TimeoutError:
            raise StoreUnavailable("The store did not answer in time; try again soon.") from None
        except errors():
            raise StoreUnavailable("The store cannot be read now; try again soon.") from None

    def close(self) -> None:
        self._threads.submit(self._close)
        self._threads.shutdown(wait=False)

    def _ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        while True:
            idle = self._idle.get() if not self._idle.empty() else None
            db = idle or reconnected(self._engine, read_only=True)
            try:
                return db.execute(statement, values).fetchall()
            except psycopg.Error:
                if idle is None or not db.lost:
                    raise  # else the server ended it while it was idle: try another
            finally:
                if db.lost:
                    db.close()
                else:
                    self._idle.put(db)

    def _close(self) -> None:
        while not self._idle.empty():
            self._idle.get().close()


class Listener:
    """Rings as soon as a change is committed. Implements the protocol `Bell` over a PostgreSQL session of its own."""

    def __init__(self, engine: PostgresEngine, db: PostgresDb) -> None:
        self._engine = engine
        self._db = db
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="listen")
        self._listening = False

    async def wait(self) -> None:
        try:
            await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._thread, self._wait))
        except errors():
            await asyncio.sleep(CHANGES_POLL_S)

    def close(self) -> None:
        self._thread.submit(self._db.close)
        self._thread.shutdown(wait=False)

    def _wait(self) -> None:
        if self._db.lost:
            self._db.close()
            self._listening = False
            self._db = reconnected(self._engine)
        if not self._listening:
            self._db.connection.execute("LISTEN embedmesh")
            self._listening = True
        try:
            for _ in self._db.connection.notifies(timeout=CHANGES_POLL_S, stop_after=1):
                return
        except psycopg.Error:
            self._db.close()
            raise
