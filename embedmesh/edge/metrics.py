"""What a gateway counts about itself, for Prometheus. Numbers and fixed labels only: never a text, a key or an id."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry a process. `gauges` gives current values by name when Prometheus asks.

    What is counted for every request is kept as plain numbers: the library's own counters cost four times as much.
    """

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self._requests: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._nanousd: dict[str, int] = {}
        self._times = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0
        self.registry.register(_Collected(self._collect))
        self.internal_errors = Counter("embedmesh_internal_errors", "Bugs of ours. Stays at 0.", registry=self.registry)
        self.registry.register(_Collected(lambda: _as_gauges(gauges())))

    def ended(self, code: str) -> None:
        """An embedding request ended: `ok`, `broken_off`, `dropped`, or the code of its failure."""
        self._requests[code] = self._requests.get(code, 0) + 1

    def delivered(self, model: str, tokens: int, nanousd: int, seconds: float) -> None:
        """A reply was delivered, at least in part, and charged, so many seconds after its request's head."""
        self._tokens[model] = self._tokens.get(model, 0) + tokens
        self._nanousd[model] = self._nanousd.get(model, 0) + nanousd
        self._times[bisect_left(BUCKETS_S, seconds)] += 1
        self._seconds += seconds

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _collect(self) -> Iterator[Metric]:
        yield _by_label("requests", "Embedding requests by outcome.", "code", self._requests)
        yield _by_label("tokens", "Tokens embedded and charged.", "model", self._tokens)
        yield _by_label("charged_nanousd", "Nano-USD charged.", "model", self._nanousd)
        bounds = [*map(str, map(float, BUCKETS_S)), "+Inf"]
        yield HistogramMetricFamily(
            "embedmesh_request_seconds",
            "Seconds from head to delivery.",
            buckets=list(zip(bounds, accumulate(self._times), strict=True)),
            sum_value=self._seconds,
        )


class _Collected(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def _by_label(name: str, words: str, label: str, values: dict[str, int]) -> Metric:
    family = CounterMetricFamily(f"embedmesh_{name}", words, labels=[label])
    for value, count in values.items():
        family.add_metric([value], count)
    return family


def _as_gauges(values: dict[str, float]) -> Iterator[Metric]:
    for name, value in values.items():
        yield GaugeMetricFamily(f"embedmesh_{name}", name.replace("_", " "), value=value)
