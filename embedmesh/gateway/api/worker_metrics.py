"""One page of metrics for several gateway processes that share a port: whichever is scraped tells the sum of all.

Each worker keeps a file of its numbers in one folder. A worker that takes the place of one that died goes on from that
one's counters, so that no counter falls: Prometheus would take that for a restart, and count all again.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger("embedmesh.metrics")

WRITE_EVERY_S = 2.0  # as old as another worker's numbers may be; a page takes a millisecond to write
SUMMED = frozenset({"counter", "histogram"})  # types of metrics whose values only rise
# Of other gauges the largest is told: a node's state and speed, a moment, a bound.
SUMMED_GAUGES = frozenset(
    {
        "embedmesh_in_flight",
        "embedmesh_reply_bytes",
        "embedmesh_tokens_outstanding",
        "embedmesh_tokens_waiting",
        "embedmesh_cache_bytes",
        "embedmesh_node_tokens_outstanding",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }
)


class _Saved(msgspec.Struct, array_like=True):
    """One sample: its name, its labels in order of their names, its value."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


_Page = dict[str, list[_Saved]]  # by the name of the metric


class WorkerMetrics:
    """`file` is this worker's; the others' are beside it, in a folder that their supervisor has emptied."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = _read(file)

    def summed(self, registry: CollectorRegistry) -> Collector:
        """What the registries of all workers hold now, as one."""
        ours = [_with(metric, [self._before], rising_only=True) for metric in registry.collect()]
        self._write(ours)
        others = [_read(file) for file in sorted(self._file.parent.glob("*.json")) if file != self._file]
        return _Metrics([_with(metric, others) for metric in ours])

    async def keep(self, registry: CollectorRegistry) -> None:
        """Write this worker's numbers again and again, for the others. Runs until cancelled."""
        while True:
            self._write([_with(metric, [self._before], rising_only=True) for metric in registry.collect()])
            await asyncio.sleep(WRITE_EVERY_S)

    def _write(self, metrics: Iterable[Metric]) -> None:
        page = {
            metric.name: [_Saved(one.name, tuple(sorted(one.labels.items())), one.value) for one in metric.samples]
            for metric in metrics
        }
        new = self._file.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.encode(page))
            new.replace(self._file)
        except OSError as error:  # a full disk costs the others' view of this worker, and no request
            log.warning("the metrics of this worker cannot be kept (%s)", error.strerror)


class _Metrics(Collector):
    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _with(metric: Metric, pages: Iterable[_Page], *, rising_only: bool = False) -> Metric:
    """A metric with what other pages say of it: added where it is summed, else the largest value."""
    summed = metric.type in SUMMED or metric.name in SUMMED_GAUGES
    if rising_only and metric.type not in SUMMED:
        return metric
    values = {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for one in metric.samples
        if not one.name.endswith("_created")  # a moment among counts: not to be added
    }
    for page in pages:
        for saved in page.get(metric.name, ()):
            key = saved.name, saved.labels
            known = values.get(key)
            values[key] = saved.value if known is None else known + saved.value if summed else max(known, saved.value)
    whole = Metric(metric.name, metric.documentation, metric.type)
    for (name, labels), value in values.items():
        whole.add_sample(name, dict(labels), value)
    return whole


def _read(file: Path) -> _Page:
    """A worker's page; empty where there is none yet, or nobody can read it."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(file.read_bytes(), type=_Page)
    return {}
