"""Brings a store to this program's version, script by script. A store of an unknown version is left untouched."""

from collections.abc import Mapping

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.sql import migrations


def migrate(engine: Engine, db: Db, scripts: Mapping[int, str] | None = None) -> None:
    """Run the scripts that the store lacks, one transaction a script. Raises SetupError."""
    scripts = migrations(engine.dialect) if scripts is None else scripts
    version = engine.version(db)
    _refuse_unknown_version(engine, version, scripts)
    for number, script in sorted(scripts.items()):
        if version < number:
            engine.run_script(db, script, number)


def is_empty(engine: Engine, db: Db) -> bool:
    """Whether there is no schema in the store yet."""
    return engine.version(db) == 0


def refuse_another_version(engine: Engine, db: Db) -> None:
    """Raise SetupError for a store that does not have this program's version."""
    version = engine.version(db)
    _refuse_unknown_version(engine, version, migrations(engine.dialect))
    if version < newest(engine):
        raise SetupError(
            f"The store {engine.shown} has version {version}; this program needs {newest(engine)}. Stop all its "
            "gateways, then run `embedmesh store migrate`."
        )


def newest(engine: Engine) -> int:
    """The version of a store that this program works with."""
    return max(migrations(engine.dialect))


def _refuse_unknown_version(engine: Engine, version: int, scripts: Mapping[int, str]) -> None:
    if version > max(scripts):
        raise SetupError(
            f"The store {engine.shown} has version {version}; this program knows {max(scripts)}: use a newer embedmesh."
        )
    if 0 != version < min(scripts):
        raise SetupError(
            f"The store {engine.shown} has version {version}, of a program before the first release. This program "
            "cannot use it, and leaves it untouched: start with another --data-dir, or set EMBEDMESH_STORE to a new "
            "database."
        )
