"""Folders of large models' real size, with random weights: `python -m bench.engine.large_folder NAME FOLDER [--dtype]`.

What a large model costs (memory, time to load, tokens a second) does not depend on what its weights say, so a folder
with the true configuration and random numbers shows it without a download. NAME is one of MODELS. Weights are written
tensor by tensor: the script itself needs some 100 MB. Vectors mean nothing.
"""

import json
import string
import sys
from collections.abc import Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import numpy as np
import numpy.typing as npt
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from embedmesh.engine.safetensors import WEIGHTS_FILE

Dtype = Literal["F32", "F16", "BF16"]
Tensors = list[tuple[str, tuple[int, ...]]]

DTYPE_BYTES: dict[Dtype, int] = {"F32": 4, "F16": 2, "BF16": 2}
WEIGHT_STD = 0.02  # as these models are initialised: states stay near 1 through all layers
CHUNK_NUMBERS = 4 * 2**20  # written at once
SEED = 20_261_130
HEADER_ALIGN = 8  # the format asks for it
PIECE_LETTERS = (1, 2, 3, 4)  # of the vocabularies that are made up here
MODERNBERT_SPECIALS = ("<|endoftext|>", "<|padding|>", "[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")
XLM_ROBERTA_SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

XLM_ROBERTA_LARGE: dict[str, Any] = {
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
    "vocab_size": 250_002,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
MODERNBERT_LARGE: dict[str, Any] = {
    "architectures": ["ModernBertModel"],
    "model_type": "modernbert",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "intermediate_size": 2624,
    "vocab_size": 50_368,
    "max_position_embeddings": 8_192,
    "norm_eps": 1e-5,
    "hidden_activation": "gelu",
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160_000.0,
    "local_rope_theta": 10_000.0,
    "norm_bias": False,
    "attention_bias": False,
    "mlp_bias": False,
    "pad_token_id": 50_283,
    "bos_token_id": 50_281,
    "eos_token_id": 50_282,
    "cls_token_id": 50_281,
    "sep_token_id": 50_282,
}


class LargeModel(NamedTuple):
    """A published model's configuration, and the type of its weights as published."""

    config: dict[str, Any]
    max_tokens: int
    pooling: Literal["mean", "cls"]
    dtype: Dtype


MODELS = {
    "multilingual-e5-large-instruct": LargeModel(XLM_ROBERTA_LARGE, 512, "mean", "F16"),
    "bge-m3": LargeModel(XLM_ROBERTA_LARGE | {"max_position_embeddings": 8_194}, 8_192, "cls", "F32"),
    "modernbert-large": LargeModel(MODERNBERT_LARGE, 8_192, "mean", "F32"),
}


def find_or_make(name: str, home: Path) -> Path:
    """The folder `home`/`name` of one of MODELS, made if it is not there. It takes 1.1 to 2.3 GB, and some 20 s."""
    folder = home / name
    return folder if (folder / WEIGHTS_FILE).exists() else make_folder(MODELS[name], folder)


def make_folder(model: LargeModel, folder: Path, dtype: Dtype | None = None) -> Path:
    """Write the whole folder: configuration, tokenizer and, at last, weights. The same numbers each time."""
    folder.mkdir(parents=True, exist_ok=True)
    flag = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}[model.pooling]
    listed = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    _write_json(folder / "config.json", model.config)
    _write_json(
        folder / "modules.json",
        [
            {"idx": at, "name": str(at), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for at, (kind, path) in enumerate(listed)
        ],
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config["hidden_size"], flag: True}
    )
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": model.max_tokens, "do_lower_case": False})
    _write_tokenizer(model.config, model.max_tokens, folder)
    tensors = list(_modernbert(model.config) if model.config["model_type"] == "modernbert" else _bert(model.config))
    _write_weights(folder / WEIGHTS_FILE, tensors, dtype or model.dtype)
    return folder


