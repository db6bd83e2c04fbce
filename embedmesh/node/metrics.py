"""A node's metrics for Prometheus, by model; confidential calls by outcome. Nothing of a caller is ever in a metric."""

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from embedmesh.engine.plan import Plan
from embedmesh.rules.metrics import MetricWords, words_and_labels

M = TypeVar("M", Counter, Gauge, Histogram)

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

# A model is one of those that the node serves: by the catalogue, never by what a caller writes.
NODE_COUNTERS: dict[str, MetricWords] = {
    "texts": ("Texts embedded and answered", "model"),
    "tokens": ("Tokens embedded and answered, special tokens included", "model"),
    "refused": ("Calls refused because the queue was full", "model"),
    "engine_starts": ("Starts of the engine process; more than one means it failed", "model"),
    "padded_tokens": ("Tokens computed, padding included", "model"),
    "confidential_calls": ("Confidential calls that were answered, or refused for what they are", "outcome"),
    "internal_errors": "Requests that ended in a bug of ours",
}
NODE_HISTOGRAMS: dict[str, MetricWords] = {
    "call_seconds": ("From a call's body to its answer", "model"),
    "batch_seconds": ("One forward pass, as the node sees it", "model"),
}
NODE_GAUGES: dict[str, MetricWords] = {
    "queue_tokens": ("Padded tokens that wait for their batch", "model"),
    "ready": ("1 while the model embedded something within the last two seconds", "model"),
    "starved": ("1 while the model's engine could run and gets too little CPU", "model"),
}
PICKER_GAUGES = {  # what the endpoint picker of Kubernetes' Gateway API inference extension reads, named as vLLM does
    "vllm:num_requests_waiting": "Calls of which something waits for its batch, of all models",
    "vllm:num_requests_running": "Calls whose last batch runs, of all models",
    "vllm:kv_cache_usage_perc": "Always 0: models that embed keep no keys and values",
}

NOTED_MAX = 256  # until they are counted, which takes a millisecond


class NodeMetrics:
    """All metrics of one node, in a registry of their own."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # or each counter and histogram has a gauge beside it
        self._calls: list[tuple[str, int, int, float]] = []  # noted and not yet counted
        self._batches: list[tuple[str, int, float]] = []
        self._registry = CollectorRegistry()
        self._picker: dict[str, Gauge] = {}  # none at a sidecar, whose server has its own
        ProcessCollector(registry=self._registry)

        def made(kind: type[M], table: Mapping[str, MetricWords], **options: Any) -> dict[str, M]:
            every = {name: words_and_labels(said) for name, said in table.items()}
            registry = self._registry
            return {
                name: kind(f"embedmesh_node_{name}", words, labels, registry=registry, **options)
                for name, (words, labels) in every.items()
            }

        self._counters = made(Counter, NODE_COUNTERS)
        self._histograms = made(Histogram, NODE_HISTOGRAMS, buckets=SECONDS_BUCKETS)
        self._gauges = made(Gauge, NODE_GAUGES)
        self.confidential("answered", 0)
        self.confidential("refused", 0)

    def answered(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """A call got its vectors."""
        self._calls.append((model, texts, tokens, seconds))
        if len(self._calls) >= NOTED_MAX:
            self._count()

    def refused(self, model: str) -> None:
        """A call found the queue full."""
        self._counters["refused"].labels(model).inc()

    def confidential(self, outcome: Literal["answered", "refused"], calls: int = 1) -> None:
        """Confidential calls have their answers."""
        self._counters["confidential_calls"].labels(outcome).inc(calls)

    def started(self, model: str) -> None:
        self._counters["engine_starts"].labels(model).inc()

    def batch(self, model: str, plan: Plan, seconds: float) -> None:
        self._batches.append((model, plan.rows * plan.length, seconds))
        if len(self._batches) >= NOTED_MAX:
            self._count()

    def internal_error(self) -> None:
        self._counters["internal_errors"].inc()

    def state(self, model: str, *, waiting_tokens: int, ready: bool, starved: bool) -> None:
        """The state of a model now, set just before the page is written."""
        now = {"queue_tokens": waiting_tokens, "ready": int(ready), "starved": int(starved)}
        for name, value in now.items():
            self._gauges[name].labels(model).set(value)

    def calls(self, waiting: int, running: int) -> None:
        """The calls of all models now, set just before the page is written."""
        for (name, words), value in zip(PICKER_GAUGES.items(), (waiting, running, 0), strict=True):
            if name not in self._picker:
                self._picker[name] = Gauge(name, words, registry=self._registry)
            self._picker[name].set(value)

    def forget(self, model: str) -> None:
        """A model is no longer served; its counts stay, as counts do."""
        for gauge in self._gauges.values():
            gauge.remove_by_labels({"model": model})

    def add(self, collector: Collector) -> None:
        """Show what it collects, too."""
        self._registry.register(collector)

    def text(self) -> tuple[bytes, str]:
        self._count()
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def _count(self) -> None:
        """Add what was noted: many at once cost a fifth of what they cost one by one."""
        calls, self._calls = self._calls, []
        for model, texts, tokens, seconds in calls:
            self._counters["texts"].labels(model).inc(texts)
            self._counters["tokens"].labels(model).inc(tokens)
            self._histograms["call_seconds"].labels(model).observe(seconds)
        batches, self._batches = self._batches, []
        for model, padded, seconds in batches:
            self._counters["padded_tokens"].labels(model).inc(padded)
            self._histograms["batch_seconds"].labels(model).observe(seconds)
