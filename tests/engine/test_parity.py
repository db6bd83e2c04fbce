"""The engine's vectors against the reference's: our goldens, published ones, and people's judgement.

`bench/quality.py` measures; this file says how good is good enough. Of each kind of golden text every fourth is
embedded here, and all of them by `make thorough`.
"""

import json
from collections.abc import AsyncIterator
from random import Random
from typing import Any

import numpy as np
import pytest
import pytest_asyncio

from bench import quality
from bench.quality import Engine, Ids
from bench.rig.http import Vectors
from tests.data import model_folder, outside_data, quick_or
from tests.engine.goldens import Goldens, read_goldens

pytestmark = [pytest.mark.model, pytest.mark.asyncio(loop_scope="module")]

REFERENCE_DIFF_MAX = 1e-5  # the promise; the reference itself is 2e-7 from float64
NEIGHBOURS_DIFF_MAX = 1e-6  # a text's vector may not tell who shared its batch
SPEARMAN = {"dev": 91.34, "test": 90.79, "all": 91.03}  # percent, of exact fp32
SPEARMAN_DIFF_MAX = 0.01
EVERY = quick_or(1, quick=4)  # of the golden texts of a kind
MANY = quick_or(quality.MANY, quick=60)  # texts of one call, many batches
EDGES = (127, 128, 129, 130, 255, 256)  # tokens
TANH_GELU_DIFF_MAX = 3e-4  # one published golden used the tanh form, 2.5e-4 from the exact one


@pytest.fixture(scope="module")
def goldens() -> Goldens:
    return read_goldens()


@pytest.fixture(scope="module")
def tried(goldens: Goldens) -> Goldens:
    """Those that are embedded: some of each kind, one at each edge, and nothing but white space."""
    rows = {at for kind in set(goldens.kinds) for at in np.flatnonzero(np.array(goldens.kinds) == kind)[::EVERY]}
    rows |= {goldens.tokens.index(edge) for edge in EDGES} | {goldens.texts.index(" ")}
    return goldens.at(sorted(map(int, rows)))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine() -> AsyncIterator[Engine]:
    async with quality.started(model_folder()) as engine:
        yield engine


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def alone(engine: Engine, tried: Goldens) -> Vectors:
    """Our vector of each golden text that is tried, each in a batch of its own."""
    return await quality.one_by_one(engine, quality.golden_ids(engine.tokenizer, tried))


@pytest.fixture(scope="module")
def published() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(outside_data("goldens_all_minilm_l6_v2.json").read_text(encoding="utf-8"))
    return found


async def embed_text(engine: Engine, text: str) -> Vectors:
    """One text's vector, shape (width,)."""
    row: Vectors = (await engine.embed(engine.tokenizer.ids([text])))[0]
    return row


async def test_goldens_cover_every_length_and_the_edges(goldens: Goldens) -> None:
    """At least 200 texts, one of every length up to the limit, several at 128 and at 256, none of them twice."""
    assert len(set(goldens.texts)) == len(goldens.texts) == len(goldens.vectors) >= 200
    assert set(range(3, 257)) <= set(goldens.tokens)
    assert goldens.max_tokens == max(goldens.tokens) == 256
    for edge in EDGES:
        assert goldens.tokens.count(edge) >= 5
    assert np.allclose(np.linalg.norm(goldens.vectors, axis=1), 1, atol=1e-6)


async def test_token_counts_are_the_reference_s(engine: Engine, goldens: Goldens) -> None:
    """Each text has as many tokens here as in sentence-transformers, special tokens included; none stops at 128."""
    ids = quality.golden_ids(engine.tokenizer, goldens)
    assert [len(each) + engine.tokenizer.specials for each in ids] == goldens.tokens


async def test_vectors_are_the_reference_s(alone: Vectors, tried: Goldens) -> None:
    """Every component of every vector is within 1e-5 of sentence-transformers in fp32."""
    gaps = np.abs(alone - tried.vectors).max(axis=1)
    worst = int(gaps.argmax())
    assert gaps[worst] <= REFERENCE_DIFF_MAX, f"a text of {tried.tokens[worst]} tokens, {tried.kinds[worst]}"


