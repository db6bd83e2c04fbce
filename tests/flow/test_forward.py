"""Answers to parts are put together: each input once, by whoever answers first, whatever overlaps."""

import itertools

import numpy as np
import pytest

from embedmesh.flow.forward import _Answers
from embedmesh.rules.embeddings import EmbedVectors
from embedmesh.rules.forwarding import Part

LENGTHS = [3, 4, 5, 6]
WIDTH = 2


def answer(node: str, *places: int) -> tuple[Part, EmbedVectors]:
    """Rows that say their place and who made them."""
    rows = np.array([[place + 1, ord(node)] for place in places], "<f4")
    tokens = sum(LENGTHS[place] for place in places)
    return Part(node, places, tokens, 0.1), EmbedVectors(tokens=tokens, data=rows.tobytes())


PARTS = [("a", (0, 1)), ("b", (2, 3)), ("c", (0, 1)), ("d", (0,)), ("e", (3, 2))]


ORDERS = list(itertools.permutations(PARTS))


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(part[0] for part in order))
def test_no_input_stays_empty_and_none_is_counted_twice(order: tuple[tuple[str, tuple[int, ...]], ...]) -> None:
    """Two parts, a hedge of each, and one of half a part: in whatever order they answer."""
    answers = _Answers(LENGTHS, 4 * WIDTH)
    first: dict[int, str] = {}
    for node, places in order:
        fresh = [place for place in places if place not in first]
        assert answers.put(*answer(node, *places)) == bool(fresh)
        first |= dict.fromkeys(fresh, node)
        assert answers.missing == len(LENGTHS) - len(first)
    whole = answers.whole(WIDTH)
    rows = np.frombuffer(whole.data, "<f4").reshape(-1, WIDTH)
    assert rows.tolist() == [[place + 1, ord(first[place])] for place in range(len(LENGTHS))]
    assert whole.tokens == sum(LENGTHS) == sum(share.tokens for share in whole.shares)
    by_node = {share.node_id: share.tokens for share in whole.shares}
    assert by_node == {
        node: sum(LENGTHS[place] for place, by in first.items() if by == node) for node in set(first.values())
    }


def test_one_part_of_all_is_taken_as_it_is() -> None:
    answers = _Answers(LENGTHS, 4 * WIDTH)
    part, reply = answer("a", 0, 1, 2, 3)
    assert answers.put(part, reply)
    assert not answers.put(*answer("b", 0, 1, 2, 3))
    assert answers.whole(WIDTH).data is reply.data
