"""How much of a request one node gets at a time.

A request that fits one batch goes to one node, whole. A larger one is cut, so that idle nodes share it, a slow node
gets little of it, a failed part is a small loss, and short requests pass between its parts.
"""

from collections.abc import Sequence
from typing import NamedTuple

WHOLE_TOKENS_MAX = 1_024  # one batch of our engine: cutting it would not make it faster
PART_S = 0.15  # of a node's time: short enough to change plans, long enough that a part's fixed cost is small beside it
PART_TOKENS_LEAST = 256  # to a slow node, where a whole batch would delay other requests for long
PART_TOKENS_MIN = 1_024  # smaller parts of a large request would be computed less well than whole batches


class Cut(NamedTuple):
    """The first of some inputs, how many, and their tokens."""

    inputs: int
    tokens: int


def in_order(lengths: Sequence[int], inputs_max: int) -> list[int]:
    """The inputs in the order in which they are cut: as they came where the request stays whole, else longest first, so
    that inputs of like length, which compute well together, are in one part."""
    if stays_whole(sum(lengths), len(lengths), inputs_max):
        return list(range(len(lengths)))
    return sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)


def stays_whole(tokens: int, inputs: int, inputs_max: int) -> bool:
    """Whether a request goes to one node as it is."""
    return tokens <= WHOLE_TOKENS_MAX and inputs <= inputs_max


def part_tokens_max(left: int, tokens_per_s: float, free_tokens_per_s: float) -> int:
    """Tokens for a node of that speed: its share among the free nodes of what is `left`, within bounds."""
    share = left * tokens_per_s / free_tokens_per_s if free_tokens_per_s > 0 else left
    longest = tokens_per_s * PART_S
    least = min(PART_TOKENS_MIN, max(PART_TOKENS_LEAST, longest))
    return int(max(least, min(share, longest)))


def cut(lengths: Sequence[int], rows: Sequence[int], tokens_max: int, inputs_max: int) -> Cut:
    """As many of `rows`, from the first on, as fit; always at least one."""
    inputs = tokens = 0
    for row in rows[:inputs_max]:
        if inputs and tokens + lengths[row] > tokens_max:
            break
        inputs += 1
        tokens += lengths[row]
    return Cut(inputs, tokens)
