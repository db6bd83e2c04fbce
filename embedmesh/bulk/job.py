"""The story of a job: units that the manifest lacks go to an engine; what comes back is committed, and all checked."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import Any, Protocol

from embedmesh.bulk.engines import RunUnits
from embedmesh.bulk.manifest import Manifest
from embedmesh.bulk.sinks import Sink
from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.units import JobPlan, JobUnit
from embedmesh.bulk.usage import WrongUsage


class JobObserver(Protocol):
    """Learns what a job does."""

    def was_done(self, unit: JobUnit) -> None:
        """An earlier run has committed it."""
        ...

    def committed(self, row: dict[str, Any], size: int) -> None:
        """A unit of that many bytes of input is done; `row` is what its worker has returned."""
        ...


def run_job(
    units: Iterable[JobUnit],
    plan: JobPlan,
    manifest: Manifest,
    sink: Sink,
    run_units: RunUnits,
    *,
    concurrency: int | None,
    observer: JobObserver,
) -> None:
    """Do what is left of a job. Run again after it has ended anywhere it does the rest; when all is done it checks.

    Raises Stopped; WrongUsage where the input is not that of the run before; OSError.
    """
    sizes: dict[int, int] = {}
    seen = 0

    def wanted() -> Iterator[dict[str, Any]]:
        nonlocal seen
        for unit in units:
            key = manifest.keys.get(unit.number)
            if key is not None and key != unit.key:
                raise other_input(manifest)
            seen += 1
            if key is not None:
                observer.was_done(unit)
                continue
            sizes[unit.number] = unit.size
            yield unit.as_dict()

    if manifest.is_finished:
        if next(wanted(), None) is not None:
            raise other_input(manifest)
    else:
        with closing(run_units(wanted(), plan, concurrency)) as rows:  # type: ignore[type-var]  # generators are closed
            for row in rows:
                if manifest.width and row["width"] not in (0, manifest.width):
                    raise Stopped(f"The vectors changed from {manifest.width} to {row['width']} components")
                manifest.commit(row)
                observer.committed(row, sizes.pop(row["unit"], 0))
    if len(manifest.keys) > seen:
        raise other_input(manifest)
    if missing := seen - len(manifest.keys):
        raise Stopped(f"{missing:,} units were not done, though nothing failed")
    sink.finish(manifest.parts[number] for number in range(seen))
    if not manifest.is_finished:
        manifest.finish(seen)


def other_input(manifest: Manifest) -> WrongUsage:
    """The input has changed, or the order of several."""
    return WrongUsage(
        f"The input is not that of the job in {manifest.file}."
        " Give the same input to continue, or --overwrite to start again."
    )
