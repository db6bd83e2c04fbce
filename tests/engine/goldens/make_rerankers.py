"""Make small random rerankers, one folder or two an architecture, and the logits that CrossEncoder gives them.

Run it in the environment of `make_architectures.py`, with `onnx==1.23.2`:

    /tmp/goldens/bin/python -m tests.engine.goldens.make_rerankers      (from the root of the checkout)

Each folder under `rerankers/` is a whole model folder as one finds them published, plain or as CrossEncoder saves it.
Beside its config are `pairs.json`, and what the reference makes of these pairs in `expected.npz`: `ids` (the token ids
of all pairs in a row, as the reference cuts them), `types` (their token types, as the model is given them), `lengths`
(tokens of each), `logits` (a number a pair) and `scores` (the same by the model's own activation function).

The reference runs in float64 on one pair at a time, from the very files that are committed.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from tests.engine.goldens.make_architectures import (
    ENCODER,
    LETTERS,
    MODERN,
    ROBERTA_SPECIALS,
    WIDTH,
    make_tokenizer,
    randomize,
    write_json,
    write_weights,
)

HERE = Path(__file__).parent / "rerankers"
SEED = 20_261_130
LIMIT = 40  # tokens of a pair
SPARE = 4  # rows of the table of words for tokens that a class adds
SIGMOID, IDENTITY = "torch.nn.modules.activation.Sigmoid", "torch.nn.modules.linear.Identity"


class Case(NamedTuple):
    """One folder. `layout`: "plain", "saved" by CrossEncoder, "dense" (with modules behind the states), or "onnx"."""

    config: dict[str, Any]
    tokenizer: str
    tokenizer_config: dict[str, Any]
    more: Mapping[str, Any] = MappingProxyType({})
    dtype: str = "float32"
    layout: str = "plain"


BERT = {"model_type": "bert", **ENCODER, "max_position_embeddings": LIMIT}
NO_TYPES = {"model_input_names": ["input_ids", "attention_mask"]}
ROPE = {"rope_type": "default", "rope_theta": 50.0}
CASES = {
    "bert": Case(
        BERT, "wordpiece", {"tokenizer_class": "BertTokenizer"}, {"sbert_ce_default_activation_function": IDENTITY}
    ),
    "bert_saved": Case(BERT, "wordpiece", {"tokenizer_class": "BertTokenizerFast"}, layout="saved"),
    "bert_dense": Case(BERT, "wordpiece", {"tokenizer_class": "BertTokenizer"}, layout="dense"),
    "bert_onnx": Case(BERT, "wordpiece", {"tokenizer_class": "BertTokenizer"}, layout="onnx"),
    "roberta": Case(
        {"model_type": "roberta", **ENCODER, "max_position_embeddings": LIMIT + 2, "type_vocab_size": 2},
        "roberta",
        {"tokenizer_class": "RobertaTokenizer"},
        {"sentence_transformers": {"activation_fn": IDENTITY, "version": "4.1.0"}},
    ),
    "xlm_roberta": Case(
        {"model_type": "xlm-roberta", **ENCODER, "max_position_embeddings": LIMIT + 2, "type_vocab_size": 1},
        "unigram",
        {"tokenizer_class": "XLMRobertaTokenizer"},
        dtype="float16",
    ),
    "distilbert": Case(
        {
            "model_type": "distilbert",
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 3,
            "hidden_dim": 32,
            "max_position_embeddings": LIMIT,
        },
        "wordpiece",
        {"tokenizer_class": "DistilBertTokenizer"},
    ),
    "mpnet": Case(
        {"model_type": "mpnet", **ENCODER, "max_position_embeddings": LIMIT + 2, "layer_norm_eps": 1e-5},
        "mpnet",
        {"tokenizer_class": "MPNetTokenizer", "unk_token": "<unk>"},
    ),
    "modernbert": Case(
        MODERN,
        "bytes",
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", **NO_TYPES},
        dtype="bfloat16",
    ),
    "modernbert_mean": Case(
        MODERN
        | {
            "classifier_pooling": "mean",
            "classifier_bias": True,
            "classifier_activation": "relu",
            "norm_bias": True,
            "norm_eps": 1e-3,
        },
        "bytes",
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"},
    ),
    "gte": Case(
        {
            "model_type": "gte",
            **ENCODER,
            "max_position_embeddings": 64,
            "type_vocab_size": 2,
            "rope_parameters": ROPE,
        },
        "wordpiece",
        {"tokenizer_class": "BertTokenizer"},
        {"auto_map": {"AutoModelForSequenceClassification": "org/new-impl--modeling.NewForSequenceClassification"}},
    ),
    "nomic_bert": Case(
        {"model_type": "nomic_bert", **ENCODER, "max_position_embeddings": 64},
        "wordpiece",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": "[PAD]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    ),
    "electra": Case(
        {"model_type": "electra", **ENCODER, "embedding_size": 16, "max_position_embeddings": LIMIT},
        "wordpiece",
        {"tokenizer_class": "ElectraTokenizer"},
    ),
}


def pairs(separator: str) -> list[list[str]]:
    """Of every kind: short, long on either side and on both, without a document, and such that spell special tokens."""
    dice = np.random.default_rng(SEED)

    def some(number: int) -> str:
        return " ".join(dice.choice(list(LETTERS), number))

    lengths = [(1, 1), (3, 9), (9, 3), (12, 20), (18, 18), (5, 70), (70, 5), (50, 50), (19, 60), (60, 18), (21, 41)]
    spelled = [f"a {separator} b", f"{separator} c {separator}"]
    return [
        *[[some(query), some(document)] for query, document in lengths],
        [some(4), ""],
        [some(4), " \n"],
        [some(60), ""],
        spelled,
        [spelled[1], spelled[0]],
        ["A é 漢 7", " b  C? "],
    ]


def make_pair_tokenizer(kind: str) -> Any:
    """As in `make_architectures`, and RoBERTa's own; of a template, pairs too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    if kind == "roberta":
        words = [*ROBERTA_SPECIALS, "<mask>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
        words += [f"Ġ{letter}" for letter in LETTERS]
        merges = [("Ġ", letter) for letter in LETTERS]
        tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, merges))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.add_special_tokens([*ROBERTA_SPECIALS, "<mask>"])
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        return tokenizer
    tokenizer = make_tokenizer(kind)
    if kind in ("wordpiece", "bytes"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return tokenizer


def write_folder(folder: Path, case: Case, seed: int) -> None:
    """A model folder as transformers saves it; and as CrossEncoder does, where the case says so."""
    import torch
    from safetensors.torch import load_file
    from sentence_transformers import CrossEncoder  # type: ignore[import-not-found,unused-ignore]
    from transformers import AutoConfig, AutoModelForSequenceClassification

    tokenizer = make_pair_tokenizer(case.tokenizer)
    padding = tokenizer.token_to_id("[PAD]") or tokenizer.token_to_id("<pad>") or 0
    members = {"vocab_size": tokenizer.get_vocab_size() + SPARE, "pad_token_id": padding, **case.config}
    build: Any = AutoModelForSequenceClassification.from_config
    model = build(AutoConfig.for_model(**members, num_labels=1)).eval()
    randomize(model, seed)
    dtype = getattr(torch, case.dtype)
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as written:  # under the names of published files
        model.save_pretrained(written)
        stored = load_file(f"{written}/model.safetensors")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in stored.items()}
    write_weights(folder, tensors, None)
    native = json.loads(model.config.to_json_string(use_diff=False))
    native["architectures"] = [type(model).__name__]
    kept = {name: value for name, value in native.items() if value is not None}
    write_json(folder / "config.json", kept | {"dtype": case.dtype} | dict(case.more))
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    write_json(folder / "tokenizer_config.json", {"model_max_length": LIMIT, **case.tokenizer_config})
    if case.layout in ("saved", "dense"):
        save_again(folder, CrossEncoder, case.layout, seed)
    if case.layout == "onnx":
        export(model, folder / "model.onnx")


