"""How a request is cut: whole where that is best, within every bound else, and no input lost or asked twice."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.fleet.spread import (
    PART_S,
    PART_TOKENS_LEAST,
    PART_TOKENS_MIN,
    WHOLE_TOKENS_MAX,
    cut,
    in_order,
    part_tokens_max,
)

ORDER = [
    ([5, 9, 7], 2_048, [0, 1, 2]),  # whole: as it came
    ([WHOLE_TOKENS_MAX - 1, 1], 2_048, [0, 1]),
    ([1, WHOLE_TOKENS_MAX], 2_048, [1, 0]),  # cut: longest first
    ([5, 9, 7], 2, [1, 2, 0]),  # more than a node takes at once
]


@pytest.mark.parametrize(("lengths", "inputs_max", "order"), ORDER)
def test_the_order_of_cutting(lengths: list[int], inputs_max: int, order: list[int]) -> None:
    assert in_order(lengths, inputs_max) == order


PARTS = [
    # left, speed, speed of all that are free, tokens
    (100_000, 10_000, 10_000, 10_000 * PART_S),
    (100_000, 10_000, 40_000, 10_000 * PART_S),
    (2_800, 10_000, 20_000, 1_400),  # not all to the first of two
    (100, 10_000, 10_000, PART_TOKENS_MIN),
    (100_000, 4_000, 4_000, 4_000 * PART_S),  # a slow node's parts are smaller than a batch,
    (100_000, 100, 100, PART_TOKENS_LEAST),  # within reason
]


@pytest.mark.parametrize(("left", "speed", "free", "tokens"), PARTS)
def test_a_part_is_a_nodes_share_within_bounds(left: int, speed: float, free: float, tokens: float) -> None:
    assert part_tokens_max(left, speed, free) == tokens


@given(
    st.lists(st.integers(1, 512), min_size=1, max_size=60),
    st.lists(st.tuples(st.integers(1, 4_000), st.integers(1, 64)), min_size=1, max_size=30),
)
def test_cut_again_and_again_every_input_comes_once(lengths: list[int], bounds: list[tuple[int, int]]) -> None:
    left = in_order(lengths, min(inputs_max for _, inputs_max in bounds))
    seen: list[int] = []
    for tokens_max, inputs_max in bounds:
        if not left:
            break
        taken = cut(lengths, left, tokens_max, inputs_max)
        assert 1 <= taken.inputs <= inputs_max
        assert taken.tokens == sum(lengths[place] for place in left[: taken.inputs])
        assert taken.tokens <= tokens_max or taken.inputs == 1
        seen += left[: taken.inputs]
        left = left[taken.inputs :]
    assert sorted(seen + left) == list(range(len(lengths)))
