"""Which kind of store is meant."""

from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Engine
from embedmesh.storage.sqlite.database import SqliteEngine

URL_SCHEMES = ("postgresql://", "postgres://")


def engine_of(place: str | Path) -> Engine:
    """A file's path, or a `postgresql://` address. Raises SetupError for another address."""
    if isinstance(place, Path):
        return SqliteEngine(place)
    if place.startswith(URL_SCHEMES):
        from embedmesh.storage.postgres.database import PostgresEngine

        return PostgresEngine(place)
    if "://" in place:
        raise SetupError("A store is postgresql://USER@HOST/DATABASE, or a file's path. Mend EMBEDMESH_STORE.")
    return SqliteEngine(Path(place))
