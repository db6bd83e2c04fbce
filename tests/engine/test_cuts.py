"""The ids of a text's pieces are those of the text, wherever our rules let it be cut."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

from embedmesh.engine import tokens as module
from embedmesh.engine.cuts import cuts_of
from embedmesh.engine.tokens import RUN_CHARS_MAX, ModelTokenizer
from embedmesh.flow.count import count_now
from embedmesh.rules.embeddings import Call, Role, Truncate
from embedmesh.rules.errors import ContextLengthExceeded
from embedmesh.rules.models import Model
from tests.data import quick_or
from tests.engine.kinds import byte_pairs, save, tiny, unigram
from tests.engine.tiny import make_folder

GOLDENS = Path(__file__).parent / "goldens" / "architectures"
# What joins its neighbour, is dropped or is moved.
ODD = "\u0301\u0308\u0323\u200d\u200b\u00ad\u0f71\u0345\u3099\ufe0f\u0e33\u0600\u11a8"
LETTERS = "abcun riversdon 019ßéÅŉŀİǆЖйÄω日本語中かガ한ﬁ½բשعآकऩกგ"
SPACES = " \t\n\r\x0b\x0c\x1c\x85\u00a0\u2003\u3000\0"
MARKS = "!\"#$%&'()*+,-./:;<=>?@[]^_`{|}~。¿…▁Ġ"
TOKENS = ["[MASK]", "<mask>", "</s>", "<s>", "river", " un", "'s", "\U0001f600"]
PARTS = [*LETTERS, *SPACES, *MARKS, *ODD, *TOKENS]
WORDS = [f"{letter} {other}" for letter in LETTERS for other in "aé9日عकก한" if letter != " "]
TEXT = st.lists(st.sampled_from(PARTS) | st.sampled_from(WORDS), max_size=40).map("".join)


def with_mask(tokenizer: Tokenizer, **how: bool) -> Tokenizer:
    tokenizer.add_tokens([AddedToken("<mask>", **({"normalized": False} | how))])
    return tokenizer


def precompiled(pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """As XLM-RoBERTa's normalizer works, beside its table: what is compatible becomes one, spaces are collapsed."""
    made = unigram()
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre_tokenizer
    return made


def normalized(make: Callable[[], Tokenizer], *parts: normalizers.Normalizer) -> Tokenizer:
    made = make()
    made.normalizer = normalizers.Sequence(list(parts))
    return made


METASPACE = pre_tokenizers.Metaspace
ZOO: dict[str, Callable[[], Tokenizer]] = {
    "BERT": tiny,
    "BERT, with a token of letters": lambda: with_mask(tiny(), normalized=True),
    "BERT, with a token that is a word": lambda: with_mask(tiny(), single_word=True, lstrip=True),
    "BERT, accents kept": lambda: tiny(normalizer=normalizers.BertNormalizer(strip_accents=False, lowercase=False)),
    "BERT, ideographs together": lambda: tiny(normalizer=normalizers.BertNormalizer(handle_chinese_chars=False)),
    "byte pairs": lambda: byte_pairs(None, prefix_space=False),
    "byte pairs, with a prefix": lambda: with_mask(byte_pairs(None, prefix_space=True), lstrip=True),
    "byte pairs, NFC": lambda: normalized(lambda: byte_pairs(None, prefix_space=False), normalizers.NFC()),
    "Unigram": unigram,
    "Unigram, first": lambda: precompiled(METASPACE(prepend_scheme="first")),
    "Unigram, never": lambda: precompiled(METASPACE(prepend_scheme="never")),
    "Unigram, white space first": lambda: precompiled(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE()])
    ),
    "Unigram, no case, no accents": lambda: normalized(
        unigram, normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()
    ),
    "words": lambda: tiny(model=models.WordLevel({"[UNK]": 0, "river": 1}, unk_token="[UNK]")),
    "pieces between white space": lambda: tiny(
        normalizer=normalizers.NFKD(), pre_tokenizer=pre_tokenizers.Whitespace()
    ),
} | {
    f"the reference's {name}": lambda name=name: Tokenizer.from_file(str(GOLDENS / name / "tokenizer.json"))
    for name in ("bert", "mpnet", "roberta", "modernbert", "xlm_roberta")
}  # fmt: skip


