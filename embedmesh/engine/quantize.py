"""Makes `int8.json`: which linear layers may become 8-bit integers, and in which ranges. For a tool, not for a node.

Three steps over token ids of ordinary text, without labels or training:

1. The exact graph runs over half of the text, and every channel of every input of linear layers leaves its smallest and
   largest value.
2. Each input alone is made 8 bits, and the other half of the text tells how far the vectors move: one minus the mean
   cosine. Errors of that size add up.
3. The inputs that move them most stay as they are, so that the others together move them by LOSS_MAX at most.

The result is then measured as it will be served, on text of another kind. If too few of the nearest texts are those of
exact, the third step is done again with half of the loss; if that does not help either, there is no file.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from embedmesh.engine.compiled import pad
from embedmesh.engine.folder import Folder
from embedmesh.engine.int8 import Array, Input, Quality, Range, Ranges, find_inputs, quantize_inputs, weights_digest
from embedmesh.engine.models import build_graph
from embedmesh.engine.plan import BATCH_TOKENS_MAX, pad_length
from embedmesh.engine.precision import INT8_OVERLAP_MIN, Rest, check_cpu, compile_graph
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Tier

Sequences = Sequence[Sequence[int]]

LOSS_MAX = 5e-4  # of the mean cosine; measured: the 10 nearest then agree to 97 % on all-MiniLM-L6-v2
LOSS_TRIES = 4  # the last with an eighth of LOSS_MAX
SHARE_MIN = 0.33  # of the products; with fewer in 8 bits, int8 is hardly faster than the rest alone
SMOOTHING = 0.75  # how much of a channel's size moves into the weights; more fits the calibration text too closely
ONE_SIDED = 8  # an input that reaches this many times further up than down (behind a GELU) is not shifted
NEAREST = 10  # neighbours whose agreement is measured
TEXTS_MIN = 2 * (NEAREST + 1)
RANGE_TOKENS_MAX = 20_000  # extremes hardly grow beyond
LOSS_TOKENS_MAX = 4_000  # a pass a linear input: seconds for 22 M parameters, minutes for 560 M
JUDGED_TEXTS_MAX = 1_000  # bounds the table of all pairs
SMALLEST = 1e-6  # what a channel that is always 0 counts as


def quantize(
    folder: Folder,
    sequences: Sequences,
    judged: Sequences,
    on: str,
    *,
    threads: int,
    rest: Rest,
    overlap_min: float = INT8_OVERLAP_MIN,
    on_progress: Callable[[int, int], None],
) -> Ranges:
    """Ranges from `sequences`, judged on `judged`: token ids, special tokens included, of two kinds of text.

    `on` describes the latter. `on_progress` is called with (steps done, steps in all). Raises SetupError where this CPU
    cannot serve int8 with this `rest`, for a model without linear layers, for too little text, and where less than
    `overlap_min` percent of the nearest texts would be those of exact.
    """
    check_cpu("int8", rest)
    if min(len(sequences), len(judged)) < TEXTS_MIN:
        raise SetupError(f"There is too little text to measure with: each side needs {TEXTS_MIN} texts or more.")
    weights = Weights(folder.transformer)
    graph = build_graph(folder, weights)
    inputs = find_inputs(graph)
    if not inputs:
        raise SetupError(f"{folder.path.name} has no linear layers that could be made 8 bits.")

    def embed(ranges: Sequence[Range | None], tier: Tier, sequences: Sequences) -> Array:
        """Vectors of the graph with these ranges."""
        changed = build_graph(folder, weights)
        quantize_inputs(find_inputs(changed), ranges)
        compiled = compile_graph(changed, threads, tier, rest)
        vectors = np.empty((len(sequences), folder.width), np.float32)
        for batch, _, outputs in _run(compiled, sequences):
            vectors[batch] = outputs[0]
        return vectors

    none: list[Range | None] = [None] * len(inputs)
    steps = len(inputs) + 2
    ranges = _find_ranges(graph, inputs, _first(sequences[::2], RANGE_TOKENS_MAX), threads)
    on_progress(1, steps)
    losses = []
    probes = _first(sequences[1::2], LOSS_TOKENS_MAX)
    exact = embed(none, "exact", probes)
    for number, one in enumerate(ranges):
        moved = embed([*none[:number], one, *none[number + 1 :]], "exact", probes)
        losses.append(1 - float(_cosines(exact, moved).mean()))
        on_progress(number + 2, steps)
    judged = judged[:JUDGED_TEXTS_MAX]
    exact, found = embed(none, "exact", judged), []
    for kept in _choices(losses, [sum(kernel.size for kernel in each.kernels) for each in inputs]):
        chosen = [None if number in kept else one for number, one in enumerate(ranges)]
        quality = compare(exact, embed(chosen, "int8", judged), on)
        if quality.top10_overlap >= overlap_min:
            on_progress(steps, steps)
            return Ranges(format=1, weights=weights_digest(inputs), inputs=chosen, quality=quality, rest=rest)
        found.append(quality.top10_overlap)
    raise _too_coarse(folder.path.name, found, overlap_min, on)


def compare(exact: Array, other: Array, on: str) -> Quality:
    """How far `other` is from `exact`, vectors [texts, width] of the same texts, more than NEAREST of them."""
    cosines = _cosines(exact, other)
    pairs = zip(nearest(exact), nearest(other), strict=True)
    same = [len(set(ours) & set(theirs)) for ours, theirs in pairs]
    return Quality(
        texts=len(cosines),
        on=on,
        cosine_mean=round(float(cosines.mean()), 6),
        cosine_min=round(float(cosines.min()), 6),
        top10_overlap=round(100 * float(np.mean(same)) / NEAREST, 2),
    )


def nearest(vectors: Array) -> list[list[int]]:
    """Of each text the NEAREST others by cosine."""
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    found: list[list[int]] = np.argpartition(-alike, NEAREST, axis=1)[:, :NEAREST].tolist()
    return found


def _find_ranges(graph: ov.Model, inputs: Sequence[Input], sequences: Sequences, threads: int) -> list[Range]:
    """The range of each input over the tokens of `sequences`; one batch of one input's values is in memory at once."""
    graph.add_outputs([each.source for each in inputs])
    kernels = [np.concatenate([np.abs(kernel) for kernel in each.kernels]).max(axis=0) for each in inputs]
    lows = [np.full(kernel.shape, np.inf, np.float32) for kernel in kernels]
    highs = [-low for low in lows]
    for _, mask, (_, *outputs) in _run(compile_graph(graph, threads, "exact"), sequences):
        for number, values in enumerate(outputs):
            values = values[mask > 0] if values.ndim == mask.ndim + 1 else values.reshape(-1, values.shape[-1])
            lows[number] = np.minimum(lows[number], values.min(axis=0))
            highs[number] = np.maximum(highs[number], values.max(axis=0))
    return [_range(*found) for found in zip(lows, highs, kernels, strict=True)]


