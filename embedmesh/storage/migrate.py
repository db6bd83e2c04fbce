"""Bringing a store to this program's version, script by script. A store from the future is refused."""

from collections.abc import Mapping

from embedmesh.rules.errors import SetupError
from embedmesh.storage.db import Db, Engine
from embedmesh.storage.sql import migrations


def migrate(engine: Engine, db: Db, scripts: Mapping[int, str] | None = None) -> None:
    """Run what is missing, one transaction a script. Raises SetupError."""
    scripts = migrations(engine.dialect) if scripts is None else scripts
    version = engine.version(db)
    _refuse_the_future(engine, version, max(scripts))
    for number, script in sorted(scripts.items()):
        if version < number:
            engine.run_script(db, script, number)


def is_empty(engine: Engine, db: Db) -> bool:
    """Whether nothing was ever made of this store."""
    return engine.version(db) == 0


def refuse_another_version(engine: Engine, db: Db) -> None:
    """For those who only come by: raise SetupError for a store that is not of this program's version."""
    version, known = engine.version(db), newest(engine)
    _refuse_the_future(engine, version, known)
    if version < known:
        raise SetupError(
            f"The store {engine.shown} has version {version}; this program needs {known}. Stop all its gateways, then "
            "run `embedmesh store migrate`."
        )


def newest(engine: Engine) -> int:
    """The version of a store that this program works with."""
    return max(migrations(engine.dialect))


def _refuse_the_future(engine: Engine, version: int, known: int) -> None:
    if version > known:
        raise SetupError(
            f"The store {engine.shown} has version {version}; this program knows {known}: use a newer embedmesh."
        )
