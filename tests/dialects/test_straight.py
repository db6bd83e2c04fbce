"""What the ordinary request's parser reads, the full parser reads alike; all else it leaves to that."""

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedmesh.catalogue import Catalogue
from embedmesh.dialects.openai.parse import parse
from embedmesh.dialects.openai.straight import TEXTS_MAX, parse_ordinary
from embedmesh.rules.errors import Failure, UnsupportedModality
from embedmesh.rules.models import Model
from tests.flow.world import CATALOGUE, MODEL

TEXT = st.text(st.characters(codec="utf-8"), max_size=8) | st.sampled_from(["", "\0", "é", "\u2028", "😀"])
MEMBERS: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from([MODEL.id, "tiny", "tiny:exact", "no", "", None, 3]),
    "input": TEXT | st.lists(TEXT, max_size=3) | st.none() | st.integers() | st.lists(st.integers(0, 9), max_size=2),
    "encoding_format": st.sampled_from(["float", "base64", "hex", None, 1]),
    "user": TEXT | st.none(),
    "dimensions": st.integers(-1, 5) | st.none(),
    "odd": st.booleans(),
}
BODIES = st.fixed_dictionaries({}, optional=MEMBERS).map(lambda said: json.dumps(said).encode())


@st.composite
def spoilt(draw: st.DrawFn) -> bytes:
    """A body in which a few bytes are others, twice there, or missing."""
    body = bytearray(draw(BODIES))
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        body[at : at + draw(st.integers(0, 2))] = draw(
            st.binary(max_size=2) | st.sampled_from([b'"', b"\\", b",", b"}"])
        )
    return bytes(body)


@given(body=BODIES | spoilt() | st.binary(max_size=30))
@example(body=b'{"model":"no","model":"tiny","input":"a"}')
@example(body=b'{"model":"tiny","input":"a","input":"b"}')
@example(body=b'{"model":"tiny","input":"\\ud800"}')
@example(body=b'{"model":"tiny","input":"\\ud83d\\ude00"}')
@example(body=b'{"model":"tiny","input":"\xff"}')
@example(body=b'{"model":"tiny","input":"\xed\xa0\x80"}')
@example(body=b'{"model":"tiny","input":"a\nb"}')
@example(body=b'{"model":"tiny","input":"a","encoding_format":null}')
@example(body=b'\xef\xbb\xbf{"model":"tiny","input":"a"}')
@example(body=b'{"model":"tiny","input":"a"} ')
@example(body=b'{"model":"tiny","input":"a"}\0')
@example(body=b'{"mod\\u0065l":"tiny","input":"a"}')
@example(body=b'{"model":"tiny","input":"a",}')
def test_both_read_alike(body: bytes) -> None:
    ordinary = parse_ordinary(body, CATALOGUE)
    if ordinary is not None:
        assert ordinary == parse(body, CATALOGUE)


def test_what_does_not_embed_is_refused_by_name() -> None:
    """The straight path would give a reranker's node an input that is no pair, and count its refusal against it."""
    reranker = Model(id="r", width=1, max_tokens=9, price=1, folder="f", digest="0" * 64, modalities=("rerank",))
    catalogue, body = Catalogue((reranker,)), b'{"model":"r","input":"a"}'
    assert parse_ordinary(body, catalogue) is None
    with pytest.raises(UnsupportedModality, match=r"reranks documents \(POST /v1/rerank\)"):
        parse(body, catalogue)


@pytest.mark.parametrize("encoding", ["float", "base64", None])
@pytest.mark.parametrize("asked", ["a", ["a"], ["a", "b"], ["a"] * TEXTS_MAX])
def test_it_reads_what_is_ordinary(asked: Any, encoding: str | None) -> None:
    """The other test says that it reads right; this, that it reads at all."""
    body = json.dumps({"model": "tiny", "input": asked, "encoding_format": encoding}).encode()
    assert parse_ordinary(body, CATALOGUE) == parse(body, CATALOGUE)


def test_many_texts_are_left_alone() -> None:
    body = json.dumps({"model": "tiny", "input": ["a"] * (TEXTS_MAX + 1)}).encode()
    assert parse_ordinary(body, CATALOGUE) is None


def test_it_never_refuses() -> None:
    with pytest.raises(Failure):
        parse(b"{", CATALOGUE)
    assert parse_ordinary(b"{", CATALOGUE) is None