def whole(tokenizer: Tokenizer, text: str) -> list[int]:
    found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return found


@pytest.mark.parametrize("kind", ZOO)
def test_ids_of_parts_are_those_of_the_whole(kind: str) -> None:
    """Wherever it may be cut, and cut everywhere at once; also beside what joins, is dropped, or is a token."""
    tokenizer = ZOO[kind]()
    tokenizer.no_padding()
    tokenizer.no_truncation()
    cuts = cuts_of(tokenizer)
    assert cuts is not None
    seen = 0

    @settings(max_examples=quick_or(100, quick=40), deadline=None)
    @given(TEXT)
    def agree(text: str) -> None:
        nonlocal seen
        places = [found.start() for found in cuts.finditer(text)]
        seen += len(places)
        expected = whole(tokenizer, text)
        for place in places:
            assert whole(tokenizer, text[:place]) + whole(tokenizer, text[place:]) == expected, (text, place)
        ends = [0, *places, len(text)]
        pieces = [text[start:end] for start, end in pairwise(ends)]
        assert [token for piece in pieces for token in whole(tokenizer, piece)] == expected

    agree()
    assert seen > quick_or(100, quick=40)


UNSAFE: dict[str, Callable[[], Tokenizer]] = {
    "a token with a space in it": lambda: with_token(tiny(), AddedToken("river bank")),
    "a token that takes the space behind it": lambda: with_mask(unigram(), rstrip=True),
    "a token of which nothing is left": lambda: with_token(tiny(), AddedToken("\xad", normalized=True)),
    "no cut at spaces": lambda: without_split(unigram()),
    "byte pairs of a whole text": lambda: split_by(
        byte_pairs(None, prefix_space=False), pre_tokenizers.ByteLevel(use_regex=False)
    ),
    "a text's first word is another": lambda: precompiled(
        pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), METASPACE(prepend_scheme="first")])
    ),
    "a cut that we do not know": lambda: split_by(tiny(), pre_tokenizers.CharDelimiterSplit("e")),
    "an end that is stripped": lambda: normalized(unigram, normalizers.Strip()),
    "something put in front": lambda: normalized(unigram, normalizers.Prepend("▁")),
    "a space replaced": lambda: normalized(unigram, normalizers.Replace(" ", "▁")),
    "chance": lambda: split_by(
        Tokenizer(models.BPE({"a": 0}, [], dropout=0.5)), pre_tokenizers.ByteLevel(add_prefix_space=False)
    ),
}


def with_token(tokenizer: Tokenizer, token: AddedToken) -> Tokenizer:
    tokenizer.add_tokens([token])
    return tokenizer


def split_by(tokenizer: Tokenizer, pre_tokenizer: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizer
    return tokenizer


def without_split(tokenizer: Tokenizer) -> Tokenizer:
    return split_by(tokenizer, METASPACE(split=False))


@pytest.mark.parametrize("kind", UNSAFE)
def test_a_tokenizer_of_which_that_is_not_known_is_not_cut(kind: str) -> None:
    assert cuts_of(UNSAFE[kind]()) is None


MODELS = {"BERT": tiny, "byte pairs": lambda: byte_pairs(None, prefix_space=True), "Unigram": unigram}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("truncate", ["end", "start"])
@pytest.mark.parametrize("role", [None, "query"])
def test_what_is_cut_before_it_is_counted_is_what_was_counted_and_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, truncate: Truncate, role: Role | None
) -> None:
    """For texts of many pieces: ids, and a text that has those ids where it is cut at a word."""
    library = MODELS[kind]()
    folder = save(tmp_path, library)
    monkeypatch.setattr(module, "PIECE_CHARS", 7)
    tokenizer = ModelTokenizer(folder, 16)
    model = Model(id="m", width=4, max_tokens=16, price=1, prompts={"query": "a b: "})
    room = 16 - tokenizer.specials
    prompt = model.prompts["query"] if role else ""
    kept = len(whole(library, prompt)) if truncate == "start" and role else 0

    @settings(max_examples=quick_or(60, quick=25), deadline=None)
    @given(TEXT)
    def agree(drawn: str) -> None:
        text = f"a{drawn}"
        counted = count_now(Call("m", texts=[text], truncate=truncate, role=role), model, tokenizer, None)
        ids = whole(library, prompt + text)
        expected = ids
        if len(ids) > room:
            expected = ids[:room] if truncate == "end" else ids[:kept] + ids[len(ids) - (room - kept) :]
        assert counted.ids == [expected]
        assert counted.truncated == (len(ids) > room)

    agree()


