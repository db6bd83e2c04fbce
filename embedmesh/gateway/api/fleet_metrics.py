"""A gateway's metrics of its nodes for Prometheus. Labels are node ids and words of our own."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from embedmesh.fleet.registry import Node, Registry
from embedmesh.rules.nodes import NodeState

NODES_MEASURED_MAX = 1_000  # each has some two dozen series
NODE_COUNTERS = {
    "answers": "Parts answered correctly",
    "tokens": "Tokens of parts answered correctly",
    "hedges": "Parts answered after a hedge",
    "sealed_answers": "Confidential requests answered",
    "sealed_tokens": "Tokens that the node has counted and signed of confidential requests",
    "sealed_bytes": "Bytes of those requests as sealed; a node that counts too much has more tokens for them",
}
NODE_RESULTS = {"canaries": "Canaries by result", "receipts": "Receipts checked by result"}


class FleetCollector(Collector):
    """Reads the registry at each scrape."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        nodes = list(self._registry)[:NODES_MEASURED_MAX]
        yield from _gauges(nodes)
        for name, words in NODE_COUNTERS.items():
            family = CounterMetricFamily(f"embedmesh_node_{name}", words, labels=["node"])
            for node in nodes:
                family.add_metric([node.node_id], node.counts[name])
            yield family
        for name, words in NODE_RESULTS.items():
            family = CounterMetricFamily(f"embedmesh_node_{name}", words, labels=["node", "result"])
            for node in nodes:
                for key, count in _named(node, f"{name}_"):
                    family.add_metric([node.node_id, key], count)
            yield family
        yield from _checks(nodes)


def _checks(nodes: list[Node]) -> Iterator[Metric]:
    """Failures by check, from the closed list `Check`."""
    labels = ["node", "check"]
    words = "Failed attempts and probes by the check that failed; `busy` is load, not failure"
    failed = CounterMetricFamily("embedmesh_node_failures", words, labels=labels)
    ejected = CounterMetricFamily("embedmesh_node_ejections", "Ejections by the check that failed last", labels=labels)
    words = "Quarantines by the check that failed last"
    quarantined = CounterMetricFamily("embedmesh_node_quarantines", words, labels=labels)
    sent_away = {NodeState.EJECTED: ejected, NodeState.QUARANTINED: quarantined}
    for node in nodes:
        for check, count in node.failed.items():
            failed.add_metric([node.node_id, check.value], count)
        for (state, check), count in node.sent_away.items():
            sent_away[state].add_metric([node.node_id, check.value], count)
    yield from (failed, ejected, quarantined)


def _gauges(nodes: list[Node]) -> Iterator[Metric]:
    state = GaugeMetricFamily("embedmesh_node_state", "1 for the state that the node is in", labels=["node", "state"])
    tokens = GaugeMetricFamily("embedmesh_node_tokens_outstanding", "Tokens sent and not answered", labels=["node"])
    speed = GaugeMetricFamily("embedmesh_node_tokens_per_second", "Measured speed", labels=["node"])
    for node in nodes:
        for each in NodeState:
            state.add_metric([node.node_id, each.value], float(node.state is each))
        tokens.add_metric([node.node_id], node.load.tokens)
        if node.load.measured:
            speed.add_metric([node.node_id], node.load.tokens_per_s)
    yield from (state, tokens, speed)


def _named(node: Node, prefix: str) -> Iterator[tuple[str, int]]:
    for key, count in node.counts.items():
        if key.startswith(prefix):
            yield key.removeprefix(prefix), count
