"""Finding the sequence that breaks a batch, over a scripted engine."""

import pytest

from embedmesh.engine.isolate import ISOLATE_FAILURES_MAX, isolate
from embedmesh.engine.plan import shapes
from embedmesh.rules.errors import NodeBroke

LENGTH = 16
ROWS = 64


class Engine:
    """Breaks whenever a batch has one of the `poisons`; a sequence's vector is its id."""

    def __init__(self, poisons: set[int]) -> None:
        self.poisons = poisons
        self.failures = 0

    async def run_once(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes | None]:
        assert (rows, length) in set(shapes(256))
        assert len(sequences) <= rows
        if self.poisons & {sequence[0] for sequence in sequences}:
            self.failures += 1
            raise NodeBroke("broken")
        return [bytes(sequence) for sequence in sequences]


@pytest.mark.parametrize("rows", [2, 3, 17, ROWS])
@pytest.mark.parametrize("poison", [0, 1, -1])
async def test_one_is_found_wherever_it_is(rows: int, poison: int) -> None:
    """And every other sequence gets its own vector."""
    engine = Engine({poison % rows})
    vectors = await isolate([[n] for n in range(rows)], LENGTH, engine.run_once, lambda: True)
    assert vectors == [None if n == poison % rows else bytes([n]) for n in range(rows)]
    assert engine.failures <= 6


async def test_many_are_given_up() -> None:
    """The starts of workers are bounded; what was not tried again has no vector, and nobody gets another's."""
    engine = Engine(set(range(0, ROWS, 2)))
    vectors = await isolate([[n] for n in range(ROWS)], LENGTH, engine.run_once, lambda: True)
    assert engine.failures == ISOLATE_FAILURES_MAX
    assert all(vector in (None, bytes([n])) for n, vector in enumerate(vectors))
    assert all(vectors[n] is None for n in engine.poisons)


async def test_nothing_is_begun_when_time_is_up() -> None:
    """Whoever waits behind this batch does not wait for long."""
    engine = Engine({3})
    turns = iter([True, True, False])
    vectors = await isolate([[n] for n in range(8)], LENGTH, engine.run_once, lambda: next(turns))
    assert vectors == [None, None, None, None, b"\x04", b"\x05", b"\x06", b"\x07"]
