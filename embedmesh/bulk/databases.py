"""What sinks that are databases share: ids, values that each of them can keep, and what is tried again."""

import json
import math
import random
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.usage import WrongUsage

PAUSES_S = (0.5, 1, 2, 4, 8, 15)  # half a minute: a database's restart or failover does not end a run of hours
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
ID_BYTES_MAX = 2_000  # an index of PostgreSQL takes some 2,700

T = TypeVar("T")


class SinkNotReached(Stopped):
    """The database does not answer, or cannot work now. What it has committed stays; the same run goes on later."""


def persist(step: Callable[[], T]) -> T:
    """What `step` returns. One that raises SinkNotReached is repeated for half a minute, so it must be idempotent."""
    for pause_s in PAUSES_S:
        try:
            return step()
        except SinkNotReached:
            threading.Event().wait(pause_s * random.uniform(0.5, 1))  # many workers meet the same restart
    return step()


def rows_by_key(ids: Sequence[str | int | None]) -> dict[str, int]:
    """The row of each id, as text, without rows that have none. Where an id comes twice it is the last one's.

    Sorted, so that two runs that write the same rows wait for each other and do not deadlock. Raises WrongUsage.
    """
    keys = [(plain(str(value)), row) for row, value in enumerate(ids) if value not in (None, "")]
    if any(len(key.encode()) > ID_BYTES_MAX for key, _ in keys):
        raise WrongUsage(
            f"An id has more than {ID_BYTES_MAX:,} bytes, which no database finds again. Name another --id."
        )
    return dict(sorted(keys))


def plain(value: Any) -> Any:
    """The value as JSON of any database has it. What is no JSON becomes text; what is no number, null."""
    match value:
        case None | bool():
            return value
        case str():
            return value.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
        case int():
            return value if INT64_MIN <= value <= INT64_MAX else str(value)
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return value.hex()
        case Mapping():
            return {plain(str(name)): plain(each) for name, each in value.items()}
        case list() | tuple() | set():
            return [plain(each) for each in value]
    return value.isoformat() if hasattr(value, "isoformat") else plain(str(value))


def as_text(value: Any) -> str | None:
    """The value as SQL reads it for a column of any type; None is NULL. Lists and objects are JSON."""
    made = plain(value)
    if made is None or isinstance(made, str):
        return made
    return as_json(made) if isinstance(made, list | dict) else str(made).lower()


def as_json(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False)
