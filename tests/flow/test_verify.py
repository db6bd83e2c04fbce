"""No wrong answer leaves: each check has an answer that only it refuses."""

import base64

import numpy as np
import pytest

from embedmesh.flow.verify import verify
from embedmesh.rules.embeddings import Counted, EmbedItem, EmbedReply, EmbedUsage
from embedmesh.rules.errors import WrongAnswer
from tests.flow.world import MODEL, right_reply, vector_for

IDS = [[1, 2], [3]]
COUNTED = Counted(ids=IDS, tokens=7)


def encoded(*components: float) -> str:
    return base64.b64encode(np.array(components, "<f4").tobytes()).decode()


def reply(*vectors: str, indexes: tuple[int, ...] = (0, 1), tokens: int = 7) -> EmbedReply:
    data = [EmbedItem(index, vector) for index, vector in zip(indexes, vectors, strict=True)]
    return EmbedReply(data=data, model="m", usage=EmbedUsage(tokens, tokens))


GOOD = encoded(0.6, 0.8, 0, 0)


def test_a_right_answer_gives_its_raw_vectors() -> None:
    raw = verify(right_reply(IDS), MODEL, COUNTED)
    assert raw == [vector_for(ids).tobytes() for ids in IDS]


WRONG = {
    "too few": reply(GOOD, indexes=(0,)),
    "too many": reply(GOOD, GOOD, GOOD, indexes=(0, 1, 2)),
    "none": reply(indexes=()),
    "out of order": reply(GOOD, GOOD, indexes=(1, 0)),
    "duplicate index": reply(GOOD, GOOD, indexes=(0, 0)),
    "narrow": reply(GOOD, encoded(1, 0, 0)),
    "wide": reply(GOOD, encoded(1, 0, 0, 0, 0)),
    "not base64": reply(GOOD, GOOD[:-2] + "*="),
    "base64 with a line break": reply(GOOD, GOOD[:4] + "\n" + GOOD[4:]),
    "base64 without padding": reply(GOOD, GOOD.rstrip("=")),
    "base64 with rubbish after": reply(GOOD, GOOD + "AAAA"),
    "url-safe alphabet": reply(GOOD, GOOD[:5] + "_" + GOOD[6:]),
    "not ascii": reply(GOOD, "é" * 24),
    "NaN": reply(GOOD, encoded(float("nan"), 1, 0, 0)),
    "infinite": reply(GOOD, encoded(float("inf"), 1, 0, 0)),
    "minus infinite": reply(GOOD, encoded(0, float("-inf"), 0, 0)),
    "all zeros": reply(GOOD, encoded(0, 0, 0, 0)),
    "fewer tokens": reply(GOOD, GOOD, tokens=6),
    "more tokens": reply(GOOD, GOOD, tokens=8),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_is_refused(what: str) -> None:
    with pytest.raises(WrongAnswer):
        verify(WRONG[what], MODEL, COUNTED)
