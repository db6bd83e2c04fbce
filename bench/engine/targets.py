"""What the engine is to reach, by kind of CPU. One table; nothing is left out of it because it looks bad."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from bench.engine.figures import (
    EXACT,
    FAST,
    INT8,
    NODE,
    ONE,
    ContenderRow,
    Differences,
    Kind,
    LargeFigures,
    NodeFigures,
    Ratio,
)
from bench.rig.figures import Spread, Target


class Bound(NamedTuple):
    """What must be reached, and what is aimed at."""

    gate: float
    aim: float | None = None


OVER_BEST_PEER: dict[Kind, dict[str, Bound]] = {
    "AVX2": {
        "S": Bound(1.05, 1.2),
        "M": Bound(1.0, 1.15),
        "L": Bound(0.95, 1.1),
        "512": Bound(0.95, 1.1),
        "X": Bound(1.5, 1.8),
        ONE: Bound(1.0, 1.3),
    },
    "AVX-512": {  # the aims are what was measured in November 2026
        "S": Bound(1.2, 1.36),
        "M": Bound(1.2, 1.39),
        "L": Bound(1.2, 1.26),
        "512": Bound(1.2),
        "X": Bound(1.2, 1.51),
        ONE: Bound(1.2),
    },
    "other": {},
}
"""Speed of exact over the best peer of the row, at least."""

OVER_OURS: dict[tuple[str, str], dict[str, Bound]] = {
    (NODE, EXACT): dict.fromkeys("SMX", Bound(0.95, 1.0)),
    (FAST, EXACT): {"S": Bound(1.6), "M": Bound(1.5), "X": Bound(1.6)},
    (INT8, FAST): dict.fromkeys("SMX", Bound(1.2)),
}
"""Speed of the first over the second, at least, where the CPU has both. The node gets 64 texts a call."""

SHARES_OF_PEAK: dict[Kind, dict[str, Bound]] = {
    "AVX2": {},
    "AVX-512": {EXACT: Bound(0.75), FAST: Bound(0.60)},
    "other": {},
}
"""Of what the cores' registers do at most, on M, at least."""

ADDED_MS = Bound(0.7, 0.4)  # what the node over its socket adds to one short text, above the engine's process
P99_OVER_P50_MAX = 3.0
QUERY_BATCHES_MAX = 2.0  # p95 of a short query while a bulk job runs
START_S_MAX = 1.2
TRANSFORMERS_DIFFERENCE_MAX = 1e-5
ALONE_DIFFERENCE_MAX = 1e-6
LARGE_RATIO = Bound(1.0, 1.25)  # exact over sentence-transformers, as it comes or with its fast path forced
LARGE_MEMORY = Bound(1.25, 1.1)  # peak over its weights in float32
LARGE_LOAD_S = Bound(4.0)  # to the first vector, beyond reading the file


def targets(
    kind: Kind,
    ratios: Sequence[Ratio],
    rows: Sequence[ContenderRow],
    node: NodeFigures | None,
    differences: Differences | None,
    large: LargeFigures | None,
) -> list[Target]:
    """Every target, measured or not."""
    by_pair = {(ratio.row, ratio.ours, ratio.theirs): ratio for ratio in ratios}
    best = {ratio.row: ratio for ratio in ratios if ratio.ours == EXACT}
    found = [_over(best.get(row), f"{row}: exact over its best peer", it) for row, it in OVER_BEST_PEER[kind].items()]
    for (ours, theirs), bounds in OVER_OURS.items():
        if any(ratio.ours == ours for ratio in ratios) or ours == NODE:
            found += [
                _over(by_pair.get((row, ours, theirs)), f"{row}: {ours} over {theirs}", bound)
                for row, bound in bounds.items()
            ]
    by_name = {row.name: row for row in rows}
    for name, bound in SHARES_OF_PEAK[kind].items():
        share = by_name[name].share_of_peak.get("M") if name in by_name else None
        found.append(_at_least(f"{name}: share of the peak of the cores, M", bound, share))
    return [*found, *_node_targets(node), *_differences(differences), *_large_targets(large)]


def _over(ratio: Ratio | None, unmeasured: str, bound: Bound) -> Target:
    if ratio is None:
        return _at_least(unmeasured, bound, None, "x")
    low, high = ratio.interval or (ratio.median, ratio.median)
    return Target(ratio.what, bound.gate, True, Spread(ratio.median, low, high), "x", aim=bound.aim)


def _node_targets(node: NodeFigures | None) -> list[Target]:
    added = relative = query = start = None
    if node is not None:
        added, relative = node.added_ms, node.node_p99_ms / node.node_p50_ms
        query, start = node.query_p95_ms / node.batch_ms, Spread.of(node.starts_s)
    return [
        Target(
            "node: one short text, above the engine's process", ADDED_MS.gate, False, added, " ms", aim=ADDED_MS.aim
        ),
        _at_most("node: p99 over p50 of one short text", Bound(P99_OVER_P50_MAX), relative, "x"),
        _at_most("node: p95 of a query while a bulk job runs, in batch times", Bound(QUERY_BATCHES_MAX), query, "x"),
        Target("node: start of the process to first vector", START_S_MAX, False, start, " s"),
    ]


def _differences(found: Differences | None) -> list[Target]:
    transformers, alone = (None, None) if found is None else (found.transformers, found.alone)
    bounds: Mapping[str, tuple[float, float | None]] = {
        "largest difference to transformers": (TRANSFORMERS_DIFFERENCE_MAX, transformers),
        "largest difference, alone against in a batch": (ALONE_DIFFERENCE_MAX, alone),
    }
    return [_at_most(f"exact: {what}", Bound(most), it) for what, (most, it) in bounds.items()]


def _large_targets(large: LargeFigures | None) -> list[Target]:
    """Only of a run that has such a model: its folder is not in every checkout."""
    if large is None:
        return []
    load_s = large.load_s - large.reading_s
    return [
        _over(large.ratio, f"{large.name}: exact over sentence-transformers", LARGE_RATIO),
        _at_most(f"{large.name}: peak memory over weights", LARGE_MEMORY, large.peak_mb / large.weights_mb, "x"),
        _at_most(f"{large.name}: start to first vector, beyond reading", LARGE_LOAD_S, load_s, " s"),
    ]


def _at_least(what: str, bound: Bound, found: float | None, unit: str = "") -> Target:
    return Target(what, bound.gate, True, None if found is None else Spread.of([found]), unit, aim=bound.aim)


def _at_most(what: str, bound: Bound, found: float | None, unit: str = "") -> Target:
    return Target(what, bound.gate, False, None if found is None else Spread.of([found]), unit, aim=bound.aim)
