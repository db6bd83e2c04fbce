"""A node that reranks, over its socket: pairs in the compact form, one float a pair."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from embedmesh.engine.folder import digest, read_folder
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.embeddings import ENDS_FIRST, EmbedVectors, numbers_of
from embedmesh.rules.models import RERANK, Model
from tests.engine.test_rerankers import GOLDENS, cut_pairs, golden
from tests.engine.tiny import write_safetensors
from tests.node.live_node import Node, rows

pytestmark = pytest.mark.story

TYPED, UNTYPED, ZERO = "tests/bert", "tests/roberta", "tests/zero"


def zeroed(folder: Path) -> Path:
    """The same model, whose every score is 0."""
    shutil.copytree(GOLDENS / "bert", folder)
    weights = Weights(folder)
    arrays = {name: weights.get(name, *entry.shape) for name, entry in weights.entries()}
    arrays |= {name: np.zeros_like(array) for name, array in arrays.items() if name.startswith("classifier.")}
    write_safetensors(folder / "zero.safetensors", arrays)
    (folder / "zero.safetensors").rename(folder / "model.safetensors")
    return folder


def entry(name: str, folder: Path) -> Model:
    read = read_folder(folder)
    assert read.scores is not None
    return Model(
        id=name, folder=str(folder), width=1, max_tokens=40, price=1, digest=digest(folder), modalities=RERANK,
        scores=read.scores,
    )  # fmt: skip


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    folders = {TYPED: GOLDENS / "bert", UNTYPED: GOLDENS / "roberta"}
    folders[ZERO] = zeroed(tmp_path_factory.mktemp("models") / "zero")
    node = Node([entry(*each) for each in folders.items()], tmp_path_factory.mktemp("run") / "node.sock")
    try:
        node.until(200)
        yield node
    finally:
        node.end()


@pytest.mark.parametrize(("name", "folder"), [(TYPED, "bert"), (UNTYPED, "roberta")])
def test_pairs_get_their_logits(node: Node, name: str, folder: str) -> None:
    """With and without token types; equal pairs get the same bytes, wherever they stand."""
    pairs = [numbers_of(pair) for pair in cut_pairs(folder)[1]]
    reply = node.compact([*pairs, *reversed(pairs)], name)
    got = rows(reply, 1)[:, 0]
    found = golden(folder)
    assert np.abs(got[: len(pairs)] - found["logits"]).max() <= 1e-5
    assert (got[: len(pairs)] == got[len(pairs) :][::-1]).all()
    assert msgspec.msgpack.decode(reply.content, type=EmbedVectors).tokens == 2 * found["lengths"].sum()


def test_a_score_may_be_zero(node: Node) -> None:
    """A vector of nothing but zeros is an engine's fault, a score of 0 is not."""
    pairs = [numbers_of(pair) for pair in cut_pairs("bert")[1]]
    assert not rows(node.compact(pairs, ZERO), 1).any()


MARK = ENDS_FIRST | 3  # [SEP]


@pytest.mark.parametrize(
    ("pair", "code"),
    [
        ([5, 3, 6], "invalid_value"),
        ([], "invalid_value"),
        ([5, MARK, 6, MARK, 7], "invalid_value"),
        ([5, ENDS_FIRST | 5, 6], "invalid_value"),
        ([5, MARK, 5_000], "invalid_value"),
        ([5, MARK, ENDS_FIRST | 6], "invalid_value"),
        ([5, MARK, *[6] * 37], "context_length_exceeded"),
    ],
)
def test_what_is_no_pair_is_refused(node: Node, pair: list[int], code: str) -> None:
    reply = node.compact([[5, MARK, 6], pair], TYPED)
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, code)
    assert reply.json()["error"]["param"] == "input.1"


def test_a_pair_may_be_of_nothing_but_its_mark(node: Node) -> None:
    """A query of white space and an empty document: the special tokens are left."""
    assert np.isfinite(rows(node.compact([[MARK]], TYPED), 1)).all()


def test_the_public_form_makes_vectors_only(node: Node) -> None:
    reply = node.embed(model=TYPED, input=["a"])
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "unsupported_modality")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (
            {"scores": "sigmoid"},
            "By the catalogue tests/bert has scores of the kind sigmoid; its folder has scores of the kind raw.",
        ),
        (
            {"modalities": ("embeddings",), "scores": "sigmoid"},
            "By the catalogue tests/bert makes vectors; its folder has scores",
        ),
    ],
)
def test_a_catalogue_that_says_otherwise_is_refused(changed: dict[str, str], says: str, tmp_path: Path) -> None:
    model = msgspec.structs.replace(entry(TYPED, GOLDENS / "bert"), **changed)
    code, said = Node(model, tmp_path / "node.sock").end_by_itself()
    assert (code, says in said) == (78, True), said
