"""What a run found, and what it was to reach."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from bench.rig.figures import Spread, Target, missed

GATE = 0.10  # how far off a target a shared machine may be before the run fails

ST, ST_TUNED, FASTEMBED, INFINITY = "sentence-transformers", "sentence-transformers, AVX-512", "FastEmbed", "Infinity"
EXACT, FAST, INT8, NODE = "exact", "fast", "int8", "exact, node over HTTP"

RATIOS: dict[tuple[str, str], dict[str, float]] = {
    (EXACT, ST): {"S": 2.8, "M": 2.4, "X": 3.0},
    (EXACT, ST_TUNED): {"S": 1.5, "M": 1.3, "X": 1.6},
    (EXACT, FASTEMBED): {"S": 1.2, "M": 1.4, "X": 5.0},
    (FAST, EXACT): {"S": 1.6, "M": 1.5, "X": 1.6},
    (INT8, FAST): {"S": 1.2, "M": 1.2, "X": 1.2},
    (NODE, EXACT): {"S": 0.92, "M": 0.92, "X": 0.92},
}
"""Speed of the first over the second, at least, by corpus."""

SHARES_OF_PEAK = {EXACT: ("f32", 0.75), FAST: ("bf16", 0.60)}  # on M
ADDED_MS_MAX = 0.7  # what the node's HTTP adds to one short text
P99_OVER_P50_MAX = 3.0
QUERY_BATCHES_MAX = 2.0  # p95 of a short query while a bulk job runs
START_S_MAX = 1.2


class ContenderRow(msgspec.Struct, frozen=True):
    """One contender. `cosine` is (smallest, mean) to the vectors of exact."""

    name: str
    version: str
    texts_per_s: dict[str, Spread]
    tokens_per_s: dict[str, Spread]
    single_p50_ms: float
    single_p99_ms: float
    start_s: float
    resident_mb: float
    cosine: tuple[float, float]


class NodeFigures(msgspec.Struct, frozen=True):
    """The node over its socket. Times of one short text in ms; `batch_ms` is a full batch in process."""

    query_p95_ms: float
    batch_ms: float
    starts_s: list[float]


class Figures(msgspec.Struct, frozen=True):
    """All of it. `left_out` says why by name; `peaks_gflops` is by precision, `texts` by corpus."""

    machine: str
    threads: int
    rounds: int
    texts: dict[str, int]
    tokens: dict[str, int]
    peaks_gflops: dict[str, float]
    rows: list[ContenderRow]
    node: NodeFigures | None
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """What fails the run."""
        return missed(self.targets)


Times = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds by contender and corpus, one a round."""


def flops(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """Floating-point operations for texts of these lengths in tokens, in a BERT of this config.json.

    A product of [m, k] and [k, n] is 2·m·k·n. A layer multiplies each token by four matrices of h·h (query, key, value,
    output) and two of h·i (feed-forward), and in attention each token with each other twice (scores, mixing), h wide:
    layers · (2·(4·h² + 2·h·i) + 4·tokens·h). Padding, softmax, GELU, normalisation and pooling are not counted.
    """
    h, i = config["hidden_size"], config["intermediate_size"]
    matrices = 2 * (4 * h * h + 2 * h * i)
    return float(config["num_hidden_layers"] * sum(tokens * (matrices + 4 * tokens * h) for tokens in lengths))


def targets(
    times: Times, rows: Sequence[ContenderRow], node: NodeFigures | None, m_flops: float, peaks: Mapping[str, float]
) -> list[Target]:
    """Every target. A ratio is taken round by round, so that what slows the machine down slows both.

    `m_flops` is what one pass of M costs.
    """
    found = []
    for (ours, theirs), bounds in RATIOS.items():
        for corpus, bound in bounds.items():
            ratio = _ratio(times, ours, theirs, corpus)
            found.append(Target(f"{ours} over {theirs}, {corpus}", bound, True, ratio, "x", GATE))
    for name, (precision, bound) in SHARES_OF_PEAK.items():
        share = None
        if name in times and precision in peaks:
            share = Spread.of([m_flops / seconds / 1e9 / peaks[precision] for seconds in times[name]["M"]])
        found.append(Target(f"{name}: share of the {precision} peak, M", bound, True, share, slack=GATE))
    return found + _node_targets({row.name: row for row in rows}, node)


def _node_targets(rows: Mapping[str, ContenderRow], node: NodeFigures | None) -> list[Target]:
    added = relative = query = start = None
    if NODE in rows and node is not None:
        row = rows[NODE]
        added = Spread.of([row.single_p50_ms - rows[EXACT].single_p50_ms])
        relative = Spread.of([row.single_p99_ms / row.single_p50_ms])
        query = Spread.of([node.query_p95_ms / node.batch_ms])
        start = Spread.of(node.starts_s)
    at_most: list[tuple[str, float, Spread | None, str]] = [
        ("p50 of one short text, above exact in process", ADDED_MS_MAX, added, " ms"),
        ("p99 over p50 of one short text", P99_OVER_P50_MAX, relative, "x"),
        ("p95 of a query while a bulk job runs, in batch times", QUERY_BATCHES_MAX, query, "x"),
        ("start of the process to first vector", START_S_MAX, start, " s"),
    ]
    return [Target(f"node: {what}", bound, False, found, unit, GATE) for what, bound, found, unit in at_most]


def _ratio(times: Times, ours: str, theirs: str, corpus: str) -> Spread | None:
    if ours not in times or theirs not in times:
        return None
    pairs = zip(times[ours][corpus], times[theirs][corpus], strict=True)
    return Spread.of([their_s / our_s for our_s, their_s in pairs])
