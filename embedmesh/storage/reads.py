"""Reading beside the writer, so that no lookup of a key waits for a COMMIT.

SQLite reads a row or a few at once, on the event loop: that takes microseconds. A server is asked in a thread.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from embedmesh.rules.errors import StoreUnavailable
from embedmesh.storage.db import Row, errors
from embedmesh.storage.sqlite.database import SqliteDb


class Reads(Protocol):
    """Short questions."""

    async def ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        """The rows. Raises StoreUnavailable."""

    def close(self) -> None: ...


class SqliteReads:
    """Implements the protocol `Reads`."""

    def __init__(self, db: SqliteDb) -> None:
        self._db = db
        self.close = db.close

    async def ask(self, statement: str, values: Mapping[str, Any]) -> Sequence[Row]:
        try:
            return self._db.execute(statement, values).fetchall()
        except errors():
            raise StoreUnavailable("The store cannot be read now; try again soon.") from None