PROSE = {
    "English": "the river",
    "German": "über Flüsse",
    "Russian": "река течёт",
    "Greek": "ποταμός ρέει",
    "Arabic": "النهر يجري",
    "Hebrew": "הנהר זורם",
    "Hindi": "नदी बहती है",
    "Bengali": "নদী বয়ে যায়",
    "Tamil": "ஆறு ஓடுகிறது",
    "Thai": "แม่น้ำ ไหล",
    "Korean": "강이 흐른다",
    "Amharic": "ወንዙ ይፈሳል",
    "Georgian": "მდინარე მიედინება",
    "Armenian": "գետը հոսում է",
    "Burmese": "မြစ် စီး",
    "Khmer": "ទន្លេ ហូរ",
    "Lao": "ແມ່ນ້ຳ ໄຫຼ",
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("language", PROSE)
def test_prose_of_any_language_with_spaces_can_be_cut(language: str, kind: str) -> None:
    """So that no long text of it is refused for that."""
    cuts = cuts_of(MODELS[kind]())
    assert cuts is not None
    text = (PROSE[language] + " ") * 20
    places = [found.start() for found in cuts.finditer(text)]
    assert len(places) >= 10
    tokenizer = MODELS[kind]()
    pieces = [text[start:end] for start, end in pairwise([0, *places, len(text)])]
    assert [token for piece in pieces for token in whole(tokenizer, piece)] == whole(tokenizer, text)


def test_a_text_is_looked_at_no_further_than_it_fits(tmp_path: Path) -> None:
    """4 MiB of marks, or of words: some pieces, not all of them."""
    folder = make_folder(tmp_path / "tiny")
    looked_at = 0

    class Counting(ModelTokenizer):
        def ids(self, texts):  # type: ignore[no-untyped-def]
            nonlocal looked_at
            looked_at += sum(map(len, texts))
            return super().ids(texts)

    tokenizer = Counting(folder, 48)
    model = Model(id="m", width=4, max_tokens=48, price=1)
    for text in ("!" * 4_000_000, "w1 " * 1_300_000, "日" * 1_300_000, "w1é " * 800_000):
        for truncate in ("none", "end", "start"):
            looked_at = 0
            call = Call("m", texts=[text], truncate=truncate)
            if truncate == "none":
                with pytest.raises(ContextLengthExceeded, match="more than"):
                    count_now(call, model, tokenizer, None)
            else:
                assert count_now(call, model, tokenizer, None).tokens == 48
            assert looked_at < 3 * module.PIECE_CHARS


@pytest.mark.parametrize("truncate", ["none", "end", "start"])
def test_a_run_without_a_place_to_cut_is_refused_beyond_a_bound(tmp_path: Path, truncate: Truncate) -> None:
    """Up to it the word is looked at: it is one token that the vocabulary does not know."""
    tokenizer = ModelTokenizer(make_folder(tmp_path / "tiny"), 48)
    model = Model(id="m", width=4, max_tokens=48, price=1)
    fits = Call("m", texts=["é" * RUN_CHARS_MAX], truncate=truncate)
    assert count_now(fits, model, tokenizer, None).tokens == 3
    with pytest.raises(ContextLengthExceeded, match=re.compile("characters without a place")) as refused:
        count_now(Call("m", texts=["w1", "é" * (RUN_CHARS_MAX + 1)], truncate=truncate), model, tokenizer, None)
    assert refused.value.param == "input.1"
