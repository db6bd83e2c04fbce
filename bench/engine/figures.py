"""What a run found, and what it was to reach."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

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

Verdict = Literal["reached", "within 10 %", "missed", "not measured"]


class Spread(msgspec.Struct, frozen=True):
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


class Row(msgspec.Struct, frozen=True):
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


class Target(msgspec.Struct, frozen=True):
    """A promise and what was found; None where a contender was left out."""

    what: str
    bound: float
    at_least: bool
    found: Spread | None
    unit: str = ""

    @property
    def verdict(self) -> Verdict:
        """How the median stands to the bound."""
        if self.found is None:
            return "not measured"
        short = self.bound / self.found.median if self.at_least else self.found.median / self.bound
        if short <= 1:
            return "reached"
        return "within 10 %" if short <= (1 / (1 - GATE) if self.at_least else 1 + GATE) else "missed"


class Figures(msgspec.Struct, frozen=True):
    """All of it. `left_out` says why by name; `peaks_gflops` is by precision, `texts` by corpus."""

    machine: str
    threads: int
    rounds: int
    texts: dict[str, int]
    tokens: dict[str, int]
    peaks_gflops: dict[str, float]
    rows: list[Row]
    node: NodeFigures | None
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def missed(self) -> list[Target]:
        """What fails the run."""
        return [target for target in self.targets if target.verdict == "missed"]


Times = Mapping[str, Mapping[str, Sequence[float]]]
"""Seconds by contender and corpus, one a round."""


def targets(
    times: Times, rows: Sequence[Row], node: NodeFigures | None, m_flops: float, peaks: Mapping[str, float]
) -> list[Target]:
    """Every target. A ratio is taken round by round, so that what slows the machine down slows both.

    `m_flops` is what one pass of M costs.
    """
    found = []
    for (ours, theirs), bounds in RATIOS.items():
        for corpus, bound in bounds.items():
            ratio = _ratio(times, ours, theirs, corpus)
            found.append(Target(f"{ours} over {theirs}, {corpus}", bound, True, ratio, "x"))
    for name, (precision, bound) in SHARES_OF_PEAK.items():
        share = None
        if name in times and precision in peaks:
            share = Spread.of([m_flops / seconds / 1e9 / peaks[precision] for seconds in times[name]["M"]])
        found.append(Target(f"{name}: share of the {precision} peak, M", bound, True, share))
    return found + _node_targets({row.name: row for row in rows}, node)


def _node_targets(rows: Mapping[str, Row], node: NodeFigures | None) -> list[Target]:
    added = relative = query = start = None
    if NODE in rows and node is not None:
        row = rows[NODE]
        added = _one(row.single_p50_ms - rows[EXACT].single_p50_ms)
        relative = _one(row.single_p99_ms / row.single_p50_ms)
        query = _one(node.query_p95_ms / node.batch_ms)
        start = Spread.of(node.starts_s)
    return [
        Target("node: p50 of one short text, above exact in process", ADDED_MS_MAX, False, added, " ms"),
        Target("node: p99 over p50 of one short text", P99_OVER_P50_MAX, False, relative, "x"),
        Target("node: p95 of a query while a bulk job runs, in batch times", QUERY_BATCHES_MAX, False, query, "x"),
        Target("node: start of the process to first vector", START_S_MAX, False, start, " s"),
    ]


def _one(value: float) -> Spread:
    return Spread(value, value, value)


def _ratio(times: Times, ours: str, theirs: str, corpus: str) -> Spread | None:
    if ours not in times or theirs not in times:
        return None
    pairs = zip(times[ours][corpus], times[theirs][corpus], strict=True)
    return Spread.of([their_s / our_s for our_s, their_s in pairs])
