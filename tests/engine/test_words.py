"""Ids word by word are those of the tokenizer, to the last one; what is not sure to be is left to it."""

import json
import string
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace

from embedmesh.engine import words as module
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.engine.words import LEARNT_MAX, WORD_CHARS_MAX, WORDS_MAX, Words, words_of
from tests.data import find_model_folder

PIECES = ["[UNK]", "[CLS]", "[SEP]", "[MASK]", "[PAD]", "un", "##believ", "##able", "river", "##s", "don", "'", "t"]
SPECIALS = PIECES[:5]
FRAGMENTS = [*PIECES, "##", " ", "  ", "\t", "\n", "\r\n", "a" * 101, "...", "Unbelievable", "[MASK", "]x", "0", "é"]


def tiny(**changed: object) -> Tokenizer:
    """A WordPiece tokenizer of its own letters, with BERT's rules, unless something is `changed`."""
    letters = [*string.ascii_lowercase, *(f"##{each}" for each in string.ascii_lowercase), *string.digits]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys([*PIECES, *letters, *string.punctuation]))}
    model = changed.get("model") or WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = changed.get("normalizer") or BertNormalizer(lowercase=True)  # type: ignore[assignment]
    tokenizer.pre_tokenizer = changed.get("pre_tokenizer") or BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.add_special_tokens([AddedToken(each, lstrip=each == "[MASK]", special=True) for each in SPECIALS])
    return tokenizer


def real() -> Tokenizer:
    folder = find_model_folder()
    if folder is None:
        pytest.skip("the default model is not here: `make serve` fetches it")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("make", [tiny, real])
def test_ids_of_random_texts_are_the_tokenizers(make: object) -> None:
    """Of fragments in any order, with and without white space between them."""
    tokenizer = make()  # type: ignore[operator]
    words = words_of(tokenizer)
    assert words is not None
    dice = Random(7)
    known = [*FRAGMENTS, *map(chr, range(32, 127))]
    for _ in range(4_000):
        text = "".join(dice.choices(known, k=dice.randint(0, 14)))
        ids = words.ids(text)
        assert ids is None if "é" in text else ids == whole(tokenizer, text), text


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF)))
def test_whatever_is_given_it_is_right_or_left_to_the_tokenizer(text: str) -> None:
    ids = SHARED.ids(text)
    assert ids is None or ids == whole(TINY, text)
    assert ids is None or all(character in "\t\n\r" or " " <= character <= "~" for character in text)


TINY = tiny()
SHARED = Words(TINY)


@pytest.mark.parametrize("character", ["\0", "\x0b", "\x0c", "\x1c", "\x7f", "\xa0", "é", "\u200b", "日"])
def test_other_characters_are_left_to_the_tokenizer(character: str) -> None:
    """Normalizers drop them, join over them, or take them for white space."""
    assert SHARED.ids(f"river {character} don") is None


def test_a_models_ids_are_the_librarys_for_mixed_texts() -> None:
    folder = find_model_folder()
    if folder is None:
        pytest.skip("the default model is not here: `make serve` fetches it")
    texts = ["hello world", "日本語の文", "", "[MASK] un-believable\tx", "naïve", "a" * 300]
    tokenizer = real()
    expected = [whole(tokenizer, text) for text in texts]
    model = ModelTokenizer(folder, 256)
    assert model.ids(texts) == expected
    assert [model.ids([text])[0] for text in texts] == expected
    assert model.ids(texts) == expected, "and again, remembered"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two generations; what is used again stays through both."""
    monkeypatch.setattr(module, "WORDS_MAX", 1_000)
    words = Words(TINY)
    for number in range(0, 5_000, 50):
        text = " ".join(["river", *(f"w{each}" for each in range(number, number + 50))])
        assert words.ids(text) == whole(TINY, text)
        assert "river" in words._young
        assert len(words._young) <= 1_000 >= len(words._old)
    assert WORDS_MAX > LEARNT_MAX


def test_long_words_and_texts_of_new_words_are_not_remembered() -> None:
    words = Words(TINY)
    text = " ".join(["x" * WORD_CHARS_MAX, "y" * (WORD_CHARS_MAX + 1)])
    assert words.ids(text) == whole(TINY, text)
    assert list(words._young) == ["x" * WORD_CHARS_MAX]
    many = " ".join(f"w{each}" for each in range(LEARNT_MAX + 1))
    assert words.ids(many) == whole(TINY, many)
    assert len(words._young) == 1


@pytest.mark.parametrize(
    "changed",
    [{"model": BPE()}, {"normalizer": Lowercase()}, {"pre_tokenizer": Whitespace()}],
    ids=["BPE", "another normalizer", "another cut"],
)
def test_other_tokenizers_are_left_alone(changed: dict[str, object]) -> None:
    assert words_of(tiny(**changed)) is None


def test_a_token_with_white_space_in_it_is_found_before_any_cut(tmp_path: Path) -> None:
    tokenizer = tiny()
    tokenizer.add_tokens(["river bank"])
    assert words_of(tokenizer) is None
    plain = tiny()
    plain.normalizer = None  # type: ignore[assignment]
    assert json.loads(plain.to_str())["normalizer"] is None
    assert words_of(plain) is None


def test_two_threads_may_use_it_at_one_time() -> None:
    words = Words(TINY)
    texts = [" ".join(Random(number).choices(string.ascii_lowercase, k=40)) for number in range(200)]
    expected = [whole(TINY, text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(words.ids, texts * 5)) == expected * 5
