"""Our limits and not the file's; otherwise just what the tokenizer itself would say."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.errors import SetupError
from tests.data import model_folder, outside_data
from tests.engine.tiny import make_folder


@pytest.fixture(scope="module")
def both() -> tuple[ModelTokenizer, Tokenizer]:
    """Ours, and the library's own with padding and truncation off, of the default model."""
    folder = model_folder()
    theirs = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.no_padding()
    theirs.no_truncation()
    return ModelTokenizer(folder, 256), theirs


def agree(both: tuple[ModelTokenizer, Tokenizer], texts: list[str]) -> None:
    ours, theirs = both
    expected = [theirs.encode(text, add_special_tokens=True).ids for text in texts]
    assert [ours.with_specials(ids) for ids in ours.ids(texts)] == expected
    assert [ours.with_specials(ours.ids([text])[0]) for text in texts] == expected


@pytest.mark.model
@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=60), min_size=1, max_size=5))
def test_any_unicode_is_tokenised_as_the_library_does(both: tuple[ModelTokenizer, Tokenizer], texts: list[str]) -> None:
    agree(both, texts)


@pytest.mark.model
def test_naughty_strings_too(both: tuple[ModelTokenizer, Tokenizer]) -> None:
    agree(both, json.loads(outside_data("naughty_strings.json").read_text(encoding="utf-8")))


@pytest.mark.model
@pytest.mark.parametrize(
    "text", ["[CLS]", "a [SEP] b", "[MASK][PAD]", "[cls]", "[UNK]", "##ing", "", " ", "\0", "\ufffd"]
)
def test_what_looks_special_is_taken_as_the_library_does(both: tuple[ModelTokenizer, Tokenizer], text: str) -> None:
    agree(both, [text, "hello"])


@pytest.mark.model
def test_the_default_model_s_vocabulary(both: tuple[ModelTokenizer, Tokenizer]) -> None:
    ours, _ = both
    assert (ours.specials, ours.vocab_size, ours.special_ids) == (2, 30_522, frozenset({0, 100, 101, 102, 103}))


def test_the_file_s_own_cut_and_padding_do_not_count(tmp_path: Path) -> None:
    """The tiny model's tokenizer.json cuts and pads to 8, as the default model's does to 128."""
    tokenizer = ModelTokenizer(make_folder(tmp_path / "tiny"), 48)
    assert len(tokenizer.ids(["w1 " * 100])[0]) == 100
    assert [len(ids) for ids in tokenizer.ids(["w1", "w1 w2"])] == [1, 2]
    assert tokenizer.with_specials([7]) == [2, 7, 3]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_tokenizer_that_is_missing_or_broken_is_a_setup_error(tmp_path: Path, content: str | None) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SetupError, match=r"tokenizer\.json"):
        ModelTokenizer(folder, 48)
