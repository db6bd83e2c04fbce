"""Reading beside the writer: nobody waits for a COMMIT to learn who asks.

From SQLite a row or a few are read at once, on the event loop: that takes microseconds. A PostgreSQL server is asked
in a thread, over sessions of their own.
"""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.db import ERRORS, Row
from embedmesh.storage.medium import reconnected
from embedmesh.storage.postgres import PostgresDb, PostgresEngine
from embedmesh.storage.sqlite import SqliteDb

SESSIONS = 2  # one may be slow
READ_S_MAX = 1.5  # as for a hold


class Reads(Protocol):
    """Short questions."""

    async def ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        """The rows. Raises StoreUnavailable."""
        ...

    def close(self) -> None: ...


class SqliteReads:
    """Implements the protocol `Reads`."""

    def __init__(self, db: SqliteDb) -> None:
        self._db = db

    async def ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        try:
            return self._db.execute(statement, values).fetchall()
        except ERRORS:
            raise StoreUnavailable("The store cannot be read now; try again soon.") from None

    def close(self) -> None:
        self._db.close()


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
        except ERRORS:
            raise StoreUnavailable("The store cannot be read now; try again soon.") from None

    def close(self) -> None:
        self._threads.submit(self._close)
        self._threads.shutdown(wait=False)

    def _ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        db = self._idle.get() if not self._idle.empty() else reconnected(self._engine, read_only=True)
        try:
            rows = db.execute(statement, values).fetchall()
        finally:
            if db.lost:
                db.close()
            else:
                self._idle.put(db)
        return rows

    def _close(self) -> None:
        while not self._idle.empty():
            self._idle.get().close()
