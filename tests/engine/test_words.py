"""Ids word by word are those of the tokenizer, to the last one; what is not sure to be is left to it."""

import copy
import json
import string
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence
from tokenizers.pre_tokenizers import Whitespace

from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.engine.words import OTHER_COST_MIN, TooDear, Words, words_of
from embedmesh.rules.embeddings import bytes_of, numbers_of
from tests.data import find_model_folder
from tests.engine.kinds import PIECES, SPECIALS, byte_pairs, save, tiny, unigram
from tests.engine.tiny import make_folder

FRAGMENTS = [*PIECES, "##", " ", "  ", "\t", "\n", "\r\n", "a" * 101, "...", "Unbelievable", "[MASK", "]x", "0", "é"]


def real() -> Tokenizer:
    folder = find_model_folder()
    if folder is None:
        pytest.skip("the default model is not here: `make serve` fetches it")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def ids_of(words: Words, text: str) -> list[int] | None:
    (packed,) = words.packed([text])
    return None if packed is None else numbers_of(packed)


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
        ids = ids_of(words, text)
        left = "é" in text or any(special.lower() in text.lower() for special in SPECIALS)
        assert ids is None if left else ids == whole(tokenizer, text), text


@given(st.text(alphabet=st.characters(max_codepoint=0x2FF)))
def test_whatever_is_given_it_is_right_or_left_to_the_tokenizer(text: str) -> None:
    assert SHARED is not None
    ids = ids_of(SHARED, text)
    assert ids is None or ids == whole(TINY, text)
    assert ids is None or all(character in "\t\n\r" or " " <= character <= "~" for character in text)


TINY = tiny()
SHARED = words_of(TINY)
assert SHARED is not None


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
    """By themselves and among others. A text in which an added token may be is left to the tokenizer."""
    tokenizer = make()
    words = words_of(tokenizer)
    assert words is not None
    for given_text in (text, f"un {text} river", f"x{text}\ty"):
        ids = ids_of(words, given_text)
        assert ids == whole(tokenizer, given_text) or (ids is None and "[" in text)


@pytest.fixture(scope="module", params=[tiny, real])
def both(request: pytest.FixtureRequest) -> tuple[Words, Tokenizer]:
    """What knows the words, and the tokenizer itself."""
    tokenizer = request.param()
    words = words_of(tokenizer)
    assert words is not None
    return words, tokenizer


@given(text=st.text(alphabet=[*map(chr, range(32, 127)), "\t", "\n", "\r"]))
def test_any_printable_ascii_is_known_word_by_word(both: tuple[Words, Tokenizer], text: str) -> None:
    words, tokenizer = both
    ids = ids_of(words, text)
    assert ids == whole(tokenizer, text) or (ids is None and "[" in text)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"lstrip": True},
        {"rstrip": True},
        {"single_word": True},
        {"normalized": True},
        {"normalized": True, "lstrip": True},
    ],
    ids=str,
)
def test_texts_with_added_tokens_of_any_kind_are_left_to_the_tokenizer(how: dict[str, bool]) -> None:
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("<mask>", **({"normalized": False} | how))])
    words = words_of(tokenizer)
    assert words is not None
    dice = Random(11)
    for _ in range(1_000):
        text = "".join(dice.choices(["<mask>", "<MASK>", "<mask", " ", "\n", "river", "un", "[MASK]", "."], k=8))
        ids = ids_of(words, text)
        assert ids == whole(tokenizer, text) or (ids is None and ("mask" in text.lower())), text


@pytest.mark.parametrize("how", [{}, {"lstrip": True}, {"single_word": True}], ids=str)
def test_an_added_token_of_which_normalizing_leaves_nothing_is_left_to_the_tokenizer(how: dict[str, bool]) -> None:
    """The tokenizer finds it between any two characters, and takes in white space that belongs to no word."""
    tokenizer = tiny()
    tokenizer.add_tokens([AddedToken("\xad", normalized=True, **how)])
    assert words_of(tokenizer) is None


