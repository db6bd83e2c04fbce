"""Units by Daft: in waves, each a data frame of some units, whose workers embed and write them."""

import os
from collections.abc import Iterator
from itertools import islice
from typing import Any

import msgspec

from embedmesh.bulk.stops import NothingListens, RequestRefused, Stopped
from embedmesh.bulk.units import JobPlan
from embedmesh.bulk.usage import WrongUsage
from embedmesh.client.errors import EmbedmeshError

DAFT_WORKERS = 4  # each waits for the gateway most of the time
WAVE_UNITS_A_WORKER = 16  # a wave ends with its last unit, while other workers wait: a few per cent; ten MB a worker
FRUITLESS_TRIES_MAX = 3  # of a wave, in a row, that brought no unit: then it is not that a worker died
RAISED = {kind.__name__: kind for kind in (Stopped, RequestRefused, NothingListens, WrongUsage)}


class DaftUnitWorker:
    """What each of Daft's workers has: a process."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from embedmesh.bulk.work import UnitWorker

        self._work = UnitWorker(plan)

    def work(self, unit: bytes) -> bytes:
        """Embed and write a unit; its row for the manifest, or what was raised, of which Daft would keep only the text.

        Both as MessagePack: a column has one type.
        """
        try:
            row = self._work(msgspec.msgpack.decode(unit))
        except (Stopped, WrongUsage) as error:
            row = {"raised": type(error).__name__, "message": str(error)}
        except (EmbedmeshError, OSError) as error:
            row = {"raised": Stopped.__name__, "message": str(error)}
        return msgspec.msgpack.encode(row)


def run_units(
    units: Iterator[dict[str, Any]], plan: JobPlan, concurrency: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the manifest, wave by wave. `concurrency` is the number of workers.

    Daft's runner is the one that is set (native, unless DAFT_RUNNER says ray). Raises WrongUsage where Daft is missing,
    what a worker raises, and what Daft raises where that does not pass.
    """
    daft = _import_daft()
    count = concurrency or DAFT_WORKERS
    work = daft.cls(DaftUnitWorker, max_concurrency=count, use_process=True)(plan.as_dict()).work
    while wave := {unit["key"]: msgspec.msgpack.encode(unit) for unit in islice(units, count * WAVE_UNITS_A_WORKER)}:
        fruitless = 0
        while wave:
            left = len(wave)
            try:
                frame = daft.from_pydict({"unit": list(wave.values())}).into_batches(1)
                for found in frame.select(work(frame["unit"]).alias("row")).iter_rows():
                    row = msgspec.msgpack.decode(found["row"])
                    if "raised" in row:
                        raise RAISED[row["raised"]](row["message"])
                    del wave[row["key"]]
                    yield row
            except RuntimeError:  # of Daft: a worker died, and with it the query
                fruitless = fruitless + 1 if len(wave) == left else 0
                if fruitless == FRUITLESS_TRIES_MAX:
                    raise


def _import_daft() -> Any:
    os.environ.setdefault("DO_NOT_TRACK", "true")  # it would tell its makers
    try:
        import daft
    except ImportError:
        raise WrongUsage("--engine daft needs Daft: pip install 'embedmesh[daft]'") from None
    return daft
