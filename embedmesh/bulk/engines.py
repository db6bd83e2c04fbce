"""Who works units off: this process, or engines that have many machines."""

import importlib
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.units import JobPlan
from embedmesh.bulk.usage import WrongUsage
from embedmesh.bulk.work import UnitWorker

LOCAL_UNITS = 8  # at one time: several requests each; with vectors of 1,536 components 12 MB each
# To begin with, and one more for each that is done. So a killed run leaves no more to be computed again than it has
# done, and these: what a gateway computes free is bounded by what was paid.
FIRST_UNITS = 2

RunUnits = Callable[[Iterator[dict[str, Any]], JobPlan, int | None], Iterator[dict[str, Any]]]
"""Have every unit worked off, `concurrency` at one time or as many as suits the engine; give what workers return.

It takes no more units than it can soon begin. What a worker raises it raises (Stopped, WrongUsage, OSError), after it
has given what others had done by then. When its caller closes it, it ends what it has begun.
"""

Begun = Future[dict[str, Any]]

ENGINES = {
    "local": "embedmesh.bulk.engines:run_local",
    "daft": "embedmesh.bulk.on_daft:run_units",
    "ray": "embedmesh.bulk.on_ray:run_units",
}


def engine_for(name: str) -> RunUnits:
    """The engine of that name. Raises WrongUsage where it is not installed."""
    module, _, function = ENGINES[name].partition(":")
    try:
        run: RunUnits = getattr(importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise WrongUsage(f"--engine {name} needs {error.name}: pip install 'embedmesh[{name}]'.") from None
    return run


def run_local(units: Iterator[dict[str, Any]], plan: JobPlan, concurrency: int | None) -> Iterator[dict[str, Any]]:
    """In threads of this process."""
    at_once = concurrency or LOCAL_UNITS
    begun: set[Begun] = set()
    worker = UnitWorker(plan)
    threads = ThreadPoolExecutor(at_once, "embedmesh-unit")
    try:
        room = min(FIRST_UNITS, at_once)
        for unit in units:
            begun.add(threads.submit(worker, unit))
            for row in _finished(begun, room - 1):
                room = min(room + 1, at_once)
                yield row
        yield from _finished(begun, 0)
    except GeneratorExit:
        raise
    except BaseException as error:
        if not isinstance(error, Stopped | OSError):
            worker.close()  # Ctrl-C waits for nothing; a failure of one unit is that of all, or they are done soon
        wait(begun)
        yield from (one.result() for one in begun if one.exception() is None)
        raise
    finally:
        worker.close()
        threads.shutdown()


def _finished(begun: set[Begun], left: int) -> Iterator[dict[str, Any]]:
    """What is done, until no more than `left` are under way. Raises what a unit has raised."""
    while len(begun) > left:
        for one in wait(begun, return_when=FIRST_COMPLETED).done:
            begun.discard(one)
            yield one.result()
