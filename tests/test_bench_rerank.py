"""The parts of the benches of reranking: their model is CrossEncoder's, their targets compare what they say."""

from pathlib import Path

import numpy as np
import pytest

from bench.clients.__main__ import pair_tokens
from bench.clients.drive import scores
from bench.engine.figures import FASTEMBED, INFINITY, ST
from bench.engine.rounds import Rounds
from bench.engine.runner import QUERY, pairs_of
from bench.rerank.field import GATEWAY, scores_of
from bench.rerank.figures import Ask, targets_of
from bench.rerank.model import DOCUMENTS, LOGITS, QUESTION, make_cross_encoder
from bench.rig.corpus import token_counts
from bench.rig.http import Reply
from embedmesh.engine.folder import read_folder
from embedmesh.engine.runtime import make_model
from embedmesh.engine.tokens import ModelTokenizer
from tests.data import model_folder


def test_the_model_has_cross_encoders_scores(tmp_path: Path) -> None:
    """Those that its clients' scores are compared with, by our engine: at its real size, in one batch."""
    folder = make_cross_encoder(model_folder(), tmp_path / "reranker")
    described = read_folder(folder)
    tokenizer = ModelTokenizer(folder, described.max_tokens)
    pairs = pairs_of(tokenizer, QUESTION, DOCUMENTS)
    assert sum(map(len, pairs)) == pair_tokens()
    found = make_model(described, 1, "exact").run(pairs, len(pairs), 64)
    assert np.abs(np.array(found)[:, 0] - LOGITS).max() <= 1e-5


def test_the_query_has_the_tokens_that_rows_name() -> None:
    assert token_counts([QUERY]) == [14]


def test_targets_are_of_the_gateway_and_each_peer() -> None:
    """Round by round; what was not measured is no promise kept."""
    ask = Ask("D", 100)
    rounds = Rounds(
        {}, rows={ask.words: [{GATEWAY: 1.0, FASTEMBED: 1.4, INFINITY: 3.0}, {GATEWAY: 9.0, FASTEMBED: 13}]}
    )
    found = {target.what: target for target in targets_of([ask], rounds, {GATEWAY: 2e-5, ST: 0.0}, {})}
    assert found[f"{ask.words}: gateway over {FASTEMBED}"].verdict == "missed"
    assert found[f"{ask.words}: gateway over {INFINITY}"].verdict == "reached"
    assert [each.verdict for each in found.values()][2:] == ["not measured", "missed"]


def test_scores_come_in_the_order_of_the_request() -> None:
    body = b'{"results":[{"index":1,"relevance_score":0.5},{"index":0,"relevance_score":-1}]}'
    assert scores_of(Reply(200, {}, body)).tolist() == [[-1.0], [0.5]]
    assert scores([(1, 0.5), (0, -1.0)]) == [-1.0, 0.5]
    with pytest.raises(AssertionError):
        scores([(1, -1.0), (0, 0.5)])