def save_again(folder: Path, kind: Any, layout: str, seed: int) -> None:
    """As CrossEncoder writes it, with its `modules.json`."""
    import torch
    from sentence_transformers.base.modules import Dense, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    if layout == "saved":
        encoder = kind(str(folder), device="cpu")
    else:
        linear = torch.nn.Linear(WIDTH, 1)
        randomize(linear, seed)
        dense = Dense(WIDTH, 1, activation_function=torch.nn.Identity(), module_output_name="scores")
        dense.linear.load_state_dict(linear.state_dict())
        encoder = kind(modules=[Transformer(str(folder)), Pooling(WIDTH, "mean"), dense], device="cpu")
        encoder.activation_fn = torch.nn.Identity()
    shutil.rmtree(folder)
    encoder.save_pretrained(str(folder))
    (folder / "README.md").unlink(missing_ok=True)


def export(model: Any, file: Path) -> None:
    """As exporters write a model for sequence classification (opset 17, by tracing)."""
    import torch

    class Scorer(torch.nn.Module):  # type: ignore[misc,unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Any, mask: Any, types: Any) -> Any:
            return self.model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    names = ["input_ids", "attention_mask", "token_type_ids"]
    example = torch.ones(2, 5, dtype=torch.int64)
    torch.onnx.export(
        Scorer(),
        (example, example, torch.zeros_like(example)),
        str(file),
        input_names=names,
        output_names=["logits"],
        dynamic_axes={**{name: {0: "rows", 1: "length"} for name in names}, "logits": {0: "rows"}},
        dynamo=False,
    )


def make(name: str, case: Case, seed: int) -> None:
    """Write one folder, or stop where its logits would not show a mistake."""
    import torch
    from sentence_transformers import CrossEncoder

    folder = HERE / name
    write_folder(folder, case, seed)
    encoder = CrossEncoder(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    encoder.double()
    chosen = pairs("[SEP]" if case.tokenizer in ("wordpiece", "bytes") else "</s>")
    features = [encoder.preprocess([pair]) for pair in chosen]
    ids = [one["input_ids"][0].tolist() for one in features]
    typed = [one.get("token_type_ids", torch.zeros_like(one["input_ids"]))[0].tolist() for one in features]
    assert max(map(len, ids)) == LIMIT
    logits = np.array([float(encoder.predict(pair, activation_fn=torch.nn.Identity())) for pair in chosen])
    together = encoder.predict(chosen, activation_fn=torch.nn.Identity())
    assert np.abs(together - logits).max() < 1e-6, f"{name}: padding shows"
    rounded = np.sort(np.round(logits, 3))
    assert len(np.unique(rounded)) > len(logits) - 4, f"{name}: logits are too much alike"
    np.savez(
        folder / "expected.npz",
        ids=np.concatenate(ids).astype(np.int32),
        types=np.concatenate(typed).astype(np.int32),
        lengths=np.array([len(one) for one in ids], np.int32),
        logits=logits.astype(np.float32),
        scores=np.array([float(encoder.predict(pair)) for pair in chosen], np.float32),
    )
    write_json(folder / "pairs.json", chosen)
    if case.layout == "onnx":
        (folder / "model.safetensors").unlink()
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    print(f"{name:22} {logits.min():.3f} to {logits.max():.3f}, {size:,} bytes")


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    for number, (name, case) in enumerate(CASES.items()):
        make(name, case, SEED + number)
