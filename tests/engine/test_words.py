"""Ids word by word are those of the tokenizer, to the last one; what is not sure to be is left to it."""

import json
import string
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from random import Random
from threading import Barrier, BrokenBarrierError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace

from embedmesh.engine import words as module
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.engine.words import LEARNT_MAX, WORD_CHARS_MAX, WORD_TOKENS_MAX, WORDS_MAX, Words, words_of
from tests.data import find_model_folder
from tests.engine.tiny import make_folder

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
def test_ids_of_random_texts_are_the_tokenizers(make: Callable[[], Tokenizer]) -> None:
    """Of fragments in any order, with and without white space between them."""
    tokenizer = make()
    words = words_of(tokenizer)
    assert words is not None
    dice = Random(7)
    known = [*FRAGMENTS, *map(chr, range(32, 127))]
    for _ in range(2_500):
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


NASTY = [
    "",
    " ",
    "\t\n\r \r\n",
    "[MASK]",
    "[MASK][MASK] [MASK]",
    "un[MASK]able",
    " [MASK] ",
    "river\t[MASK]\nriver  [MASK]  un[SEP] [SEP]un",
    "[mask] [ MASK ] [MASK",
    "## ##s s## river##s # ###",
    "don't ... (river), a-b_c/d~e^f`g",
    string.printable[:95],
    "a" * 100,
    "a" * 101,
    "a" * 101 + "." + "b" * 100 + " river",
    "river " * 3_000,
    "x" * 20_000,
    " " * 20_000 + "rivers",
    "<mask> x<mask><mask> <mask>\n<mask>y <MASK>",
]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("make", [tiny, real])
def test_nasty_texts_have_the_tokenizers_ids(make: Callable[[], Tokenizer], text: str) -> None:
    """When they are new, among others, and when they are remembered."""
    tokenizer = make()
    words = words_of(tokenizer)
    assert words is not None
    for given_text in (text, text, f"un {text} river", f"x{text}\ty"):
        assert words.ids(given_text) == whole(tokenizer, given_text)


@pytest.fixture(scope="module", params=[tiny, real])
def both(request: pytest.FixtureRequest) -> tuple[Words, Tokenizer]:
    """What remembers the words of all texts of a test, and the tokenizer itself."""
    tokenizer = request.param()
    return Words(tokenizer), tokenizer


@given(text=st.text(alphabet=[*map(chr, range(32, 127)), "\t", "\n", "\r"]))
def test_any_printable_ascii_is_known_word_by_word(both: tuple[Words, Tokenizer], text: str) -> None:
    words, tokenizer = both
    assert words.ids(text) == whole(tokenizer, text)


@pytest.mark.parametrize(
    "how",
    [{}, {"lstrip": True}, {"single_word": True}, {"normalized": True}, {"normalized": True, "lstrip": True}],
    ids=str,
)
def test_added_tokens_of_any_kind_belong_to_their_word(how: dict[str, bool]) -> None:
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("<mask>", **({"normalized": False} | how))])
    words = words_of(tokenizer)
    assert words is not None
    dice = Random(11)
    for _ in range(1_000):
        text = "".join(dice.choices(["<mask>", "<MASK>", "<mask", " ", "\n", "river", "un", "[MASK]", "."], k=8))
        assert words.ids(text) == whole(tokenizer, text), text


def test_an_added_token_that_takes_in_the_space_behind_it_is_left_to_the_tokenizer() -> None:
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("<mask>", rstrip=True)])
    assert words_of(tokenizer) is None


@pytest.mark.parametrize("how", [{}, {"lstrip": True}, {"single_word": True}], ids=str)
def test_an_added_token_of_which_normalizing_leaves_nothing_is_left_to_the_tokenizer(how: dict[str, bool]) -> None:
    """The tokenizer finds it between any two characters, and takes in white space that belongs to no word."""
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("\xad", normalized=True, **how)])
    assert words_of(tokenizer) is None


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


