"""A gateway's metrics of its nodes for Prometheus. Labels are ids of admitted nodes and words of closed lists."""

from collections.abc import Iterable

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from embedmesh.fleet.registry import Node, Registry
from embedmesh.gateway.api.metrics import families
from embedmesh.gateway.api.worker_metrics import in_turns
from embedmesh.rules.metrics import MetricReadings, MetricWords
from embedmesh.rules.nodes import NodeState

NODES_MEASURED_MAX = 1_000  # each has some two dozen series; a node that has left has none
FLEET_COUNTERS: dict[str, MetricWords] = {
    "node_answers": ("Parts answered correctly", "node"),
    "node_answer_tokens": ("Tokens of parts answered correctly", "node"),
    "node_hedges": ("Parts answered after a hedge", "node"),
    "node_sealed_answers": ("Confidential requests answered", "node"),
    "node_sealed_tokens": ("Tokens that the node has counted and signed of confidential requests", "node"),
    "node_sealed_bytes": (
        "Bytes of those requests as sealed; a node that counts too much has more tokens for them",
        "node",
    ),
    "node_canaries": ("Canaries by result", "node", "result"),
    "node_receipts": ("Receipts checked by result", "node", "result"),
    "node_failures": (
        "Failed attempts and probes by the check that failed; `busy` is load, not failure",
        "node",
        "check",
    ),
    "node_ejections": ("Ejections by the check that failed last", "node", "check"),
    "node_quarantines": ("Quarantines by the check that failed last", "node", "check"),
}
FLEET_GAUGES: dict[str, MetricWords] = {
    "node_state": ("1 for the state that the node is in", "node", "state"),
    "node_tokens_outstanding": ("Tokens sent and not answered", "node"),
    "node_tokens_per_second": ("Measured speed", "node"),
}
COUNTED = {
    "node_answers": "answers",
    "node_answer_tokens": "tokens",
    "node_hedges": "hedges",
    "node_sealed_answers": "sealed_answers",
    "node_sealed_tokens": "sealed_tokens",
    "node_sealed_bytes": "sealed_bytes",
}
"""Of these counters, the names in `Node.counts`."""


class FleetCollector(Collector):
    """Reads the registry at each scrape, in the thread that makes the page."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def collect(self) -> Iterable[Metric]:
        nodes = {node.node_id: node for node in list(self._registry)[:NODES_MEASURED_MAX]}
        return families(_readings(nodes), FLEET_COUNTERS, FLEET_GAUGES)


def _readings(nodes: dict[str, Node]) -> MetricReadings:
    def sent_away(state: NodeState) -> dict[tuple[str, ...], float]:
        return {
            (name, check.value): count
            for name, node in in_turns(nodes.items())
            for (where, check), count in list(node.sent_away.items())
            if where is state
        }

    return {
        "node_state": {
            (name, state.value): float(node.state is state)
            for name, node in in_turns(nodes.items())
            for state in NodeState
        },
        "node_tokens_outstanding": {(name,): node.load.tokens for name, node in in_turns(nodes.items())},
        "node_tokens_per_second": {
            (name,): node.load.tokens_per_s for name, node in in_turns(nodes.items()) if node.load.measured
        },
        **{key: {(name,): node.counts[of] for name, node in in_turns(nodes.items())} for key, of in COUNTED.items()},
        "node_canaries": _by_result(nodes, "canaries_"),
        "node_receipts": _by_result(nodes, "receipts_"),
        "node_failures": {
            (name, check.value): count
            for name, node in in_turns(nodes.items())
            for check, count in list(node.failed.items())
        },
        "node_ejections": sent_away(NodeState.EJECTED),
        "node_quarantines": sent_away(NodeState.QUARANTINED),
    }


def _by_result(nodes: dict[str, Node], prefix: str) -> dict[tuple[str, ...], float]:
    return {
        (name, key.removeprefix(prefix)): count
        for name, node in in_turns(nodes.items())
        for key, count in list(node.counts.items())
        if key.startswith(prefix)
    }
