"""A batch failed: which of its sequences was it? Halving finds out, so that only that one's caller gets an error."""

from collections import deque
from collections.abc import Awaitable, Callable

from embedmesh.engine.plan import shape_rows
from embedmesh.rules.errors import NodeBroke

FAILURES_MAX = 8  # each costs a start of the worker; one sequence among 64 is found after six

RunOnce = Callable[[list[list[int]], int, int], Awaitable[list[bytes | None]]]
"""Token ids of some sequences, and the shape (rows, length) they run in -> one vector each, or NodeBroke.

None in place of a vector: it was not finite, or all zero.
"""


async def isolate(
    sequences: list[list[int]], length: int, run_once: RunOnce, may_go_on: Callable[[], bool]
) -> list[bytes | None]:
    """One vector a sequence; None for those that break the engine, or whose part was not tried again.

    At most FAILURES_MAX parts may fail, and no part is begun once `may_go_on` says no.
    """
    vectors: list[bytes | None] = [None] * len(sequences)
    parts = deque(_halves(range(len(sequences))))  # the largest first: most vectors come early
    failures = 0
    while parts and failures < FAILURES_MAX and may_go_on():
        part = parts.popleft()
        try:
            got = await run_once([sequences[at] for at in part], shape_rows(len(part), length), length)
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