@pytest.mark.parametrize("character", ["\0", "\x0b", "\x0c", "\x1c", "\x7f", "\xa0", "é", "\u200b", "日"])
def test_other_characters_are_left_to_the_tokenizer(character: str) -> None:
    """Normalizers drop them, join over them, or take them for white space."""
    assert SHARED is not None
    assert ids_of(SHARED, f"river {character} don") is None


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


def test_words_that_take_many_look_ups_are_bounded_where_that_is_asked_for() -> None:
    """Over all texts together; a word that the vocabulary holds whole costs nothing."""
    words = words_of(TINY)
    assert words is not None
    texts = ["river don! " * 1_000, "rivers " * 3, "un-rivers"]
    cost = 4 * (len("rivers") ** 2 + OTHER_COST_MIN)
    assert words.packed(texts, cost) == [bytes_of(whole(TINY, text)) for text in texts]
    with pytest.raises(TooDear):
        words.packed(texts, cost - 1)
    short = ["qx " * 1_000]  # half a microsecond each, however short
    cost = (len("qx") ** 2 + OTHER_COST_MIN) * 1_000
    assert words.packed(short, cost) == [bytes_of(whole(TINY, short[0]))]
    with pytest.raises(TooDear):
        words.packed(short, cost - 1)


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


def test_a_text_with_a_token_that_has_white_space_in_it_is_left_to_the_tokenizer() -> None:
    tokenizer = tiny()
    tokenizer.add_tokens(["River bank"])
    words = words_of(tokenizer)
    assert words is not None
    assert ids_of(words, "un river bank") is None
    assert ids_of(words, "river un bank") == whole(tokenizer, "river un bank")
    plain = tiny()
    plain.normalizer = None
    assert json.loads(plain.to_str())["normalizer"] is None
    assert words_of(plain) is None


def _state(of: object) -> object:
    return copy.deepcopy(vars(of))


def test_nothing_is_remembered_of_what_was_asked() -> None:
    """Whatever texts it was given, it is what it was."""
    words = words_of(TINY)
    assert words is not None
    before = _state(words)
    for number in range(2_000):
        words.packed([f"river w{number} unbelievable{number} [MASK] \u00e9{number}"])
    assert _state(words) == before


TOLD_APART = 0.55
PAIRS = 1_000  # 200 of them would be told apart in more than 55 % by chance in one try of twelve


@pytest.mark.parametrize("kind", ["words", "others", "byte pairs", "Unigram"])
def test_a_text_that_another_account_has_sent_takes_as_long_as_one_that_nobody_has(tmp_path: Path, kind: str) -> None:
    """Of pairs alike, which was seen before cannot be told by the time it takes."""
    library = {"byte pairs": lambda: byte_pairs(None, prefix_space=False), "Unigram": unigram}.get(kind, tiny)()
    folder = save(tmp_path, library)
    model, dice = ModelTokenizer(folder, 48), Random(3)

    def text() -> str:
        words = ["".join(dice.choices("abcdefghij", k=9)) for _ in range(12)]
        return " ".join(words) + (" \u00e9" if kind == "others" else "")

    def takes_s(asked: str) -> float:
        begun = time.thread_time_ns()
        model.ids([asked])
        return time.thread_time_ns() - begun

    def share_told_apart() -> float:
        pairs = [(text(), text()) for _ in range(PAIRS)]
        for seen, _ in pairs:
            model.ids([seen])
            model.ids([seen])
        told = 0.0
        for seen, unseen in pairs:
            asked = [seen.encode().decode(), unseen.encode().decode()]  # as they come: no hash is known of either
            first = dice.randrange(2)
            times = {which: takes_s(asked[which]) for which in (first, 1 - first)}
            told += 0.5 if times[0] == times[1] else times[0] < times[1]
        return told / PAIRS

    share_told_apart()  # once, so that nothing is done for the first time
    assert min(share_told_apart() for _ in range(3)) <= TOLD_APART


def test_two_threads_may_use_it_at_one_time() -> None:
    words = words_of(TINY)
    assert words is not None
    texts = [" ".join(Random(number).choices(string.ascii_lowercase, k=40)) for number in range(200)]
    expected = [whole(TINY, text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda text: ids_of(words, text), texts * 5)) == expected * 5
