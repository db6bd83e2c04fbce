"""Traces of a node: what it does for a request that its gateway traces. Nobody else's `traceparent` is read."""

import time
from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from embedmesh.engine.batch_queue import OnEnd
from embedmesh.engine.served import Served
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.traces import Tracing

GATEWAYS = "gateways"  # whose requests share the rate


class NodeTraces:
    """Two steps of a call: waiting for its batch, and that. A call of several batches waits for its last."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def around(self, on_end: OnEnd, traceparent: str, began: float, served: Served, tokens: int) -> OnEnd:
        """What is to be told of the end of a call that a gateway has sent with a `traceparent`: `on_end`, and more.

        A call that is dropped has no span here: its gateway knows why.
        """
        tracing = self._tracing
        trace = tracing.begin(traceparent, GATEWAYS, began)
        if trace is None:
            return on_end

        def ended(outcome: list[bytes] | NodeFailure) -> None:
            on_end(outcome)
            now, model = time.monotonic(), served.model.id
            does = served.model.modalities[0]  # `embeddings` or `rerank`, as its gateway says
            trace.name = f"{does} {model}"
            trace.tell({"gen_ai.operation.name": does, "gen_ai.request.model": model})
            if isinstance(outcome, NodeFailure):
                tracing.end(trace, now, outcome.check.value)
                return
            trace.tell({"gen_ai.usage.input_tokens": tokens, "embedmesh.inputs": len(outcome)})
            batch_began = max(began, served.batch_began)
            trace.mark("queue", began, batch_began)
            trace.mark("batch", batch_began, now)
            tracing.end(trace, now)

        return ended


class TraceCounts(Collector):
    """What became of traces, for Prometheus."""

    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def collect(self) -> Iterable[Metric]:
        tracing = self._tracing
        yield CounterMetricFamily(
            "embedmesh_node_traces_sent", "Traces that the collector has taken", value=tracing.sink.sent
        )
        yield CounterMetricFamily(
            "embedmesh_node_traces_dropped",
            "Traces that were made in vain: the collector was away, slow, or refused them",
            value=tracing.sink.dropped,
        )
        yield CounterMetricFamily(
            "embedmesh_node_traces_over_rate",
            "Calls that were not traced, as too many were within a second",
            value=tracing.over_rate,
        )
