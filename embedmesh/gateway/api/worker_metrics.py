"""One page of metrics for several gateway processes that share a port: the page of each is the sum over all.

Each worker keeps a file of its numbers in one folder. A worker that replaces a dead one continues its counters, so that
no counter falls: Prometheus would take that for a restart, and count everything again. Of nodes that have left it
continues none.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger("embedmesh.metrics")

WRITE_EVERY_S = 2.0  # another worker's numbers may be that old; writing a page takes a millisecond
SUMMED = frozenset({"counter", "histogram"})  # types whose values only rise
# Of other gauges the page has the largest: a node's state and speed, a moment, a bound.
SUMMED_GAUGES = frozenset(
    {
        "embedmesh_batches_under_way",
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


class _WorkerSample(msgspec.Struct, array_like=True):
    """A sample; its labels are sorted by name."""

    name: str
    labels: tuple[tuple[str, str], ...]
    value: float


_WorkerPage = dict[str, list[_WorkerSample]]  # by the name of the metric


class WorkerMetrics:
    """`file` is this worker's. The others' files are in the same folder, which the supervisor emptied at start."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before = _read(file)

    def summed(self, registry: CollectorRegistry) -> Collector:
        """The sum over the registries of all workers."""
        ours = self._write(registry)
        others = [_read(file) for file in sorted(self._file.parent.glob("*.json")) if file != self._file]
        return Collected(lambda: [_with(metric, others) for metric in ours])

    async def keep(self, registry: CollectorRegistry) -> None:
        """Keep this worker's file up to date. Runs until cancelled."""
        while True:
            self._write(registry)
            await asyncio.sleep(WRITE_EVERY_S)

    def _write(self, registry: CollectorRegistry) -> list[Metric]:
        found = list(registry.collect())
        nodes = {one.labels.get("node") for metric in found for one in metric.samples}
        before = {
            name: [one for one in page if dict(one.labels).get("node") in nodes] for name, page in self._before.items()
        }
        metrics = [_with(metric, [before], rising_only=True) for metric in found]
        page = {
            metric.name: [
                _WorkerSample(one.name, tuple(sorted(one.labels.items())), float(one.value))  # a bool is not read again
                for one in metric.samples
            ]
            for metric in metrics
        }
        new = self._file.with_suffix(".new")
        try:
            new.write_bytes(msgspec.json.encode(page))
            new.replace(self._file)
        except OSError as error:  # a full disk must not fail requests
            log.warning("the metrics of this worker cannot be kept (%s)", error.strerror)
        return metrics


class Collected(Collector):
    """The metrics that a function returns at each scrape."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def _with(metric: Metric, pages: Iterable[_WorkerPage], *, rising_only: bool = False) -> Metric:
    """A metric over several pages: the sum, or for most gauges the largest value."""
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


def _read(file: Path) -> _WorkerPage:
    """A worker's page; empty if there is none yet, or it cannot be read."""
    with contextlib.suppress(OSError, msgspec.DecodeError):
        return msgspec.json.decode(file.read_bytes(), type=_WorkerPage)
    return {}
