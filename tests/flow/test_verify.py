"""No wrong answer leaves: each check has an answer that only it refuses."""

from contextlib import nullcontext

import numpy as np
import pytest

from embedmesh.flow.verify import verify
from embedmesh.rules.embeddings import EmbedVectors
from embedmesh.rules.errors import WrongAnswer
from embedmesh.rules.forwarding import Part
from tests.flow.world import MODEL, right_reply

IDS = [[1, 2], [3]]
PART = Part("n0", (0, 1), 7, 0.1)


def reply(*components: float, tokens: int = 7) -> EmbedVectors:
    return EmbedVectors(tokens=tokens, data=np.array(components, "<f4").tobytes())


def test_a_right_answer_passes() -> None:
    verify(right_reply(IDS), MODEL, PART, True)


@pytest.mark.parametrize(("tokens", "right"), [(0, False), (1, True), (7, True), (8, False), (-1, False)])
def test_where_our_count_is_a_bound_the_nodes_lies_within(tokens: int, right: bool) -> None:
    with nullcontext() if right else pytest.raises(WrongAnswer):
        verify(reply(*GOOD, *GOOD, tokens=tokens), MODEL, PART, False)


GOOD = (0.6, 0.8, 0, 0)
WRONG = {
    "too few": reply(*GOOD),
    "too many": reply(*GOOD, *GOOD, *GOOD),
    "none": reply(),
    "narrow": reply(*GOOD, 1, 0, 0),
    "wide": reply(*GOOD, *GOOD, 0),
    "part of a component": EmbedVectors(tokens=7, data=bytes(2 * 4 * 4 - 1)),
    "NaN": reply(*GOOD, float("nan"), 1, 0, 0),
    "infinite": reply(*GOOD, float("inf"), 1, 0, 0),
    "minus infinite": reply(*GOOD, 0, float("-inf"), 0, 0),
    "all zeros": reply(*GOOD, 0, 0, 0, 0),
    "fewer tokens": reply(*GOOD, *GOOD, tokens=6),
    "more tokens": reply(*GOOD, *GOOD, tokens=8),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_refused(what: str) -> None:
    with pytest.raises(WrongAnswer):
        verify(WRONG[what], MODEL, PART, True)
