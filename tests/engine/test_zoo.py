"""Ids are those of `transformers`, special tokens included, or the folder is refused by what is not understood."""

import json
import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from embedmesh.engine.layout import ARCHITECTURES, Architecture
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.embeddings import numbers_of
from embedmesh.rules.errors import SetupError
from embedmesh.rules.reranking import fit_pair
from tests.data import model_folder, quick_or
from tests.engine import zoo
from tests.engine.test_folder import ANYTHING
from tests.engine.tiny import write_json

Files = dict[str, dict[str, Any]]
Make = Callable[[], Tokenizer]


def added(content: str, **how: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"content": content, **flags, **how}


def typed(content: str, **how: bool) -> dict[str, Any]:
    return {"__type": "AddedToken", **added(content, **how)}


def config(**members: Any) -> Files:
    return {"tokenizer_config": members}


BERT = {"0": "[PAD]", "1": "[UNK]", "2": "[CLS]", "3": "[SEP]"}
FOUR = {at: added(text, special=True) for at, text in BERT.items()}
ZOO: dict[str, tuple[str, Make, Files]] = {
    "BERT, nothing said": ("bert", zoo.bert, {}),
    "BERT, cased": ("bert", zoo.bert, config(do_lower_case=False)),
    "BERT, uncased": ("bert", lambda: zoo.bert(lowercase=True), config(do_lower_case=True)),
    "BERT, uncased, with accents": ("bert", zoo.bert, config(do_lower_case=True, strip_accents=False)),
    "BERT, cased, without accents": ("bert", zoo.bert, config(do_lower_case=False, strip_accents=True)),
    "BERT, Chinese not cut": ("bert", zoo.bert, config(tokenize_chinese_chars=False, do_lower_case=False)),
    "BERT, added_tokens_decoder leaves some out": (
        "bert",
        zoo.bert,
        config(do_lower_case=False, added_tokens_decoder=FOUR, tokenizer_class="BertTokenizerFast"),
    ),
    "BERT, added_tokens_decoder with more": (
        "bert",
        zoo.bert,
        config(
            added_tokens_decoder=FOUR
            | {
                "420": added("new word", normalized=True),
                "421": added("<new>", lstrip=True, rstrip=True),
                "422": added("ENT", single_word=True, normalized=True),
            },
            additional_special_tokens=["<new>"],
        ),
    ),
    "BERT, special_tokens_map takes other tokens": (
        "bert",
        zoo.bert,
        {
            **config(do_lower_case=True),
            "special_tokens_map": {
                "cls_token": "[unused1]",
                "sep_token": "[SEP]",
                "mask_token": {"content": "[MASK]", "lstrip": True, "rstrip": True, "normalized": False},
                "additional_special_tokens": ["ENT"],
            },
        },
    ),
    "BERT, tokens of added_tokens.json": (
        "bert",
        zoo.bert,
        {**config(sep_token="[CLS]"), "added_tokens": {"<new>": 420, "ENT": 421}},
    ),
    "BERT, cuts of another kind in tokenizer.json": ("bert", lambda: whitespace(zoo.bert()), {}),
    "BERT, tokenizer.json as it is": (
        "bert",
        lambda: whitespace(zoo.bert()),
        config(tokenizer_class="PreTrainedTokenizerFast", do_lower_case=True, mask_token="<new>"),
    ),
    "BERT with XLM-RoBERTa's tokens": (
        "bert",
        zoo.xlm_roberta,
        config(tokenizer_class="XLMRobertaTokenizer", mask_token=typed("<mask>", lstrip=True)),
    ),
    "DistilBERT": ("distilbert", zoo.bert, config(tokenizer_class="DistilBertTokenizer", do_lower_case=False)),
    "NomicBERT": ("nomic_bert", zoo.bert, config(tokenizer_class="BertTokenizer", clean_up_tokenization_spaces=True)),
    "MPNet": ("mpnet", zoo.mpnet, config(tokenizer_class="MPNetTokenizer", do_lower_case=True)),
    "MPNet, nothing said": ("mpnet", zoo.mpnet, {}),
    "RoBERTa": ("roberta", zoo.roberta, {}),
    "RoBERTa with a space before": ("roberta", zoo.roberta, config(add_prefix_space=True, trim_offsets=False)),
    "RoBERTa, its mask takes no space": (
        "roberta",
        zoo.roberta,
        {"special_tokens_map": {"mask_token": {"content": "<mask>", "lstrip": False, "normalized": True}}},
    ),
    "XLM-RoBERTa": ("xlm-roberta", zoo.xlm_roberta, {}),
    "XLM-RoBERTa without a table": ("xlm-roberta", lambda: zoo.xlm_roberta(charsmap=False), {}),
    "XLM-RoBERTa without a space before": ("xlm-roberta", zoo.xlm_roberta, config(add_prefix_space=False)),
    "CamemBERT": ("camembert", zoo.camembert, config(tokenizer_class="CamembertTokenizer")),
    "GTE": ("new", zoo.xlm_roberta, config(tokenizer_class="XLMRobertaTokenizerFast")),
    "GTE, no class": ("new", zoo.bert, config(do_lower_case=True)),
    "ModernBERT": (
        "modernbert",
        zoo.neox,
        config(tokenizer_class="PreTrainedTokenizerFast", extra_special_tokens=["ENT"], cls_token="[CLS]"),
    ),
    "ModernBERT with a wrong class": ("modernbert", zoo.neox, config(tokenizer_class="BertTokenizer")),
    "GPT-NeoX": ("gpt_neox", zoo.neox, config(add_prefix_space=True, tokenizer_class="GPTNeoXTokenizer")),
    "GPT-2": ("gpt2", zoo.neox, config(tokenizer_class="GPT2Tokenizer", add_bos_token=False)),
    "Qwen2": ("qwen2", zoo.neox, config(tokenizer_class="Qwen2Tokenizer", eos_token="[MASK]")),
    "Llama": ("llama", zoo.llama, config(tokenizer_class="LlamaTokenizerFast", add_bos_token=True)),
    "Llama, legacy": ("llama", zoo.llama, config(tokenizer_class="LlamaTokenizer", legacy=True)),
    "Llama without a space before": (
        "llama",
        zoo.llama,
        config(tokenizer_class="LlamaTokenizer", add_prefix_space=False),
    ),
    "Llama's name on bytes": ("llama", zoo.neox, config(tokenizer_class="LlamaTokenizer", bos_token="[CLS]")),
    "T5": ("t5", zoo.t5, config(extra_ids=10)),
    "T5 with its tokens told": ("t5", zoo.t5, config(extra_special_tokens=[f"<extra_id_{at}>" for at in range(10)])),
    "a padding token that only tokenizer.json knows": ("new", lambda: padded(zoo.bert()), {}),
    "one token in several ways": (
        "roberta",
        zoo.roberta,
        config(
            tokenizer_class="PreTrainedTokenizerFast",
            added_tokens_decoder={
                "420": added("<mask>", normalized=True),
                "425": added("<mask>", lstrip=True, special=True),
            },
        ),
    ),
    "more tokens in both files": (
        "modernbert",
        zoo.neox,
        {
            **config(extra_special_tokens={"a_token": typed("ENT", rstrip=True, single_word=True)}),
            "special_tokens_map": {"extra_special_tokens": ["<new>"], "pad_token": "[SEP]"},
        },
    ),
    "named tokens of its own": (
        "new",
        zoo.bert,
        config(image_token="<new>", extra_special_tokens={"ent_token": "ENT"}),
    ),
}
REFUSED: dict[str, tuple[str, Make, Files]] = {
    "tokenizer_class": ("bert", zoo.bert, config(tokenizer_class="SomethingTokenizer")),
    "no 'tokenizer_class'": ("unheard_of", zoo.bert, {}),
    "'tokenizer_class' is for": ("bert", zoo.roberta, {}),
    "auto_map": ("bert", zoo.bert, config(auto_map={"AutoTokenizer": ["code.Tokenizer", None]})),
    "config.json has 'auto_map'": ("bert", zoo.bert, {"config": {"auto_map": {"AutoTokenizer": "code.Tokenizer"}}}),
    "add_eos_token": ("llama", zoo.llama, config(tokenizer_class="LlamaTokenizer", add_eos_token=True)),
    "add_bos_token": ("llama", zoo.llama, config(tokenizer_class="LlamaTokenizer", add_bos_token=False)),
    "split_special_tokens": ("bert", zoo.bert, config(split_special_tokens=True)),
    "add_special_tokens": ("bert", zoo.bert, config(add_special_tokens=True)),
    "do_lower_case": ("bert", zoo.bert, config(do_lower_case="yes")),
    "cls_token' = None": ("bert", zoo.bert, config(cls_token=None)),
    "cls_token' that": ("bert", zoo.bert, config(cls_token={"content": "[CLS]"})),
    "added_tokens_decoder": ("bert", zoo.bert, config(added_tokens_decoder=["[CLS]"])),
    "extra_special_tokens": ("bert", zoo.bert, config(extra_special_tokens="ENT")),
    "unk_id": ("xlm-roberta", zoo.t5, {}),
    "extra_ids": ("t5", zoo.t5, config(extra_ids="ten")),
    "'unk_token' is not in its vocabulary": ("bert", zoo.bert, config(unk_token="nowhere")),
    "'  ' has 'lstrip'": (
        "modernbert",
        zoo.neox,
        config(
            added_tokens_decoder={"7": added("  ", lstrip=True), "9": added("[MASK]", rstrip=True)},
        ),
    ),
    "fast_tokenizer_files": ("bert", zoo.bert, config(fast_tokenizer_files=["tokenizer.4.0.0.json"])),
}


