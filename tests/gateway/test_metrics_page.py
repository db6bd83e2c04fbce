"""docs/reference/metrics.md is made from tables: `python -m tests.gateway.test_metrics_page`. Real pages agree.

Names follow Prometheus' conventions, and none stands for two things.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import ProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from embedmesh.engine.plan import Plan
from embedmesh.gateway.api.fleet_metrics import FLEET_COUNTERS, FLEET_GAUGES, NODES_MEASURED_MAX
from embedmesh.gateway.api.metrics import BUCKETS_S, GATEWAY_COUNTERS, GATEWAY_GAUGES, GATEWAY_HISTOGRAMS
from embedmesh.node.metrics import (
    NODE_COUNTERS,
    NODE_GAUGES,
    NODE_HISTOGRAMS,
    PICKER_GAUGES,
    SECONDS_BUCKETS,
    NodeMetrics,
)
from embedmesh.rules.metrics import MetricWords, words_and_labels

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "metrics.md"
NONE = "-"
UNITS = {
    "timestamp_seconds": "s since 1970",
    "tokens_per_second": "tokens/s",
    "seconds": "s",
    "bytes": "bytes",
    "nanousd": "nano-USD",
    "tokens": "tokens",
}
"""By a part of the name, the first that fits. What has none of them is counted by itself."""
HEAD = f"""# Metrics

All that processes of embedmesh show to Prometheus, made from the tables in the code. [How to
watch](../how-to/metrics.md), [what to do when an alert fires](../how-to/alerts.md).

A gateway answers `GET /metrics` for keys with the scope `metrics` or `admin`, a node on its `--monitor` port. Units are
base units; money is integers of nano-USD (1e-9 USD), as in the ledger. Counters only rise, also where a worker of a
gateway dies. Labels are words of closed lists: `route` is the path of a route as the API's description has it, `model`
an id of the catalogue, `code` one of the [errors](contract.md), `node` the id of an admitted node (the first
{NODES_MEASURED_MAX:,}).
"""


class MetricRow(NamedTuple):
    """One metric, by the name that Prometheus has."""

    name: str
    kind: str
    labels: tuple[str, ...]
    words: str

    @property
    def unit(self) -> str:
        return next((unit for part, unit in UNITS.items() if part in self.name), NONE)

    @property
    def line(self) -> str:
        labels = ", ".join(f"`{label}`" for label in self.labels) or NONE
        return f"| `{self.name}` | {self.kind} | {labels} | {self.unit} | {self.words.removesuffix('.')} |"


def of_table(kind: str, prefix: str, table: Mapping[str, MetricWords]) -> Iterator[MetricRow]:
    for name, said in table.items():
        words, labels = words_and_labels(said)
        yield MetricRow(f"{prefix}{name}{'_total' if kind == 'counter' else ''}", kind, labels, words)


GATEWAY = [
    *of_table("histogram", "embedmesh_", GATEWAY_HISTOGRAMS),
    *of_table("counter", "embedmesh_", GATEWAY_COUNTERS),
    *of_table("gauge", "embedmesh_", GATEWAY_GAUGES),
]
FLEET = [*of_table("counter", "embedmesh_", FLEET_COUNTERS), *of_table("gauge", "embedmesh_", FLEET_GAUGES)]
NODE = [
    *of_table("histogram", "embedmesh_node_", NODE_HISTOGRAMS),
    *of_table("counter", "embedmesh_node_", NODE_COUNTERS),
    *of_table("gauge", "embedmesh_node_", NODE_GAUGES),
    *of_table("gauge", "", PICKER_GAUGES),
]
PROCESS = [
    MetricRow(metric.name + ("_total" if metric.type == "counter" else ""), metric.type, (), metric.documentation)
    for metric in ProcessCollector(registry=None).collect()
]
PARTS = {
    "Gateway": ("", GATEWAY),
    "Gateway: its nodes": ("As each gateway sees them; another may see another.", FLEET),
    "Node": (
        "The last three are what the endpoint picker of Kubernetes' Gateway API inference extension reads, "
        "by the names of vLLM.",
        NODE,
    ),
    "Every process": (
        "From the operating system. With several workers a gateway shows sums, but for moments.",
        PROCESS,
    ),
}


def drawn() -> str:
    parts = [HEAD]
    for title, (words, rows) in PARTS.items():
        lines = [f"## {title}", "", *([words, ""] if words else [])]
        lines += ["| name | type | labels | unit | what it means |", "|---|---|---|---|---|"]
        parts.append("\n".join([*lines, *(row.line for row in sorted(rows))]) + "\n")
    bounds = " ".join(f"{bound:g}" for bound in BUCKETS_S)
    parts.append(
        f"## Buckets\n\nOf a histogram there are `_bucket`, `_sum` and `_count`. Bounds in seconds: {bounds}; "
        f"a node's end at {SECONDS_BUCKETS[-1]:g}.\n"
    )
    return "\n".join(parts)


def shown(page: str) -> set[tuple[str, str]]:
    """Name and type of each family on a page."""
    return {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in text_string_to_metric_families(page)
    }


def listed(*parts: list[MetricRow]) -> set[tuple[str, str]]:
    return {(row.name, row.kind) for part in parts for row in part}


def labelled(page: str) -> dict[str, set[str]]:
    """Labels of each family that has samples."""
    return {
        family.name + ("_total" if family.type == "counter" else ""): {
            label for sample in family.samples for label in sample.labels if label != "le"
        }
        for family in text_string_to_metric_families(page)
        if family.samples
    }


def test_the_page_is_made_from_the_tables() -> None:
    assert PAGE.read_text() == drawn(), "run `python -m tests.gateway.test_metrics_page`"


def test_a_name_stands_for_one_thing_and_follows_the_conventions() -> None:
    every = [*GATEWAY, *FLEET, *NODE]
    assert [name for name, times in Counter(row.name for row in every).items() if times > 1] == []
    for row in every:
        assert row.words and len(row.labels) <= 3
        assert row.name in PICKER_GAUGES or re.fullmatch(r"embedmesh_[a-z_]+", row.name)
        assert not re.search(
            r"_(total|count|sum|bucket|info|ms|us|kb|mb|milliseconds)\Z", row.name.removesuffix("_total")
        )
        assert row.kind != "histogram" or row.name.endswith("_seconds")


def test_a_node_shows_what_the_page_lists() -> None:
    metrics = NodeMetrics()
    metrics.answered("m", 1, 2, 0.1)
    metrics.batch("m", Plan(1, 8, [], bulk=False), 0.1)
    metrics.refused("m")
    metrics.started("m")
    metrics.state("m", waiting_tokens=0, ready=True, starved=False)
    metrics.calls(0, 0)
    page = metrics.text()[0].decode()
    assert shown(page) == listed(NODE, PROCESS)
    assert labelled(page) == {row.name: set(row.labels) for row in [*NODE, *PROCESS]}


if __name__ == "__main__":
    PAGE.write_text(drawn())