def _bert(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Tensors of BERT and of XLM-RoBERTa, the pooler of published files included, which nobody reads."""
    width, wide = config["hidden_size"], config["intermediate_size"]
    for table, rows in (
        ("word", "vocab_size"),
        ("position", "max_position_embeddings"),
        ("token_type", "type_vocab_size"),
    ):
        yield f"embeddings.{table}_embeddings.weight", (config[rows], width)
    shapes: dict[str, tuple[int, ...]] = {
        f"attention.self.{name}": (width, width) for name in ("query", "key", "value")
    }
    shapes |= {
        "attention.output.dense": (width, width),
        "attention.output.LayerNorm": (width,),
        "intermediate.dense": (wide, width),
        "output.dense": (width, wide),
        "output.LayerNorm": (width,),
    }
    layers = {
        f"encoder.layer.{layer}.{name}": shape
        for layer in range(config["num_hidden_layers"])
        for name, shape in shapes.items()
    }
    for name, shape in {"embeddings.LayerNorm": (width,), **layers, "pooler.dense": (width, width)}.items():
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


def _modernbert(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, wide = config["hidden_size"], config["intermediate_size"]
    yield "embeddings.tok_embeddings.weight", (config["vocab_size"], width)
    yield "embeddings.norm.weight", (width,)
    for layer in range(config["num_hidden_layers"]):
        at = f"layers.{layer}."
        if layer:
            yield f"{at}attn_norm.weight", (width,)
        yield f"{at}attn.Wqkv.weight", (3 * width, width)
        yield f"{at}attn.Wo.weight", (width, width)
        yield f"{at}mlp_norm.weight", (width,)
        yield f"{at}mlp.Wi.weight", (2 * wide, width)
        yield f"{at}mlp.Wo.weight", (width, wide)
    yield "final_norm.weight", (width,)


def _write_weights(path: Path, tensors: Tensors, dtype: Dtype) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in tensors:
        end = at + int(np.prod(shape)) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % HEADER_ALIGN)
    dice = np.random.default_rng(SEED)
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in tensors:
            # Of one axis are the norms, which begin at 1, and the biases.
            mean = 1.0 if len(shape) == 1 and name.endswith("weight") else 0.0
            for numbers in _chunks(int(np.prod(shape))):
                file.write(_encode(mean + WEIGHT_STD * dice.standard_normal(numbers, np.float32), dtype))
    part.rename(path)


def _chunks(numbers: int) -> Iterator[int]:
    for start in range(0, numbers, CHUNK_NUMBERS):
        yield min(CHUNK_NUMBERS, numbers - start)


def _encode(numbers: npt.NDArray[np.float32], dtype: Dtype) -> bytes:
    match dtype:
        case "F32":
            return numbers.astype("<f4").tobytes()
        case "F16":
            return numbers.astype("<f2").tobytes()
        case "BF16":  # the upper half of a float32
            return (numbers.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def _write_tokenizer(config: dict[str, Any], max_tokens: int, folder: Path) -> None:
    if config["model_type"] == "modernbert":
        tokenizer, named = _byte_pairs(config["vocab_size"]), "PreTrainedTokenizerFast"
        tokens = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    else:
        tokenizer, named = _unigram(config["vocab_size"]), "XLMRobertaTokenizer"
        tokens = {"unk_token": "<unk>", "cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": named, "model_max_length": max_tokens, "clean_up_tokenization_spaces": False}
    _write_json(folder / "tokenizer_config.json", settings | tokens)


def _letters() -> Iterator[str]:
    """a, b … aa, ab …"""
    for length in PIECE_LETTERS:
        yield from map("".join, product(string.ascii_lowercase, repeat=length))


def _unigram(size: int) -> Tokenizer:
    """As XLM-RoBERTa has it: pieces with and without a space before them, the shorter the likelier a letter."""
    printable = [*string.digits, *string.ascii_uppercase, *string.punctuation]
    inner = (piece for letters in _letters() for piece in (letters, f"▁{letters}"))
    made = islice(dict.fromkeys(["▁", *printable, *inner]), size - len(XLM_ROBERTA_SPECIALS) - 1)
    pieces = [(piece, 0.0) for piece in XLM_ROBERTA_SPECIALS]
    pieces += [(piece, -2.0 - 2.0 * len(piece)) for piece in made]
    tokenizer = Tokenizer(models.Unigram([*pieces, ("<mask>", 0.0)], unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([*XLM_ROBERTA_SPECIALS, AddedToken("<mask>", lstrip=True, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def _byte_pairs(size: int) -> Tokenizer:
    """As ModernBERT has it: byte pairs, merged a letter at a time, and its special tokens at the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(piece[:-1], piece[-1]) for piece in _pairs()]
    merges = merges[: size - len(alphabet) - len(MODERNBERT_SPECIALS)]
    words = [*alphabet, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words += MODERNBERT_SPECIALS
    tokenizer.add_special_tokens([*MODERNBERT_SPECIALS[:-1], AddedToken("[MASK]", lstrip=True, special=True)])
    ends = [(name, words.index(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return tokenizer


def _pairs() -> Iterator[str]:
    """Pieces of two letters and more, each of which begins with a piece before it; `Ġ` is a space."""
    for length in PIECE_LETTERS:
        for letters in map("".join, product(string.ascii_lowercase, repeat=length)):
            yield f"Ġ{letters}"
            if length > 1:
                yield letters


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


@click.command()
@click.argument("name", type=click.Choice(list(MODELS)))
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path))
@click.option("--dtype", type=click.Choice(list(DTYPE_BYTES)), help="Of the weights. Default: as published.")
def main(name: str, folder: Path, dtype: Dtype | None) -> None:
    """Write a folder of the size of the model NAME."""
    print(make_folder(MODELS[name], folder, dtype), file=sys.stderr)


if __name__ == "__main__":
    main()
