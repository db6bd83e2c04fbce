"""What a run found: rates, times, memory and differences, by contender and row."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from bench.engine.peak import Peak
from bench.rig.corpus import Name
from bench.rig.figures import Spread, Target

Kind = Literal["AVX2", "AVX-512", "other"]
"""Of CPU: what its widest registers are. Peers and targets differ by it."""

EXACT, FAST, INT8, NODE = "exact", "fast", "int8", "exact, node over HTTP"
ST, ST_FAST, FASTEMBED = "sentence-transformers", "sentence-transformers, fast path forced", "FastEmbed"
ONNX, INFINITY = "onnxruntime", "Infinity"
OURS = (EXACT, FAST, INT8, NODE)
PEERS = (ST, ST_FAST, FASTEMBED, ONNX, INFINITY)

CORPORA: tuple[Name, ...] = ("S", "M", "L", "512", "X")
ONE = "one text"
ROWS = (*CORPORA, ONE)
IN_WORDS = {
    "S": "S, short texts",
    "M": "M, 135 tokens",
    "L": "L, 256 tokens",
    "512": "512 tokens",
    "X": "X, mixed lengths",
    ONE: "one short text alone",
}


class ContenderRow(msgspec.Struct, frozen=True):
    """One contender; rates by corpus. `cosine` is (smallest, mean) to the vectors of exact."""

    name: str
    version: str
    tokens_per_s: dict[str, Spread]
    share_of_peak: dict[str, float]  # of exact and fast only
    single_p50_ms: float
    single_p99_ms: float
    start_s: float
    resident_mb: float
    cosine: tuple[float, float]


class Ratio(msgspec.Struct, frozen=True):
    """How many times as fast `ours` is as `theirs` in a row, over all rounds: (low, high) has the median at 95 %."""

    row: str
    ours: str
    theirs: str
    rounds: int
    median: float
    interval: tuple[float, float] | None  # None of fewer rounds than tell it
    spread: float | None  # half of the interval's width, over the median

    @property
    def what(self) -> str:
        """In words."""
        peer = " (the best peer)" if self.theirs in PEERS else ""
        return f"{IN_WORDS[self.row]}: {self.ours} over {self.theirs}{peer}"


class NodeFigures(msgspec.Struct, frozen=True):
    """The node over its socket. Times of one short text in ms; `batch_ms` is a full batch in process."""

    engine_p50_ms: float  # of the engine's process, asked without HTTP
    node_p50_ms: float  # of the node, asked in turns with it
    added_ms: Spread  # the median of what the node took longer than the engine just before, with its 95 % interval
    node_p99_ms: float
    query_p95_ms: float
    batch_ms: float
    starts_s: list[float]


class Differences(msgspec.Struct, frozen=True):
    """The largest difference of any component of vectors of exact: to transformers', and alone to in a batch."""

    transformers: float | None
    alone: float


class LargeFigures(msgspec.Struct, frozen=True):
    """A large model at its real size, on texts of 256 of its tokens. `weights_mb`: in float32."""

    name: str
    tokens_per_s: dict[str, Spread]
    ratio: Ratio | None
    weights_mb: float
    peak_mb: float
    load_s: float  # to the first vector
    reading_s: float  # its file, from where the first vector's loading reads it


class Figures(msgspec.Struct, frozen=True):
    """All of it. `left_out` says why by name; `peaks` by loop; `tokens` of a corpus."""

    machine: str
    kind: Kind
    threads: int
    tokens: dict[str, int]
    peaks: dict[str, Peak]
    rows: list[ContenderRow]
    ratios: list[Ratio]
    disturbed_rounds: int  # of single rows, not taken
    node: NodeFigures | None
    differences: Differences | None
    large: LargeFigures | None
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """What fails the run: missed targets with what was found and its spread, and that some were not measured."""
        unsettled = {ratio.what: ratio.spread for ratio in self.ratios if not is_settled(ratio)}
        missed = [_missed(target, unsettled) for target in self.targets if target.verdict == "missed"]
        unmeasured = sum(target.verdict == "not measured" for target in self.targets)
        return [*missed, *([f"{unmeasured} targets were not measured"] if unmeasured else [])]


SPREAD_MAX = 0.05


def is_settled(ratio: Ratio) -> bool:
    """Whether more rounds would change it by little: the spread is below SPREAD_MAX."""
    return ratio.spread is not None and ratio.spread < SPREAD_MAX


def flops(config: Mapping[str, Any], lengths: Sequence[int]) -> float:
    """Floating-point operations for texts of these lengths in tokens, in a BERT of this config.json.

    A product of [m, k] and [k, n] is 2·m·k·n. A layer multiplies each token by four matrices of h·h (query, key, value,
    output) and two of h·i (feed-forward), and in attention each token with each other twice (scores, mixing), h wide:
    layers · (2·(4·h² + 2·h·i) + 4·tokens·h). Padding, softmax, GELU, normalisation and pooling are not counted.
    """
    h, i = config["hidden_size"], config["intermediate_size"]
    matrices = 2 * (4 * h * h + 2 * h * i)
    return float(config["num_hidden_layers"] * sum(tokens * (matrices + 4 * tokens * h) for tokens in lengths))


def _missed(target: Target, unsettled: Mapping[str, float | None]) -> str:
    found = "" if target.found is None else f"{target.found.median:.3g}"
    words = f"{target.what}: {found}{target.unit} instead of {target.bound:.3g}"
    if target.what not in unsettled:
        return words
    spread = unsettled[target.what]
    return f"{words} (too few rounds to say)" if spread is None else f"{words} (spread {100 * spread:.0f} %)"