def whitespace(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def padded(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.enable_padding(pad_token="<new>", pad_id=7)
    tokenizer.enable_truncation(8)
    return tokenizer


@cache
def texts() -> list[str]:
    return zoo.make_texts()


@pytest.fixture(scope="module")
def reference() -> Callable[[Path], list[list[int]]]:
    from transformers import AutoTokenizer  # a second of CPU: only where it is needed

    logging.getLogger("transformers").setLevel(logging.CRITICAL)

    def ids(folder: Path) -> list[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        assert tokenizer.is_fast
        found: list[list[int]] = tokenizer(texts(), truncation=False, padding=False)["input_ids"]
        return found

    return ids


@pytest.mark.parametrize("name", ZOO)
def test_ids_are_those_of_transformers(tmp_path: Path, reference: Callable[[Path], list[list[int]]], name: str) -> None:
    model_type, make, files = ZOO[name]
    folder = zoo.write_folder(tmp_path / "model", model_type, make, **files)
    ours = ModelTokenizer(folder, 128)
    expected = reference(folder)
    found = [ours.with_specials(ids) for ids in ours.ids(texts())]
    wrong = [(text, a, b) for text, a, b in zip(texts(), found, expected, strict=True) if a != b]
    assert not wrong, (len(wrong), wrong[0])


PAIRED = [
    "BERT, uncased",
    "BERT with XLM-RoBERTa's tokens",
    "DistilBERT",
    "NomicBERT",
    "MPNet",
    "RoBERTa",
    "RoBERTa with a space before",
    "XLM-RoBERTa",
    "CamemBERT",
    "T5",
]
UNPAIRED = (
    "Llama",
    "Qwen2",
    "GTE, no class",
    "BERT, tokenizer.json as it is",
)  # by what their tokenizer.json has for two
PAIR_TOKENS_MAX = 64


def reranker(folder: Path) -> Path:
    """The same tokenizer in a folder of a reranker."""
    (folder / "modules.json").unlink()
    config = json.loads((folder / "config.json").read_text()) | {"architectures": ["XForSequenceClassification"]}
    write_json(folder / "config.json", config | {"num_labels": 1})
    settings = folder / "tokenizer_config.json"
    given = json.loads(settings.read_text()) if settings.exists() else {}
    write_json(settings, given | {"model_max_length": PAIR_TOKENS_MAX})
    return folder


@pytest.mark.parametrize("name", PAIRED)
def test_pairs_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Ids and the token types that a model is given, cut longest first."""
    from transformers import AutoTokenizer

    model_type, make, files = ZOO[name]
    folder = reranker(zoo.write_folder(tmp_path / "model", model_type, make, **files))
    ours, theirs = ModelTokenizer(folder, PAIR_TOKENS_MAX), AutoTokenizer.from_pretrained(str(folder))
    pairs = list(zip(texts()[:200], texts()[100:], strict=False))
    firsts, seconds = map(list, zip(*pairs, strict=True))
    expected = theirs(firsts, seconds, truncation="longest_first", max_length=PAIR_TOKENS_MAX)
    types = expected.get("token_type_ids") or [[0] * len(ids) for ids in expected["input_ids"]]
    room = PAIR_TOKENS_MAX - ours.specials - len(ours.between)
    for at, (one, other) in enumerate(zip(ours.ids(firsts), ours.ids(seconds), strict=True)):
        kept = fit_pair(len(one), len(other), room)
        found = ours.marked(numbers_of(ours.pair(one[: kept[0]], other[: kept[1]])))
        assert [~token if token < 0 else token for token in found] == expected["input_ids"][at], pairs[at]
        if ARCHITECTURES.get(model_type, Architecture()).types:
            assert [sum(token < 0 for token in found[:end]) for end in range(len(found))] == types[at], pairs[at]


@pytest.mark.parametrize("name", UNPAIRED)
def test_what_takes_no_pairs_is_refused(tmp_path: Path, name: str) -> None:
    model_type, make, files = ZOO[name]
    folder = reranker(zoo.write_folder(tmp_path / "model", model_type, make, **files))
    with pytest.raises(SetupError, match="nothing between two texts"):
        ModelTokenizer(folder, PAIR_TOKENS_MAX)


@pytest.mark.parametrize("says", REFUSED)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, says: str) -> None:
    model_type, make, files = REFUSED[says]
    folder = zoo.write_folder(tmp_path / "model", model_type, make, **files)
    with pytest.raises(SetupError) as refusal:
        ModelTokenizer(folder, 128)
    assert says in str(refusal.value)
    assert "\n" not in str(refusal.value) and str(tmp_path) not in str(refusal.value)


def test_a_token_that_only_the_class_knows_gets_no_id_without_a_row(
    tmp_path: Path, reference: Callable[[Path], list[list[int]]]
) -> None:
    """`transformers` gives it one, and the model ends at the first text that has it."""
    make = without_mask(zoo.bert())
    rows = make.get_vocab_size()
    folder = zoo.write_folder(tmp_path / "model", "bert", lambda: make, config={"vocab_size": rows})
    ours = ModelTokenizer(folder, 128)
    assert ours.vocab_size == rows
    pairs = list(zip(texts(), map(ours.with_specials, ours.ids(texts())), reference(folder), strict=True))
    assert any(max(expected) == rows for _, _, expected in pairs)
    assert all(found == expected for text, found, expected in pairs if "[MASK]" not in text)
    assert all(max(found) < rows for _, found, _ in pairs)


def without_mask(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str().replace('"[MASK]"', '"mask-no-more"'))


@pytest.mark.model
def test_the_default_model_too(reference: Callable[[Path], list[list[int]]]) -> None:
    ours = ModelTokenizer(model_folder(), 256)
    assert [ours.with_specials(ids) for ids in ours.ids(texts())] == reference(model_folder())


FLAGS = ["do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "legacy", "trim_offsets"]
NAMED = ["cls_token", "unk_token", "mask_token", "bos_token", "my_token", "add_bos_token", "tokenizer_class"]
LISTED = ["extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "auto_map", "extra_ids"]
FIELDS = [*FLAGS, *NAMED, *LISTED]
TOKENS = st.just("[SEP]") | st.just(typed("<new>")) | st.just({"content": "x"}) | st.just({"7": added("<new>")})


def test_whatever_stands_in_a_member_is_applied_or_refused_in_one_line(tmp_path: Path) -> None:
    kinds = [("bert", zoo.bert), ("roberta", zoo.roberta), ("xlm-roberta", zoo.xlm_roberta), ("t5", zoo.t5)]
    folders = [zoo.write_folder(tmp_path / name, name, make) for name, make in kinds]
    ended: set[bool] = set()

    @settings(max_examples=quick_or(150, quick=60), deadline=None)
    @given(
        folder=st.sampled_from(folders),
        config=st.dictionaries(st.sampled_from(FIELDS), TOKENS | ANYTHING, max_size=3),
        tokens=st.dictionaries(st.sampled_from(FIELDS), TOKENS | ANYTHING, max_size=2),
        old=st.just({}) | st.just({"<old>": 5}) | ANYTHING,
    )
    def read(folder: Path, config: dict[str, Any], tokens: dict[str, Any], old: Any) -> None:
        write_json(folder / "tokenizer_config.json", config)
        write_json(folder / "special_tokens_map.json", tokens)
        write_json(folder / "added_tokens.json", old)
        try:
            assert ModelTokenizer(folder, 128).ids(["a text"])
            ended.add(True)
        except SetupError as refusal:
            assert "\n" not in str(refusal) and len(str(refusal)) < 400
            ended.add(False)

    read()
    assert ended == {True, False}
