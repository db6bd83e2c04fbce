"""A float32 GGUF, for llama.cpp, of a BERT folder that embeds or reranks: `python -m bench.upstreams.gguf FOLDER OUT`.

Keys and tensors are those that llama.cpp's own converter writes.
"""

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

U32, I32, F32, BOOL, STR, ARR = 4, 5, 6, 7, 8, 9
ALIGN = 32
TOP = {
    "embeddings.word_embeddings.weight": "token_embd.weight",
    "embeddings.position_embeddings.weight": "position_embd.weight",
    "embeddings.token_type_embeddings.weight": "token_types.weight",
    "embeddings.LayerNorm": "token_embd_norm",
}
LAYER = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}

HEAD = {"bert.pooler.dense": "cls", "classifier": "cls.output"}  # of a folder that reranks
MEAN, CLS, RANK = 1, 2, 4  # what llama.cpp makes of the tokens


def gguf_name(name: str) -> str | None:
    """What llama.cpp calls a tensor; None for one that it does not want."""
    head, _, part = name.rpartition(".")
    if head in HEAD:
        return f"{HEAD[head]}.{part}"
    name = name.removeprefix("bert.")
    if name in TOP:
        return TOP[name]
    stem, _, kind = name.rpartition(".")
    if stem in TOP:
        return f"{TOP[stem]}.{kind}"
    if stem.startswith("encoder.layer."):
        _, _, number, part = stem.split(".", 3)
        return f"blk.{number}.{LAYER[part]}.{kind}"
    return None  # position_ids, pooler, heads


def text(value: str) -> bytes:
    """A string as GGUF writes it."""
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def field(key: str, kind: int, value: Any) -> bytes:
    """A key and its value."""
    head = text(key) + struct.pack("<I", kind)
    if kind == STR:
        return head + text(value)
    return head + struct.pack({U32: "<I", F32: "<f", BOOL: "<?"}[kind], value)


def array(key: str, kind: int, values: Sequence[Any]) -> bytes:
    """A key and its values."""
    head = text(key) + struct.pack("<IIQ", ARR, kind, len(values))
    if kind == STR:
        return head + b"".join(map(text, values))
    return head + struct.pack(f"<{len(values)}{'f' if kind == F32 else 'i'}", *values)


def convert(folder: Path, out: Path) -> None:
    """Write the file of a folder."""
    write(out, _fields(folder), list(_tensors((folder / "model.safetensors").read_bytes())))


def write(out: Path, fields: list[bytes], tensors: Sequence[tuple[str, Sequence[int], bytes]]) -> None:
    """Write a file, whole. Tensors are names, shapes (as numpy has them) and float32."""
    infos, at = [], 0
    for name, shape, data in tensors:
        infos.append(text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), 0, at))  # 0: F32
        at += -(-len(data) // ALIGN) * ALIGN
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)) + b"".join(fields + infos)
    part = out.with_name(out.name + ".part")
    with part.open("wb") as file:
        for data in (head, *(data for _, _, data in tensors)):
            file.write(data + bytes(-len(data) % ALIGN))
    part.rename(out)


def _tensors(weights: bytes) -> Iterator[tuple[str, list[int], bytes]]:
    """Name, shape and data of what llama.cpp wants of a safetensors file."""
    (size,) = struct.unpack("<Q", weights[:8])
    for name, about in json.loads(weights[8 : 8 + size]).items():
        ours = None if name == "__metadata__" else gguf_name(name)
        if ours:
            assert about["dtype"] == "F32", about
            begin, end = about["data_offsets"]
            yield ours, about["shape"], weights[8 + size + begin : 8 + size + end]


def _pooling(folder: Path) -> int:
    path = folder / "1_Pooling" / "config.json"
    if not path.exists():
        return RANK
    return CLS if json.loads(path.read_text())["pooling_mode_cls_token"] else MEAN


def _fields(folder: Path) -> list[bytes]:
    """Everything but the tensors."""
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    normal = tokenizer["normalizer"]
    vocab = sorted(tokenizer["model"]["vocab"].items(), key=lambda item: item[1])
    special = {item["content"]: item["id"] for item in tokenizer["added_tokens"] if item["special"]}
    assert [number for _, number in vocab] == list(range(len(vocab)))
    vocab += [(f"[PAD{number}]", number) for number in range(len(vocab), config["vocab_size"])]  # rows that no text has
    assert (tokenizer["model"]["type"], normal["type"]) == ("WordPiece", "BertNormalizer")

    def phantom(token: str) -> str:
        return token if token in special else token[2:] if token.startswith("##") else "\u2581" + token

    bert = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
    }
    ids = {
        "bos": "[CLS]",
        "eos": "[SEP]",
        "unknown": "[UNK]",
        "seperator": "[SEP]",
        "padding": "[PAD]",
        "mask": "[MASK]",
    }
    return [
        field("general.architecture", STR, "bert"),
        field("general.type", STR, "model"),
        field("general.name", STR, folder.name),
        *(field(f"bert.{name}", U32, config[theirs]) for name, theirs in bert.items()),
        field("bert.attention.layer_norm_epsilon", F32, config["layer_norm_eps"]),
        field("general.file_type", U32, 0),
        field("bert.attention.causal", BOOL, False),
        field("bert.pooling_type", U32, _pooling(folder)),
        field("general.quantization_version", U32, 2),
        field("tokenizer.ggml.token_type_count", U32, config["type_vocab_size"]),
        field("tokenizer.ggml.model", STR, "bert"),
        field("tokenizer.ggml.pre", STR, "jina-v2-en"),  # llama.cpp's name of BERT's pre-tokenizer
        array("tokenizer.ggml.tokens", STR, [phantom(token) for token, _ in vocab]),
        array("tokenizer.ggml.token_type", I32, [3 if token in special else 1 for token, _ in vocab]),
        *(
            field(f"tokenizer.ggml.{name}_token_id", U32, special[token])
            for name, token in ids.items()
            if token in special
        ),
        *(field(f"tokenizer.ggml.add_{name}_token", BOOL, name != "sep") for name in ("bos", "eos", "sep")),
        field("tokenizer.ggml.normalizer.lowercase", BOOL, normal["lowercase"]),
    ]


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
