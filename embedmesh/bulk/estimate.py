"""What a job will need, from a sample of its units: nothing is asked of anybody."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from embedmesh.bulk.units import JobUnit

SAMPLED_UNITS_MIN = 8  # where there are as many: a spread of fewer says little
SAMPLE_STEP_MAX = 64  # of a long input at least 1 % of the units
SPREAD = 2.0  # standard errors: 95 of 100 estimates are within them

CountTokens = Callable[[Sequence[str]], Sequence[int]]
"""Tokens of each text."""


class JobEstimate(NamedTuple):
    """`tokens` is more or less by `spread`, None where one unit alone was counted of several. Sizes are in bytes."""

    units: int
    texts: int
    refused: int
    size: int
    sampled_texts: int
    tokens: int
    spread: int | None


class _Sampled(NamedTuple):
    texts: int
    size: int
    tokens: int


def estimate(units: Iterable[JobUnit], count: CountTokens) -> JobEstimate:
    """Read all units, and count the tokens of some that are spread over the input; of the others by their size."""
    sample: list[_Sampled] = []
    step, number = 1, 0
    texts = refused = size = 0
    for unit in units:
        taken = [text for text in unit.texts if text]
        of_unit = sum(len(text.encode()) for text in taken)
        if number % step == 0:
            sample.append(_Sampled(len(taken), of_unit, sum(count(taken))))
            if len(sample) >= 2 * SAMPLED_UNITS_MIN and step < SAMPLE_STEP_MAX:
                sample, step = sample[::2], 2 * step
        number += 1
        texts, refused, size = texts + len(unit.texts), refused + len(unit.refused), size + of_unit
    sampled_bytes = sum(one.size for one in sample)
    rate = sum(one.tokens for one in sample) / max(sampled_bytes, 1)
    return JobEstimate(
        units=number,
        texts=texts,
        refused=refused,
        size=size,
        sampled_texts=sum(one.texts for one in sample),
        tokens=round(rate * size),
        spread=_spread(sample, rate, number),
    )


def _spread(sample: Sequence[_Sampled], rate: float, units: int) -> int | None:
    """Of a ratio estimate, with the correction for a finite number (Cochran, Sampling Techniques, 6.4)."""
    many = len(sample)
    if many == units:
        return 0
    if many < 2:
        return None
    variance = sum((one.tokens - rate * one.size) ** 2 for one in sample) / (many - 1)
    return round(SPREAD * units * math.sqrt(variance * (1 - many / units) / many))
