"""Rerankers against what CrossEncoder makes of small random ones (goldens/make_rerankers.py), and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.digest import digest
from embedmesh.engine.estimate import measure
from embedmesh.engine.folder import read_folder
from embedmesh.engine.models import BUILDERS, HEADS
from embedmesh.engine.native.family import unsupported
from embedmesh.engine.plan import pad_length
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.rules.embeddings import ENDS_FIRST, numbers_of
from embedmesh.rules.errors import SetupError
from embedmesh.rules.reranking import fit_pair
from tests.engine.test_folder import edit
from tests.engine.test_quantize import needs
from tests.engine.tiny import write_json

GOLDENS = Path(__file__).parent / "goldens" / "rerankers"
NAMES = sorted(path.name for path in GOLDENS.iterdir())
LOGIT_DIFF_MAX = 1e-5  # the promise
FAST_DIFF_MAX = 0.05  # found: 0.036 at most, of logits that are 2.7 apart
NEIGHBOURS_DIFF_MAX = 1e-6  # a pair's score may not tell which others were in its batch

Change = Callable[[Path], object]


def golden(name: str) -> dict[str, npt.NDArray[Any]]:
    with np.load(GOLDENS / name / "expected.npz", allow_pickle=False) as arrays:
        return dict(arrays)


def cut_pairs(name: str) -> tuple[ModelTokenizer, list[bytes]]:
    """The golden pairs as a gateway sends them."""
    tokenizer = ModelTokenizer(GOLDENS / name, read_folder(GOLDENS / name).max_tokens)
    room = tokenizer.max_tokens - tokenizer.specials - len(tokenizer.between)
    found = []
    for query, document in json.loads((GOLDENS / name / "pairs.json").read_text(encoding="utf-8")):
        one, other = tokenizer.ids([query, document])
        kept = fit_pair(len(one), len(other), room)
        found.append(tokenizer.pair(one[: kept[0]], other[: kept[1]]))
    return tokenizer, found


def of_graph(name: str) -> list[list[int]]:
    """The golden pairs as a graph gets them."""
    tokenizer, pairs = cut_pairs(name)
    return [tokenizer.marked(numbers_of(pair)) for pair in pairs]


def test_every_architecture_has_a_golden() -> None:
    """CamemBERT's head is RoBERTa's, and that of the type `new` is GTE's."""
    types = {read_folder(GOLDENS / name).model_type for name in NAMES}
    assert set(HEADS) == set(BUILDERS)
    assert types == set(HEADS) - {"camembert", "new"}
    assert HEADS["camembert"] is HEADS["roberta"]
    assert HEADS["new"] is HEADS["gte"]


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_token_types_are_the_reference_s(name: str) -> None:
    """Cut where they are too long; also of empty documents and of texts that spell special tokens."""
    found = golden(name)
    ends = np.cumsum(found["lengths"])[:-1]
    sequences = of_graph(name)
    plain = [[~token if token < 0 else token for token in ids] for ids in sequences]
    assert plain == [ids.tolist() for ids in np.split(found["ids"], ends)]
    types = [np.cumsum([0, *(token < 0 for token in ids[:-1])]).tolist() for ids in sequences]
    assert types == [each.tolist() for each in np.split(found["types"], ends)]


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_has_one_mark(name: str) -> None:
    """On the last of the special tokens between, which follow the query's ids."""
    tokenizer, pairs = cut_pairs(name)
    assert tokenizer.between
    for pair in map(numbers_of, pairs):
        marked = [at for at, token in enumerate(pair) if token & ENDS_FIRST]
        assert len(marked) == 1
        first = pair[: marked[0] + 1]
        assert [token & ~ENDS_FIRST for token in first[-len(tokenizer.between) :]] == list(tokenizer.between)
    assert len(pairs[0]) // 4 + tokenizer.specials == golden(name)["lengths"][0]


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_reference_s(name: str) -> None:
    """Alone, and in a batch of mixed lengths with padding rows."""
    sequences, expected = of_graph(name), golden(name)["logits"]
    model = CompiledModel(read_folder(GOLDENS / name), threads=1)
    alone = np.concatenate([model.run([ids], 1, len(ids)) for ids in sequences])[:, 0]
    together = model.run(sequences, len(sequences) + 3, pad_length(max(map(len, sequences))))[:, 0]
    assert np.abs(alone - expected).max() <= LOGIT_DIFF_MAX
    assert np.abs(together - expected).max() <= LOGIT_DIFF_MAX
    assert np.abs(together - alone).max() <= NEIGHBOURS_DIFF_MAX


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_near_exact(name: str) -> None:
    """As near as bfloat16 is, and not the same."""
    needs("fast")
    sequences, expected = of_graph(name), golden(name)["logits"]
    fast = CompiledModel(read_folder(GOLDENS / name), 1, "fast").run(sequences, len(sequences), 40)[:, 0]
    assert 1e-5 < np.abs(fast - expected).max() <= FAST_DIFF_MAX


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_says_what_its_score_is(name: str) -> None:
    """By the activation function that CrossEncoder applies; width, length and engine follow."""
    folder, found = read_folder(GOLDENS / name), golden(name)
    logits = found["logits"].astype(np.float64)
    told = 1 / (1 + np.exp(-logits)) if folder.scores == "sigmoid" else logits
    assert np.abs(told - found["scores"]).max() <= 1e-6
    assert (folder.reranks, folder.width, folder.max_tokens, folder.prompts) == (True, 1, 40, {})
    assert unsupported(folder)


