"""A copy of the whole store in one file, consistent at one moment, while gateways run."""

import os
from contextlib import suppress
from pathlib import Path

from embedmesh.files import make_draft, sync
from embedmesh.rules.errors import InvalidValue
from embedmesh.storage.db import Db

STORE_SUFFIXES = ("", "-wal", "-shm", ".lock")  # the files of a store that is in use


def backup(db: Db, target: Path, *, overwrite: bool) -> None:
    """Write a copy to `target` (mode 0600): whole and on disk under its name, or not there at all.

    To restore, put it where the store was while no gateway runs, without the old `-wal` and `-shm` files. The key
    secret is not in it. Raises InvalidValue for a target that is the store itself, or that is there already (unless
    `overwrite`); OSError and the driver's errors.
    """
    _refuse_the_store_itself(db, target)
    if not overwrite and os.path.lexists(target):
        raise InvalidValue(f"{target} exists: name another file, or allow that it is overwritten.")
    draft, descriptor = make_draft(target)
    os.close(descriptor)
    try:
        db.execute("VACUUM INTO :draft", {"draft": str(draft)})
        sync(draft)
        draft.replace(target)
    except BaseException:
        with suppress(FileNotFoundError):
            draft.unlink()
        raise
    sync(target.parent)


def _refuse_the_store_itself(db: Db, target: Path) -> None:
    """By path and by file: a link to the store is the store."""
    _, _, store = db.execute("PRAGMA database_list").fetchall()[0]
    for suffix in STORE_SUFFIXES:
        ours = Path(store + suffix)
        if target.resolve() == ours.resolve() or (target.exists() and ours.exists() and target.samefile(ours)):
            raise InvalidValue(f"{target} is the store itself, or one of its files: name another file.")
