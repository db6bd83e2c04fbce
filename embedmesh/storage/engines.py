"""Which kind of store a DSN names."""

from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Engine
from embedmesh.storage.sqlite.database import SqliteEngine


def engine_of(dsn: str | Path) -> Engine:
    """A file's path, or a `postgresql://` address. Raises SetupError for another address."""
    if isinstance(dsn, Path):
        return SqliteEngine(dsn)
    if dsn.startswith(("postgresql://", "postgres://")):
        from embedmesh.storage.postgres.database import PostgresEngine

        return PostgresEngine(dsn)
    if "://" in dsn:
        raise SetupError("A store is postgresql://USER@HOST/DATABASE, or a file's path. Correct EMBEDMESH_STORE.")
    return SqliteEngine(Path(dsn))
