"""The SQLite that the store uses: that of pysqlite3, which brings a recent one, or Python's own where there is none.

pysqlite3 has no wheel for Linux on ARM. Many Pythons are linked with an SQLite that can corrupt a write-ahead log;
`check_version` refuses those, of either.
"""

from typing import Any

from embedmesh.rules.errors import SetupError

try:
    import pysqlite3.dbapi2 as _found  # noqa: TID251 - this is that module

    BRINGS = "pysqlite3"
except ImportError:
    import sqlite3.dbapi2 as _found  # noqa: TID251 - `check_version` stands before each connection

    BRINGS = "Python"

driver: Any = _found  # one origin, one interface

SQLITE_VERSION_MIN = (3, 51, 3)  # 3.7.0 to 3.51.2 can corrupt a WAL that two connections write


def check_version(version: tuple[int, ...] | None = None, brings: str = BRINGS) -> None:
    """Refuse an SQLite that can corrupt a WAL. Raises SetupError."""
    found = driver.sqlite_version_info if version is None else version
    if found < SQLITE_VERSION_MIN:
        words, needed = (".".join(map(str, each)) for each in (found, SQLITE_VERSION_MIN))
        raise SetupError(
            f"SQLite {words} of {brings} can corrupt the store: {needed} or newer is needed. {REMEDIES[brings]}"
        )


REMEDIES = {
    "pysqlite3": "Run: pip install -U pysqlite3",
    "Python": (
        "Install pysqlite3 where it has a wheel, use a Python that brings a newer SQLite, or keep the store in"
        " PostgreSQL."
    ),
}
