"""A small random BERT in Hugging Face layout, made on the spot, and what its vectors must be by the textbook (numpy).

Its words are `w0` ... `w49`, `poison` (whose embedding is not a number) and `[CLS]`, `[SEP]`, `[UNK]`, `[PAD]`.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from embedmesh.engine.folder import digest
from embedmesh.rules.models import Model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(50)), "poison"]
POISON = WORDS.index("poison")
CONFIG = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 64,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
POOLING_FLAGS = {
    "mean": "pooling_mode_mean_tokens",
    "cls": "pooling_mode_cls_token",
    "last": "pooling_mode_lasttoken",
    "max": "pooling_mode_max_tokens",
    "weighted_mean": "pooling_mode_weightedmean_tokens",
}
Weights = dict[str, npt.NDArray[np.float32]]


DTYPES = {
    "float32": "F32",
    "float16": "F16",
    "uint16": "BF16",  # numpy has none of its own
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int8": "I8",
}


def make_folder(path: Path, *, pooling: str = "mean", normalize: bool = True, max_seq_length: int = 48) -> Path:
    """Write a whole model folder."""
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", CONFIG)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    folders = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": folders[kind]} for kind in kinds]
    write_json(path / "modules.json", modules)
    (path / "1_Pooling").mkdir(exist_ok=True)
    write_json(path / "1_Pooling" / "config.json", {"word_embedding_dimension": 16, POOLING_FLAGS[pooling]: True})
    write_json(path / "sentence_bert_config.json", {"max_seq_length": max_seq_length, "do_lower_case": False})
    _make_tokenizer().save(str(path / "tokenizer.json"))
    write_safetensors(path / "model.safetensors", make_weights())
    return path


def catalogue_entry(folder: Path) -> Model:
    """What an operator's catalogue would say of it."""
    return Model(
        id="tests/tiny", aliases=("tiny",), folder=str(folder), width=16, max_tokens=48, price=1, digest=digest(folder)
    )


def make_weights() -> Weights:
    """Random, and always the same."""
    dice = np.random.default_rng(20_261_123)

    def some(*shape: int) -> npt.NDArray[np.float32]:
        return dice.normal(0, 0.3, shape).astype(np.float32)

    width, inner = 16, 24
    weights = {
        "embeddings.word_embeddings.weight": some(len(WORDS), width),
        "embeddings.position_embeddings.weight": some(64, width),
        "embeddings.token_type_embeddings.weight": some(2, width),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        norms += [f"{at}attention.output.LayerNorm", f"{at}output.LayerNorm"]
        shapes = {f"attention.self.{name}": (width, width) for name in ("query", "key", "value")}
        shapes |= {
            "attention.output.dense": (width, width),
            "intermediate.dense": (inner, width),
            "output.dense": (width, inner),
        }
        for name, shape in shapes.items():
            weights |= {f"{at}{name}.weight": some(*shape), f"{at}{name}.bias": some(shape[0])}
    for name in norms:
        weights |= {f"{name}.weight": 1 + some(width), f"{name}.bias": some(width)}
    weights["embeddings.word_embeddings.weight"][POISON] = np.nan
    return weights


def textbook(ids: list[int], weights: Weights, *, pooling: str, normalize: bool) -> npt.NDArray[np.float64]:
    """BERT as its paper has it, in float64, for one text without padding."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}

    def norm(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(x: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids] + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(2):
        at = f"encoder.layer.{layer}."
        q, k, v = (
            dense(x, f"{at}attention.self.{name}").reshape(len(ids), 4, 4).transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = np.exp(q @ k.transpose(0, 2, 1) / 2.0)
        mixed = (scores / scores.sum(-1, keepdims=True)) @ v
        mixed = dense(mixed.transpose(1, 0, 2).reshape(len(ids), 16), f"{at}attention.output.dense")
        x = norm(x + mixed, f"{at}attention.output.LayerNorm")
        wide = dense(x, f"{at}intermediate.dense")
        wide = 0.5 * wide * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + dense(wide, f"{at}output.dense"), f"{at}output.LayerNorm")
    vector: npt.NDArray[np.float64] = x[0] if pooling == "cls" else x.mean(0)
    return vector / np.linalg.norm(vector) if normalize else vector


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def add_module(folder: Path, kind: str, config: dict[str, Any]) -> Path:
    """One more module behind the last, in a folder of its own, which is returned."""
    listed = json.loads((folder / "modules.json").read_text())
    where = f"{len(listed)}_{kind}"
    write_json(folder / "modules.json", [*listed, {"type": f"sentence_transformers.models.{kind}", "path": where}])
    (folder / where).mkdir()
    write_json(folder / where / "config.json", config)
    return folder / where


def write_safetensors(
    path: Path, weights: dict[str, npt.NDArray[Any]], claims: dict[str, tuple[int, ...]] | None = None
) -> None:
    """The format as its specification says, by hand, so that the reader is not tested against itself.

    `claims` are tensors that the header has, with these shapes, and the file has not.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, shape in (claims or {}).items():
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, 0]}
    at = 0
    for name, array in weights.items():
        dtype = DTYPES[array.dtype.name]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [at, at + array.nbytes]}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(array.tobytes() for array in weights.values()))


def _make_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(WordPiece({word: n for n, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.add_special_tokens(WORDS[:4])
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    # The trap that some published files set: they cut and pad by themselves.
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    return tokenizer