def _range(low: Array, high: Array, kernel: Array) -> Range:
    """The range of an input from its channels' extremes and the largest weight that each channel meets."""
    shifts = -low.min() * ONE_SIDED > high.max()
    shift = (low + high) / 2 if shifts else np.zeros_like(low)
    size = np.maximum(np.maximum(high - shift, shift - low), SMALLEST)
    scale = size**SMOOTHING / np.maximum(kernel, SMALLEST) ** (1 - SMOOTHING)
    scale /= np.exp(np.log(scale).mean())
    return Range(
        low=float(((low - shift) / scale).min()),
        high=float(((high - shift) / scale).max()),
        scale=_numbers(scale),
        shift=_numbers(shift) if shifts else [],
    )


def _too_coarse(name: str, found: Sequence[float], overlap_min: float, on: str) -> SetupError:
    said = f"{max(found):.1f} % of each text's {NEAREST} nearest" if found else "too few"
    return SetupError(
        f"int8 of {name} finds at best {said} as exact does ({on}); the bound is {overlap_min:g} %. Serve it in the"
        " tier 'fast' or 'exact', try --text with text like yours, or set another bound with --overlap-min."
    )


def _choices(losses: Sequence[float], sizes: Sequence[int]) -> Iterator[set[int]]:
    """The inputs that stay as they are, at first few, then more, while SHARE_MIN of `sizes` is left to be 8 bits."""
    before: set[int] | None = None
    for number in range(LOSS_TRIES):
        kept = _worst(losses, LOSS_MAX / 2**number)
        if sum(sizes[each] for each in kept) > (1 - SHARE_MIN) * sum(sizes):
            return
        if kept != before:
            yield kept
        before = kept


def _worst(losses: Sequence[float], most: float) -> set[int]:
    """The fewest, largest losses without which the others add up to at most `most`."""
    order = sorted(range(len(losses)), key=lambda number: losses[number])
    sums = np.cumsum([max(losses[number], 0.0) for number in order])
    return {number for number, total in zip(order, sums, strict=True) if total > most}


def _run(compiled: ov.CompiledModel, sequences: Sequences) -> Iterator[tuple[list[int], Array, list[Array]]]:
    """Batches of sequences of like length: their indexes, their mask, and all outputs, valid until the next batch."""
    request = compiled.create_infer_request()
    left = sorted(range(len(sequences)), key=lambda at: len(sequences[at]))
    while left:
        length = pad_length(len(sequences[left[-1]]))
        rows = max(1, BATCH_TOKENS_MAX // length)
        batch = left[-rows:]
        del left[-rows:]
        ids, mask = pad([sequences[at] for at in batch], len(batch), length)
        request.infer([ids, mask], share_inputs=True)
        yield batch, mask, [output.data for output in request.output_tensors]


def _first(sequences: Sequences, tokens_max: int) -> Sequences:
    """As many of the first as have `tokens_max` tokens together, at least one."""
    total = np.cumsum([len(sequence) for sequence in sequences])
    return sequences[: max(1, int((total <= tokens_max).sum()))]


def _cosines(ours: Array, theirs: Array) -> npt.NDArray[np.float64]:
    a, b = ours.astype(np.float64), theirs.astype(np.float64)
    cosines: npt.NDArray[np.float64] = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return cosines


def _numbers(values: npt.NDArray[Any]) -> list[float]:
    """Six digits are more than 8 bits need, and half the file."""
    return [float(f"{value:.6g}") for value in values]
