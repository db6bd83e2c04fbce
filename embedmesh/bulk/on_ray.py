"""Units on a Ray cluster: actors that embed one unit after another. What one that dies had is done again, by it."""

import os
from collections import deque
from collections.abc import Iterator
from typing import Any

from embedmesh.bulk.units import JobPlan
from embedmesh.bulk.usage import WrongUsage

RAY_WORKERS_MIN = 4  # each waits for the gateway most of the time
RAY_WORKERS_A_MACHINE = 2
RAY_WORKER_CPUS = 0.1  # of a core: what cutting requests and writing parts takes
RAY_UNITS_AHEAD = 2  # of a worker: one that it works on, and one that is there when it is done


class RayUnitWorker:
    """The actor."""

    def __init__(self, plan: dict[str, Any]) -> None:
        from embedmesh.bulk.work import UnitWorker

        self._work = UnitWorker(plan)

    def work(self, unit: dict[str, Any]) -> dict[str, Any]:
        """Embed and write a unit; its row for the manifest."""
        return self._work(unit)


def run_units(
    units: Iterator[dict[str, Any]], plan: JobPlan, concurrency: int | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of the manifest, in the order in which units are done. `concurrency` is the number of actors.

    The cluster is that of RAY_ADDRESS, or one that runs on this machine, or one that is started here and ends with the
    run. Raises WrongUsage where Ray is missing, and what a worker raises.
    """
    ray = _import_ray()
    began_it = not ray.is_initialized()
    if began_it:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    machines = sum(node["Alive"] for node in ray.nodes())
    count = concurrency or max(RAY_WORKERS_MIN, RAY_WORKERS_A_MACHINE * machines)
    actor = ray.remote(num_cpus=RAY_WORKER_CPUS, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD")(
        RayUnitWorker
    )
    workers = [actor.remote(plan.as_dict()) for _ in range(count)]
    free = deque(workers * RAY_UNITS_AHEAD)
    under_way: dict[Any, Any] = {}
    failed: BaseException | None = None  # nothing more is begun, and what is under way is paid for
    try:
        while True:
            while failed is None and free and (unit := next(units, None)) is not None:
                worker = free.popleft()
                under_way[worker.work.remote(unit)] = worker
            if not under_way:
                break
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            free.append(under_way.pop(done))
            try:
                row = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                failed = failed or error.cause  # the worker's own, without Ray's traceback
                continue
            yield row
        if failed is not None:
            raise failed
    finally:
        for worker in workers:
            ray.kill(worker)
        if began_it:
            ray.shutdown()


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would be sent to Ray's makers
    try:
        import ray
    except ImportError:
        raise WrongUsage("--engine ray needs Ray: pip install 'embedmesh[ray]'") from None
    return ray
