"""One page of metrics for several gateway processes that share a port: the page of each is the sum over all.

Each worker keeps a file of its numbers in one folder. A worker that replaces a dead one continues its counters, so that
no counter falls: Prometheus would take that for a restart, and count everything again. Of nodes that have left it
continues none.

All of it runs in a thread: a hundred models in three routes have 23,000 series, and those take half a second of CPU.
That thread lets the event loop take its turn after every few series.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

log = logging.getLogger("embedmesh.metrics")

SERIES_IN_TURN = 100  # a millisecond at most: as long as a request may wait for this thread
SAMPLES_IN_LINE = 500  # of a worker's file: one line takes half a millisecond, which nobody can interrupt
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


T = TypeVar("T")


def in_turns(items: Iterable[T], series: int = 1) -> Iterator[T]:
    """All of them; after every SERIES_IN_TURN other threads that wait, as the event loop's, have their turn first.

    `series`: how many each item has.
    """
    every = max(1, SERIES_IN_TURN // series)
    for number, item in enumerate(items, 1):
        if number % every == 0:
            time.sleep(0)  # noqa: TID251 - in a thread of its own
        yield item


class InTurns(list[T]):
    """A list that is gone through as by `in_turns`."""

    def __iter__(self) -> Iterator[T]:
        return in_turns(super().__iter__())


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
        ours = self.write(registry)
        others = [_read(file) for file in sorted(self._file.parent.glob("*.json")) if file != self._file]
        return Collected(lambda: [_with(metric, others) for metric in ours])

    def write(self, registry: CollectorRegistry) -> list[Metric]:
        """Bring this worker's file up to date; what is in it. Never in two threads at one time."""
        found = list(registry.collect())
        nodes = {one.labels.get("node") for metric in found for one in in_turns(metric.samples)}
        before = {
            name: [one for one in in_turns(page) if dict(one.labels).get("node") in nodes]
            for name, page in self._before.items()
        }
        metrics = [_with(metric, [before], rising_only=True) for metric in found]
        new = self._file.with_suffix(".new")
        try:
            with new.open("wb") as file:
                for metric in metrics:
                    samples = [
                        _WorkerSample(one.name, tuple(sorted(one.labels.items())), float(one.value))
                        for one in in_turns(metric.samples)  # a bool would not be read again
                    ]
                    for at in in_turns(range(0, len(samples), SAMPLES_IN_LINE), SAMPLES_IN_LINE):
                        some = samples[at : at + SAMPLES_IN_LINE]
                        file.write(msgspec.json.encode((metric.name, some)) + b"\n")
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
        for one in in_turns(metric.samples)
        if not one.name.endswith("_created")  # a moment among counts: not to be added
    }
    for page in pages:
        for saved in in_turns(page.get(metric.name, ())):
            key = saved.name, saved.labels
            known = values.get(key)
            values[key] = saved.value if known is None else known + saved.value if summed else max(known, saved.value)
    whole = Metric(metric.name, metric.documentation, metric.type)
    for (name, labels), value in in_turns(values.items()):
        whole.add_sample(name, dict(labels), value)
    return whole


def _read(file: Path) -> _WorkerPage:
    """A worker's page; empty if there is none yet, or it cannot be read."""
    page: _WorkerPage = {}
    with contextlib.suppress(OSError, msgspec.DecodeError), file.open("rb") as lines:
        for line in in_turns(lines, SAMPLES_IN_LINE):
            name, samples = msgspec.json.decode(line, type=tuple[str, list[_WorkerSample]])
            page.setdefault(name, []).extend(samples)
        return page
    return {}