def test_a_tiny_models_ids_are_the_librarys_for_mixed_texts(tmp_path: Path) -> None:
    """Those that are left to the tokenizer come back in their places, one or several, first or last."""
    folder = make_folder(tmp_path / "tiny")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    model, dice = ModelTokenizer(folder, 48), Random(5)
    known = [
        "w1 w2",
        "W3\tw4",
        "",
        " ",
        "w5\xa0w6",
        "w7\0",
        "w8\x0bw9",
        "\x0c",
        "w1\x7f",
        "wé w2",
        "[SEP] w3",
        "w" * 101,
    ]
    for _ in range(100):
        texts = dice.choices(known, k=dice.randint(1, 5))
        assert model.ids(texts) == [whole(tokenizer, text) for text in texts]


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


def test_many_new_words_do_not_fill_the_memory() -> None:
    """At the limits that we ship: each generation is made anew more than once."""
    words = Words(TINY)
    made_anew = 0
    for start in range(0, 3 * WORDS_MAX, LEARNT_MAX - 1):
        before = words._old
        words.ids(" ".join(["river", *(str(number) for number in range(start, start + LEARNT_MAX - 1))]))
        made_anew += words._old is not before
        assert max(len(words._young), len(words._old)) <= WORDS_MAX
        assert "river" in words._young
    assert made_anew >= 2
    assert words.ids("river rivers 7") == whole(TINY, "river rivers 7"), "the last one had been forgotten"


def test_what_is_used_of_the_old_generation_comes_into_the_young_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not looked up in the tokenizer again."""
    monkeypatch.setattr(module, "WORDS_MAX", 4)
    words = Words(TINY)
    words.ids("river un")
    words.ids("a b c")
    assert (set(words._young), set(words._old)) == ({"a", "b", "c"}, {"river", "un"})
    monkeypatch.setattr(words, "_find", lambda missing: {} if not missing else pytest.fail(f"{missing} were known"))
    assert words.ids("river a") == whole(TINY, "river a")
    assert "river" in words._young


def test_long_words_and_texts_of_new_words_are_not_remembered() -> None:
    """A word is long by its letters or by its tokens; a number that is not in the vocabulary is one token."""
    words = Words(TINY)
    unknown = "1" * WORD_CHARS_MAX
    text = " ".join(["%" * WORD_TOKENS_MAX, "%" * (WORD_TOKENS_MAX + 1), unknown, unknown + "1"])
    for _ in range(2):
        assert words.ids(text) == whole(TINY, text)
        assert set(words._young) == {"%" * WORD_TOKENS_MAX, unknown}
    many = " ".join(f"w{each}" for each in range(LEARNT_MAX + 1))
    assert words.ids(many) == whole(TINY, many)
    assert len(words._young) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"model": BPE()},
        {"model": Unigram()},
        {"model": WordLevel({"[UNK]": 0}, unk_token="[UNK]")},
        {"normalizer": Lowercase()},
        {"normalizer": Sequence([BertNormalizer()])},
        {"pre_tokenizer": Whitespace()},
    ],
    ids=["BPE", "Unigram", "whole words", "another normalizer", "several normalizers", "another cut"],
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


class Meeting(dict[str, tuple[int, ...]]):
    """Who asks how much is in it waits until a second one asks, or for a moment where nobody else may."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Barrier(2)

    def __len__(self) -> int:
        length = super().__len__()
        with suppress(BrokenBarrierError):
            self.both.wait(0.3)
        return length


def test_threads_that_learn_at_one_time_keep_to_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for the words of either, and not of both."""
    monkeypatch.setattr(module, "WORDS_MAX", 100)
    words = Words(TINY)
    words._young = Meeting()
    texts = [" ".join(str(each) for each in range(start, start + 60)) for start in (100, 200)]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(words.ids, texts)) == [whole(TINY, text) for text in texts]
    assert [len(list(known)) for known in (words._young, words._old)] == [60, 60]
