"""A node's metrics for Prometheus, by model; confidential calls by outcome. Nothing of a caller is ever in a metric."""

from typing import Any, Literal, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from embedmesh.engine.plan import Plan

M = TypeVar("M", Counter, Gauge, Histogram)

SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)

PICKER_GAUGES = {  # what the endpoint picker of Kubernetes' Gateway API inference extension reads, named as vLLM does
    "vllm:num_requests_waiting": "Calls of which something waits for its batch, of all models",
    "vllm:num_requests_running": "Calls whose last batch runs, of all models",
    "vllm:kv_cache_usage_perc": "Always 0: models that embed keep no keys and values",
}

NOTED_MAX = 256  # until they are counted, which takes a millisecond


class NodeMetrics:
    """All metrics of one node, in a registry of their own."""

    def __init__(self) -> None:
        self._calls: list[tuple[str, int, int, float]] = []  # noted and not yet counted
        self._batches: list[tuple[str, int, float]] = []
        self._registry = CollectorRegistry()
        self._picker: dict[str, Gauge] = {}  # none at a sidecar, whose server has its own
        ProcessCollector(registry=self._registry)

        def metric(kind: type[M], name: str, words: str, **options: Any) -> M:
            return kind(f"embedmesh_node_{name}", words, ["model"], registry=self._registry, **options)

        self._texts = metric(Counter, "texts", "Texts embedded and answered")
        self._tokens = metric(Counter, "tokens", "Tokens embedded and answered, special tokens included")
        self._refused = metric(Counter, "refused", "Calls refused because the queue was full")
        self._starts = metric(Counter, "engine_starts", "Starts of the engine process; more than one means it failed")
        self._padded = metric(Counter, "padded_tokens", "Tokens computed, padding included")
        self._call_seconds = metric(
            Histogram, "call_seconds", "From a call's body to its answer", buckets=SECONDS_BUCKETS
        )
        self._batch_seconds = metric(
            Histogram, "batch_seconds", "One forward pass, as the node sees it", buckets=SECONDS_BUCKETS
        )
        self._waiting = metric(Gauge, "queue_tokens", "Padded tokens that wait for their batch")
        self._ready = metric(Gauge, "ready", "1 while the model embedded something within the last two seconds")
        self._starved = metric(Gauge, "starved", "1 while the model's engine could run and gets too little CPU")
        self._confidential = Counter(
            "embedmesh_node_confidential_calls",
            "Confidential calls that were answered, or refused for what they are",
            ["outcome"],
            registry=self._registry,
        )
        self.confidential("answered", 0)
        self.confidential("refused", 0)
        self._internal_errors = Counter(
            "embedmesh_node_internal_errors", "Requests that ended in a bug of ours", registry=self._registry
        )

    def answered(self, model: str, texts: int, tokens: int, seconds: float) -> None:
        """A call got its vectors."""
        self._calls.append((model, texts, tokens, seconds))
        if len(self._calls) >= NOTED_MAX:
            self._count()

    def refused(self, model: str) -> None:
        """A call found the queue full."""
        self._refused.labels(model).inc()

    def confidential(self, outcome: Literal["answered", "refused"], calls: int = 1) -> None:
        """Confidential calls have their answers."""
        self._confidential.labels(outcome).inc(calls)

    def started(self, model: str) -> None:
        self._starts.labels(model).inc()

    def batch(self, model: str, plan: Plan, seconds: float) -> None:
        self._batches.append((model, plan.rows * plan.length, seconds))
        if len(self._batches) >= NOTED_MAX:
            self._count()

    def internal_error(self) -> None:
        self._internal_errors.inc()

    def state(self, model: str, *, waiting_tokens: int, ready: bool, starved: bool) -> None:
        """The state of a model now, set just before the page is written."""
        self._waiting.labels(model).set(waiting_tokens)
        self._ready.labels(model).set(int(ready))
        self._starved.labels(model).set(int(starved))

    def calls(self, waiting: int, running: int) -> None:
        """The calls of all models now, set just before the page is written."""
        for (name, words), value in zip(PICKER_GAUGES.items(), (waiting, running, 0), strict=True):
            if name not in self._picker:
                self._picker[name] = Gauge(name, words, registry=self._registry)
            self._picker[name].set(value)

    def forget(self, model: str) -> None:
        """A model is no longer served; its counts stay, as counts do."""
        for gauge in (self._waiting, self._ready, self._starved):
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
            self._texts.labels(model).inc(texts)
            self._tokens.labels(model).inc(tokens)
            self._call_seconds.labels(model).observe(seconds)
        batches, self._batches = self._batches, []
        for model, padded, seconds in batches:
            self._padded.labels(model).inc(padded)
            self._batch_seconds.labels(model).observe(seconds)
