"""What a gateway counts about itself, for Prometheus. Numbers and fixed labels only: never a text, a key or an id."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """One registry a process. `gauges` gives current values by name when Prometheus asks."""

    def __init__(self, gauges: Callable[[], dict[str, float]]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "embedmesh_requests", "Embedding requests by outcome.", ["code"], registry=self.registry
        )
        self.seconds = Histogram(
            "embedmesh_request_seconds", "Seconds from head to delivery.", buckets=BUCKETS_S, registry=self.registry
        )
        self.tokens = Counter("embedmesh_tokens", "Tokens embedded and charged.", ["model"], registry=self.registry)
        self.nanousd = Counter("embedmesh_charged_nanousd", "Nano-USD charged.", ["model"], registry=self.registry)
        self.internal_errors = Counter("embedmesh_internal_errors", "Bugs of ours. Stays at 0.", registry=self.registry)
        self.registry.register(_Gauges(gauges))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, read: Callable[[], dict[str, float]]) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        for name, value in self._read().items():
            yield GaugeMetricFamily(f"embedmesh_{name}", name.replace("_", " "), value=value)
