"""Which kind of store a DSN names, and how it is shown."""

from pathlib import Path
from urllib.parse import urlsplit

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Engine
from embedmesh.storage.sqlite.database import SqliteEngine


def shown_store(dsn: str | Path) -> str:
    """A store for people: its file's whole path, or its server's address without user and password."""
    if "://" not in str(dsn):
        return str(Path(dsn).absolute())
    parts = urlsplit(str(dsn))
    return f"postgresql://{parts.hostname or 'localhost'}{parts.path}"


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
