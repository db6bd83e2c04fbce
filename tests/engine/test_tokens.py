"""Our limits and not the file's; otherwise just what the tokenizer itself would say."""

import json
import string
import time
from pathlib import Path
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, processors

from embedmesh.engine import tokens as module
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.embeddings import bytes_of
from embedmesh.rules.errors import SetupError
from tests.data import model_folder, outside_data, quick_or
from tests.engine.kinds import byte_pairs, save, unigram
from tests.engine.tiny import make_folder, write_json, write_safetensors


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
@settings(max_examples=quick_or(200, quick=80), deadline=None)
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


TEMPLATE = processors.TemplateProcessing(single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
KINDS = {
    "Unigram": (unigram(), [0], [2]),
    "BPE of RoBERTa": (byte_pairs(processors.RobertaProcessing(("</s>", 2), ("<s>", 0)), prefix_space=True), [0], [2]),
    "BPE with a template": (byte_pairs(TEMPLATE, prefix_space=False), [0, 0], [2]),
    "nothing added": (byte_pairs(None, prefix_space=False), [], []),
}


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_found_for_every_kind_of_tokenizer(tmp_path: Path, kind: str) -> None:
    """For texts of all sorts, what is put around the plain ids is what the library itself would have put there."""
    theirs, head, tail = KINDS[kind]
    ours = ModelTokenizer(save(tmp_path, theirs), 48)
    assert (ours.with_specials([]), ours.specials) == ([*head, *tail], len(head) + len(tail))

    @settings(max_examples=quick_or(60, quick=25), deadline=None)
    @given(st.lists(st.text(st.sampled_from("ab ▁Ä中\n<s>/"), max_size=12), min_size=1, max_size=3))
    def agree_on(texts: list[str]) -> None:
        agree((ours, theirs), texts)

    agree_on()


def test_ids_behind_a_gap_count_for_the_vocabulary(tmp_path: Path) -> None:
    """An added token may have any id; the vocabulary reaches up to the highest."""
    folder = make_folder(tmp_path / "tiny")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["added_tokens"][-1]["id"] = 90
    content["model"]["vocab"]["[SEP]"] = 90
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert ModelTokenizer(folder, 48).vocab_size == 91


@pytest.mark.parametrize(
    ("normalizer", "fits"),
    [
        (normalizers.BertNormalizer(lowercase=True), True),
        (normalizers.BertNormalizer(lowercase=False), False),
        (normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]), True),
        (normalizers.NFC(), False),
        (None, False),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_lower_casing_that_the_sentence_config_asks_for_must_be_in_the_tokenizer(
    tmp_path: Path, normalizer: normalizers.Normalizer | None, fits: bool, asked: bool
) -> None:
    """What tokenizer_config.json asks for is done: test_zoo.py."""
    changed = unigram()
    if normalizer is not None:
        changed.normalizer = normalizer
    folder = save(tmp_path, changed)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 48, "do_lower_case": asked})
    if fits or not asked:
        ModelTokenizer(folder, 48)
    else:
        with pytest.raises(SetupError, match="do_lower_case"):
            ModelTokenizer(folder, 48)


@pytest.mark.parametrize("name", ["vocab.txt", "sentencepiece.bpe.model"])
def test_a_tokenizer_in_another_form_has_to_be_converted(tmp_path: Path, name: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").rename(folder / name)
    with pytest.raises(SetupError, match=rf"no tokenizer\.json\. Convert its {name}"):
        ModelTokenizer(folder, 48)


@pytest.mark.parametrize("unk_id", [3, None])
def test_unknown_pieces_of_a_static_unigram_model_are_dropped(tmp_path: Path, unk_id: int | None) -> None:
    pieces = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("a", -3.0)]
    folder = save(tmp_path, Tokenizer(models.Unigram(pieces, unk_id=unk_id, byte_fallback=False)))
    write_json(folder / "modules.json", [{"type": "sentence_transformers.models.StaticEmbedding", "path": "."}])
    write_json(folder / "config.json", {"model_type": "model2vec"})
    write_safetensors(folder / "model.safetensors", {"embeddings": np.zeros((5, 2), np.float32)})
    assert ModelTokenizer(folder, 48).ids(["aaa", "aa"]) == [[4, 4, 4], [4, 4]]
    if unk_id is not None:
        assert ModelTokenizer(folder, 48).ids(["aza"]) == [[4, 4]]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_a_tokenizer_that_is_missing_or_broken_is_a_setup_error(tmp_path: Path, content: str | None) -> None:
    folder = make_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").unlink()
    if content is not None:
        (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SetupError, match=r"tokenizer\.json"):
        ModelTokenizer(folder, 48)


SOON_S_MAX = 0.004  # twice what the worst takes on a slow machine


@pytest.mark.model
def test_what_is_counted_on_the_event_loop_takes_a_moment_whatever_it_is(
    both: tuple[ModelTokenizer, Tokenizer],
) -> None:
    """Either it is found at once, and right, or left for later; the least of several times counts."""
    ours, theirs = both
    dice = Random(41)
    word = "".join(dice.choices(string.ascii_lowercase, k=99))
    texts = {
        "41 random words": ([" ".join([word] * 41)], False),
        "a random word": ([word], True),
        "2 random words": ([word, word], False),
        "shorter random words": ([" ".join([word[:20]] * 24)], True),
        "more of them": ([" ".join([word[:20]] * 25)], False),
        "a word for each text": ([word] * 41, False),
        "marks": (["!" * module.SOON_CHARS_MAX], True),
        "many texts": (["a!"] * module.SOON_TEXTS_MAX, True),
        "more texts": (["a"] * (module.SOON_TEXTS_MAX + 1), False),
        "prose": (["the river, the river and the rivers. " * 100], True),
        "random words with an accent": ([f"{word} {word} é"], True),
        "more with an accent": ([f"{word} {word} {word} é"], False),
        "ideographs": (["日" * module.SOON_WHOLE_CHARS_MAX], True),
        "texts with accents": (["é"] * module.SOON_WHOLE_MAX, True),
        "more texts with accents": (["é"] * (module.SOON_WHOLE_MAX + 1), False),
        "an unknown letter last": ([word[:98] + "\u16a0"], True),
        "too long": (["a " * module.SOON_CHARS_MAX], False),
    }
    for name, (given_texts, found) in texts.items():
        took_s = []
        for _ in range(9):
            begun = time.thread_time()
            ids = ours.packed(given_texts)
            took_s.append(time.thread_time() - begun)
        assert min(took_s) <= SOON_S_MAX, name
        assert (ids is not None) == found, name
        expected = [bytes_of(theirs.encode(text, add_special_tokens=False).ids) for text in given_texts]
        assert ids is None or ids == expected


def test_words_that_were_seen_are_not_remembered_by_the_library(tmp_path: Path) -> None:
    """Its caches are empty from the start, and stay so: a long word of byte pairs takes as long again."""
    theirs = byte_pairs(None, prefix_space=False)
    ours, dice = ModelTokenizer(save(tmp_path, theirs), 48), Random(7)
    first_s, again_s = list[float](), list[float]()
    for _ in range(200):
        word = "".join(dice.choices("abcdefghij", k=200))
        for took_s in (first_s, again_s):
            begun = time.thread_time()
            ours.ids([word])
            took_s.append(time.thread_time() - begun)
    assert sorted(again_s)[100] >= sorted(first_s)[100] / 2
