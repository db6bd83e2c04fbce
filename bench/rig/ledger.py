"""The ledger, once its gateways have stopped: checked by the command, and read row by row."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from bench.rig.live import embedmesh
from embedmesh.storage.engines import engine_of


def check(data_dir: Path, environment: Mapping[str, str] | None = None) -> bool:
    """Whether `embedmesh ledger check --offline` says that it adds up."""
    done = embedmesh(data_dir, "ledger", "check", "--offline", environment=environment)
    return done.returncode == 0 and bool(msgspec.json.decode(done.stdout)["ok"])


def read(store: str | Path, *questions: str) -> list[list[tuple[Any, ...]]]:
    """The rows of each SELECT."""
    db = engine_of(store).connect(busy_s=5, read_only=True)
    try:
        return [list(db.execute(question).fetchall()) for question in questions]
    finally:
        db.close()
