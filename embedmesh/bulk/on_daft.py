"""Units by Daft: in waves, each a data frame of some units, whose workers embed and write them."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.units import JobPlan
from embedmesh.bulk.usage import WrongUsage
from embedmesh.client.errors import EmbedmeshError

DAFT_WORKERS = 4  # each waits for the gateway most of the time
WAVE_UNITS_A_WORKER = 16  # a wave ends with its last unit, while other workers wait: a few per cent; ten MB a worker
FRUITLESS_TRIES_MAX = 3  # of a wave, in a row, that brought no unit: then it is not that a worker died


class DaftUnitWorker:
    """What each of Daft's workers has."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from embedmesh.bulk.work import UnitWorker

        self._work = UnitWorker(plan)

    def work(self, unit: bytes) -> bytes:
        """Embed and write a unit; its row for the manifest. Both as MessagePack: a column has one type."""
        return msgspec.msgpack.encode(self._work(msgspec.msgpack.decode(unit)))


def run_units(
    units: Iterator[dict[str, Any]], plan: JobPlan, concurrency: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the manifest, wave by wave. `concurrency` is the number of workers.

    Daft's runner is the one that is set (native, unless DAFT_RUNNER says ray). Raises WrongUsage where Daft is missing,
    what a worker raises, and what Daft raises where that does not pass.
    """
    daft = _import_daft()
    count = concurrency or DAFT_WORKERS
    made = daft.cls(DaftUnitWorker, max_concurrency=count, use_process=True)
    work = made(plan.as_dict()).work
    while wave := {unit["key"]: msgspec.msgpack.encode(unit) for unit in islice(units, count * WAVE_UNITS_A_WORKER)}:
        fruitless = 0
        while wave:
            left = len(wave)
            try:
                frame = daft.from_pydict({"unit": list(wave.values())}).into_batches(1)
                for found in frame.select(work(frame["unit"]).alias("row")).iter_rows():
                    row = msgspec.msgpack.decode(found["row"])
                    del wave[row["key"]]
                    yield row
            except Exception as error:
                raise_ours(error)
                fruitless = fruitless + 1 if len(wave) == left else 0
                if fruitless == FRUITLESS_TRIES_MAX:
                    raise


def raise_ours(error: BaseException | None) -> None:
    """What a worker of ours raised, out of what an engine has wrapped it into; nothing if that was something else."""
    while error is not None:
        if isinstance(error, Stopped | WrongUsage | EmbedmeshError):
            raise error from None
        error = error.__cause__ or error.__context__


def _import_daft() -> Any:
    os.environ.setdefault("DO_NOT_TRACK", "true")  # it would tell its makers
    try:
        import daft
    except ImportError:
        raise WrongUsage("--engine daft needs Daft: pip install 'embedmesh[daft]'") from None
    return daft
