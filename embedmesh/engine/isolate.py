"""Finds the sequences that break a batch, by halving it, so that only their callers get an error."""

from collections import deque
from collections.abc import Awaitable, Callable

from embedmesh.engine.plan import shape_rows
from embedmesh.rules.errors import NodeBroke

ISOLATE_FAILURES_MAX = 8  # each costs a start of the worker; one sequence among 64 is found after six

Rows = list[bytes | None]
"""A float32 vector a sequence; None where this one broke the engine, or its vector was not finite."""

RowsDone = Callable[[Rows | NodeBroke], None]

BeginRows = Callable[[list[list[int]], int, int, RowsDone], None]
"""Begin to run token ids of some sequences in a shape (rows, length). Calls back once, later."""

RunRows = Callable[[list[list[int]], int, int], Awaitable[Rows]]
"""The same as a coroutine. Raises NodeBroke."""


async def isolate(sequences: list[list[int]], length: int, run: RunRows, may_go_on: Callable[[], bool]) -> Rows:
    """One vector a sequence; None for those that break the engine, or whose part was not tried again.

    At most ISOLATE_FAILURES_MAX parts may fail, and no part is begun once `may_go_on` says no.
    """
    vectors: Rows = [None] * len(sequences)
    parts = deque(_halves(range(len(sequences))))  # the largest first: most vectors come early
    failures = 0
    while parts and failures < ISOLATE_FAILURES_MAX and may_go_on():
        part = parts.popleft()
        try:
            got = await run([sequences[at] for at in part], shape_rows(len(part), length), length)
        except NodeBroke:
            failures += 1
            parts += _halves(part)
        else:
            for at, vector in zip(part, got, strict=True):
                vectors[at] = vector
    return vectors


def _halves(part: range) -> list[range]:
    """Nothing of a single one: it was tried alone."""
    middle = len(part) // 2
    return [part[:middle], part[middle:]] if middle else []