async def test_vectors_have_unit_length(alone: Vectors) -> None:
    """Every vector is as wide as the model, float32, finite and of length one."""
    assert alone.dtype == np.float32
    assert alone.shape[1] == 384
    assert np.abs(np.linalg.norm(alone.astype(np.float64), axis=1) - 1).max() <= 1e-6


@pytest.mark.parametrize("tokens", EDGES)
async def test_tokens_past_128_count(engine: Engine, tried: Goldens, alone: Vectors, tokens: int) -> None:
    """The last token of a text moves its vector, also past the 128 at which the tokenizer's own file would cut."""
    at = tried.tokens.index(tokens)
    ids = quality.golden_ids(engine.tokenizer, tried)[at]
    (shorter,) = await engine.embed([ids[:-1]])
    assert np.abs(shorter - alone[at]).max() > 100 * REFERENCE_DIFF_MAX


async def test_neighbours_do_not_matter(engine: Engine, tried: Goldens, alone: Vectors) -> None:
    """A text alone and the same text in any batch, of any size, in any order, also of other callers: within 1e-6."""
    ids = quality.golden_ids(engine.tokenizer, tried)
    moved = await quality.mixed(engine, ids, alone, Random(quality.SEED), MANY)
    assert moved.max_abs <= NEIGHBOURS_DIFF_MAX


async def test_a_text_of_no_tokens_has_a_vector(engine: Engine, tried: Goldens) -> None:
    """A text of nothing but white space still has its special tokens, and so the reference's vector."""
    at = tried.texts.index(" ")
    nothing: Ids = [[]]
    assert np.abs((await engine.embed(nothing))[0] - tried.vectors[at]).max() <= REFERENCE_DIFF_MAX


async def test_stsb_captions_rank_as_published(engine: Engine) -> None:
    """Cosines order 750 pairs of captions as people do: Spearman 91.03 ± 0.01 over all, and as measured by split."""
    pairs = quality.read_pairs(outside_data(quality.STSB))
    assert len(pairs) == 750
    found = await quality.agreement(engine, pairs)
    assert found == pytest.approx(SPEARMAN, abs=SPEARMAN_DIFF_MAX)


async def test_published_vectors(engine: Engine, published: dict[str, Any]) -> None:
    """Vectors that other projects publish for this model, each within the tolerance that it states."""
    fastembed, ollama, tei = published["vectors"]

    ours = await embed_text(engine, fastembed["input"])
    assert fastembed["source_tolerance"] == "1e-3 abs"
    assert np.abs(ours[:5] - fastembed["first_values"]).max() <= 1e-3

    ours = await embed_text(engine, ollama["input"])
    theirs = np.array(ollama["values"])
    assert ollama["source_tolerance"] == "cosine >= 0.99"
    assert ours @ theirs / np.linalg.norm(theirs) >= 0.99

    ours = (await embed_text(engine, tei["input"]))[: tei["dimensions"]]
    assert np.abs(ours / np.linalg.norm(ours) - tei["values"]).max() <= TANH_GELU_DIFF_MAX


async def test_published_token_counts(engine: Engine, published: dict[str, Any]) -> None:
    """Token counts that other projects publish for this vocabulary, special tokens included."""
    found = [entry for source in published["token_counts_with_specials"] for entry in source.items()]
    found += [(item["input"], item["prompt_tokens"]) for item in published["vectors"] if "prompt_tokens" in item]
    counts = {text: count for text, count in found if text != "source"}
    assert len(counts) == 3
    for text, count in counts.items():
        assert len(engine.tokenizer.ids([text])[0]) + engine.tokenizer.specials == count


@pytest.mark.parametrize(
    ("ours", "theirs", "correlation"),
    [
        ([1, 2, 3], [10, 20, 30], 1),
        ([1, 2, 3], [3, 2, 1], -1),
        ([1, 2, 3, 4], [1, 8, 27, 64], 1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138),  # 3 / sqrt(10): the tie shares ranks 2 and 3
        ([5, 5, 1, 1], [2, 2, 9, 9], -1),
    ],
)
async def test_spearman(ours: list[float], theirs: list[float], correlation: float) -> None:
    """Rank correlations worked out by hand, ties included."""
    assert quality.spearman(ours, theirs) == pytest.approx(correlation)
