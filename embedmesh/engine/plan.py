"""Which sequences run next, together. Plain decisions over lengths: nothing here waits, or knows what a text is.

Sequences of like length run together, so that little is computed for padding, and at most 1,024 padded tokens at once:
larger batches are no faster on a CPU and make everybody wait. A call that fits into one batch is *small*, any other is
*bulk*. While both kinds wait they take turns, so that a query waits for at most one bulk batch, and bulk work keeps at
least every other turn. Within a kind the oldest call leads until it is done: taking bulk calls in turns would let them
all finish at the end. A batch is as long as its leader's longest row and takes the rows that come next in length, its
own and other calls': in a bulk call's batch those of any call, so that its last batches are as full as its first; in a
small call's only those of small ones, since a fuller batch would make it wait. A call that is to run *alone* leads as
any other, and shares no batch.

The shapes that can come out are few (`shapes` lists them), because a CPU engine keeps compiled kernels for each.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

BATCH_TOKENS_MAX = 1_024  # padded; measured best on 2 cores, about 55 ms of a 22 M parameter model
BATCH_ROWS_MAX = 64  # the shortest texts are as fast as they get with that many
LOOK_AHEAD_CALLS = 256  # twice the rows of any batch; looking further costs more than it finds
BATCH_COST_TOKENS = 24  # what a batch costs besides its tokens, in tokens: 1 to 2 ms in every tier
CANDIDATES = 4  # rows looked at, in fullest batches; more find no better batch
LENGTH_STEPS = ((32, 4), (64, 8), (256, 16), (1_024, 32))  # (lengths up to, in steps of)
LENGTH_STEP_ABOVE = 128


class Row(NamedTuple):
    """A sequence that waits: its padded length, and where it is among the inputs of its call."""

    length: int
    at: int


class CallRows:
    """The rows of one call that are still to run, longest first."""

    def __init__(self, lengths: Sequence[int], *, alone: bool = False) -> None:
        """`lengths` are tokens of each input, special tokens included. `alone`: in no batch with rows of others."""
        self.alone = alone
        self.rows = [Row(pad_length(n), at) for at, n in enumerate(lengths)]
        if len(self.rows) > 1:
            self.rows.sort(reverse=True)
        self.tokens = sum([row.length for row in self.rows])
        self.is_bulk = self.tokens > BATCH_TOKENS_MAX  # for good: a tail that became small would go before queries

    def remove(self, indexes: set[int]) -> None:
        """Take out the rows that a batch has taken."""
        self.rows = [row for row in self.rows if row.at not in indexes]
        self.tokens = sum(row.length for row in self.rows)


class Plan(NamedTuple):
    """The next batch: its shape, and of each row that is not padding the call (by position in the queue) and index."""

    rows: int
    length: int
    picks: list[tuple[int, int]]
    bulk: bool


def next_batch(queue: Sequence[CallRows], *, last_was_bulk: bool) -> Plan | None:
    """What to run next for the calls in `queue`, oldest first; None when nothing waits. Changes nothing."""
    if len(queue) == 1 and len(queue[0].rows) == 1:  # what follows comes to the same, and this is the quiet node's case
        return Plan(1, queue[0].rows[0].length, [(0, queue[0].rows[0].at)], queue[0].is_bulk)
    small = next((at for at, call in enumerate(queue) if call.rows and not call.is_bulk), None)
    bulk = next((at for at, call in enumerate(queue) if call.rows and call.is_bulk), None)
    if bulk is not None and (small is None or not last_was_bulk):
        ahead = range(0 if queue[bulk].alone else min(len(queue), LOOK_AHEAD_CALLS))
        return _plan(queue, bulk, (at for at in ahead if at != bulk and not queue[at].alone), bulk=True)
    if small is not None:
        ahead = range(small + 1, small if queue[small].alone else min(len(queue), small + LOOK_AHEAD_CALLS))
        return _plan(queue, small, (at for at in ahead if not queue[at].is_bulk and not queue[at].alone), bulk=False)
    return None


def _plan(queue: Sequence[CallRows], leader: int, others: Iterable[int], *, bulk: bool) -> Plan:
    """A batch as long as the leader's longest row, with as many rows, its own and others', as pay best.

    What a batch pays is the tokens that were waiting, over those that it computes; so rows much shorter than the first
    are left for a batch of their own length as soon as that costs less than padding them.
    """
    length = queue[leader].rows[0].length
    rows_max = _rows_max(length)
    # Negative length, call, index. Sorted, the longest come first, and of equal ones the leader's before others'.
    found: list[tuple[int, int, int]] = []
    for at in chain([leader], others):
        rows = queue[at].rows
        first = bisect_left(rows, -length, key=lambda row: -row.length)
        found += [(-row.length, at, row.at) for row in rows[first : first + rows_max]]
        if len(found) >= CANDIDATES * rows_max:
            break
    found.sort(key=lambda row: row[0])
    totals = list(accumulate(-negative for negative, _, _ in found))
    best = max(
        _row_counts(rows_max), key=lambda rows: totals[min(rows, len(found)) - 1] / (rows * length + BATCH_COST_TOKENS)
    )
    return Plan(best, length, [(at, index) for _, at, index in found[:best]], bulk)


def pad_length(tokens: int) -> int:
    """Tokens of a row once padded: in steps of about an eighth, so that lengths stay few and padding small."""
    for up_to, step in LENGTH_STEPS:
        if tokens <= up_to:
            return -(-tokens // step) * step
    return -(-tokens // LENGTH_STEP_ABOVE) * LENGTH_STEP_ABOVE


def _rows_max(length: int) -> int:
    return min(BATCH_ROWS_MAX, max(1, BATCH_TOKENS_MAX // length))


def _row_counts(rows_max: int) -> list[int]:
    """How many rows a batch may have: all that fit, or a power of four up to half of that. Each has kernels."""
    counts = [1]
    while counts[-1] * 4 * 2 <= rows_max:
        counts.append(counts[-1] * 4)
    return counts if rows_max == 1 else [*counts, rows_max]


def shape_rows(count: int, length: int) -> int:
    """The fewest rows of the shapes of that length that take `count` sequences; the others are padding."""
    return min(rows for rows in _row_counts(_rows_max(length)) if rows >= count)


def shapes(max_tokens: int) -> Iterator[tuple[int, int]]:
    """Every (rows, length) that can come out for a model of `max_tokens`."""
    for length in sorted({pad_length(tokens) for tokens in range(1, max_tokens + 1)}):
        yield from ((rows, length) for rows in _row_counts(_rows_max(length)))