def test_the_estimate_counts_the_head() -> None:
    """Which is computed here, unlike that of a model that makes vectors: pooler and classifier, 24 wide."""
    sizes = {name: measure(read_folder(GOLDENS / name)).linear for name in ("bert", "bert_dense")}
    assert sizes["bert"] == 2 * (4 * 24 * 24 + 2 * 24 * 32) + 24 * 24 + 24
    assert sizes["bert_dense"] == sizes["bert"]  # its pooler is there, and one dense layer of as many


def saved(folder: Path) -> Path:
    """What CrossEncoder saved, to be edited."""
    shutil.rmtree(folder)
    return Path(shutil.copytree(GOLDENS / "bert_saved", folder))


def in_saved(file: str, **members: Any) -> Change:
    return lambda folder: edit(file, **members)(saved(folder))


SENTENCES, SENTENCE, SETTINGS = (
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "tokenizer_config.json",
)
OLD, NEW = "sbert_ce_default_activation_function", "sentence_transformers"
CODE = {"AutoModelForSequenceClassification": "org/own--modeling.OwnForSequenceClassification"}
NO_MODULES = "has no modules.json"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (edit("config.json", id2label={"0": "no", "1": "maybe", "2": "yes"}), "into 3 labels (no, maybe, yes)"),
        (edit("config.json", id2label=None), "into 2 labels"),
        (edit("config.json", id2label=None, num_labels=7), "into 7 labels"),
        (edit("config.json", **{OLD: "torch.nn.modules.activation.Tanh"}), "activation.Tanh"),
        (edit("config.json", **{NEW: {"activation_fn": "own.Scale"}}), "own.Scale"),
        (edit("config.json", architectures=["BertModel"]), NO_MODULES),
        (edit("config.json", architectures=None), NO_MODULES),
        (edit("config.json", model_type="deberta-v2"), "'deberta-v2'"),
        (edit(SETTINGS, truncation_side="left"), "truncation_side"),
        (edit(SETTINGS, tokenizer_class="PreTrainedTokenizerFast"), "model_input_names"),
        (in_saved(SENTENCES, activation_fn="torch.nn.modules.activation.Softplus"), "Softplus"),
        (in_saved(SENTENCES, default_prompt_name="query"), "default_prompt_name"),
        (in_saved(SENTENCES, truncate_dim=8), "truncate_dim"),
        (in_saved(SENTENCES, model_type="SparseEncoder"), "modules.json lists Transformer"),
        (in_saved(SENTENCE, transformer_task="text-generation"), "text-generation"),
        (in_saved(SENTENCE, processing_kwargs={"text": {"max_length": 8}}), "processing_kwargs"),
    ],
)
def test_what_would_change_scores_is_refused(change: Change, says: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "bert", tmp_path / "tiny"))
    change(folder)
    with pytest.raises(SetupError) as refused:
        ModelTokenizer(folder, 40)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "members", "says"),
    [
        ("bert", {"auto_map": CODE}, "auto_map"),
        ("gte", {"auto_map": CODE}, "auto_map"),
        ("modernbert", {"auto_map": CODE}, "auto_map"),
        ("modernbert", {"classifier_activation": "mish"}, "'mish'"),
        ("modernbert", {"classifier_bias": True}, "head.dense.bias"),
        ("modernbert", {"classifier_pooling": "last"}, "classifier_pooling"),
        ("roberta", {"model_type": "bert"}, "pooler.dense"),
    ],
)
def test_a_head_that_is_not_known_is_refused(name: str, members: dict[str, Any], says: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / name, tmp_path / "tiny"))
    edit("config.json", **members)(folder)
    with pytest.raises(SetupError) as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert says in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("members", "scores"),
    [
        ({OLD: None}, "sigmoid"),
        ({OLD: "torch.nn.Sigmoid"}, "sigmoid"),
        ({NEW: {"activation_fn": None, "version": "4.0.0"}}, "sigmoid"),
        ({NEW: {"version": "4.0.0"}}, "raw"),
        ({NEW: {"activation_fn": "torch.nn.modules.activation.Sigmoid"}}, "sigmoid"),
    ],
)
def test_the_newer_word_for_scores_counts(members: dict[str, Any], scores: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDENS / "bert", tmp_path / "tiny"))
    edit("config.json", **members)(folder)
    assert read_folder(folder).scores == scores


def test_the_digest_covers_what_decides_token_types(tmp_path: Path) -> None:
    """Two nodes of one digest must score alike; the types are the node's to give."""
    for name, change in (("plain", lambda folder: folder), ("saved", saved)):
        folder = change(Path(shutil.copytree(GOLDENS / "bert", tmp_path / name)))
        before, mark = digest(folder), ModelTokenizer(folder, 40).marked
        edit("tokenizer_config.json", model_input_names=["input_ids", "attention_mask"])(folder)
        assert digest(folder) != before
        untyped = ModelTokenizer(folder, 40)
        assert (
            min(untyped.marked(numbers_of(untyped.pair([5], [6])))) >= 0 > min(mark(numbers_of(untyped.pair([5], [6]))))
        )


def test_modules_for_vectors_make_vectors(tmp_path: Path) -> None:
    """A model whose config.json was that of a classifier before it learnt to embed stays what its modules say."""
    folder = saved(Path(shutil.copytree(GOLDENS / "bert", tmp_path / "tiny")))
    (folder / SENTENCES).unlink()
    write_json(folder / SENTENCE, {"max_seq_length": 40})
    listed = json.loads((folder / "modules.json").read_text())
    listed.append({"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"})
    write_json(folder / "modules.json", listed)
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 24, "pooling_mode_mean_tokens": True})
    read = read_folder(folder)
    assert (read.reranks, read.width, ModelTokenizer(folder, 40).between) == (False, 24, ())
