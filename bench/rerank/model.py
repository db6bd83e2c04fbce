"""A cross-encoder of MiniLM's size: the default model's weights under a head that is made up here.

What it costs does not depend on what its head says, and its scores are the same on every machine.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np

from bench.engine.models import MODELS
from embedmesh.engine.digest import digest
from embedmesh.engine.safetensors import WEIGHTS_FILE

RERANKER = "minilm-reranker"
TOKENS = 512
PRICE = 10_000_000  # nano-USD per million tokens
HEAD_SCALE = 1.0  # more, and float32 would not tell scores to 1e-5
HEADER_ALIGN = 8  # the format asks for it

QUESTION = "Which planet is the largest?"
DOCUMENTS = [
    "Jupiter is the largest planet of the solar system.",
    "Bread needs flour, water, yeast and salt.",
    "木星は太陽系で最大の惑星である。",
    "La plus grande planète est Jupiter, et de loin: les autres y tiendraient toutes ensemble.",
    "Planets",
    "A planet [SEP] is a body that orbits a star, that its own gravity made round, and that has cleared its orbit.",
]
LOGITS = [0.957338, 0.503961, 0.859923, 0.940771, 0.607214, 0.842422]
"""Of each document, by CrossEncoder of sentence-transformers 6.2."""


def cross_encoder(model: Path) -> Path:
    """Its folder, made of the default model's if it is not there: 90 MB."""
    folder = MODELS / f"{model.name}-reranks"
    if not (folder / WEIGHTS_FILE).exists():
        make_cross_encoder(model, folder)
    return folder


def make_cross_encoder(model: Path, folder: Path) -> Path:
    """Write it, the weights at last; `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(model / "special_tokens_map.json", folder)
    head: dict[str, object] = {
        "architectures": ["BertForSequenceClassification"],
        "id2label": {"0": "score"},
        "label2id": {"score": 0},
    }
    _edited(model, folder, "config.json", head)
    _edited(model, folder, "tokenizer_config.json", {"model_max_length": TOKENS})
    _edited(model, folder, "tokenizer.json", {"truncation": None, "padding": None})
    part = folder / "weights.part"
    part.write_bytes(_with_head((model / WEIGHTS_FILE).read_bytes()))
    part.rename(folder / WEIGHTS_FILE)
    return folder


def catalogue_of(folder: Path) -> str:
    """A catalogue that has this model alone."""
    return f"""[[models]]
id = "{RERANKER}"
modalities = ["rerank"]
folder = "{folder}"
max_tokens = {TOKENS}
price = {PRICE}
digest = "{digest(folder)}"
"""


def _edited(model: Path, folder: Path, name: str, changes: Mapping[str, object]) -> None:
    fields = msgspec.json.decode((model / name).read_bytes())
    (folder / name).write_bytes(msgspec.json.encode(fields | changes))


def _with_head(file: bytes) -> bytes:
    """A safetensors file of a plain BERT as one of BertForSequenceClassification."""
    start = 8 + int.from_bytes(file[:8], "little")
    header, data = json.loads(file[8:start]), file[start:]
    width = header["embeddings.LayerNorm.weight"]["shape"][0]
    head = {"weight": HEAD_SCALE * np.cos(np.arange(width)).reshape(1, width), "bias": np.zeros(1)}
    renamed = {f"bert.{name}": entry for name, entry in header.items() if name != "__metadata__"}
    for name, numbers in head.items():
        added = numbers.astype("<f4").tobytes()
        places = [len(data), len(data) + len(added)]
        renamed[f"classifier.{name}"] = {"dtype": "F32", "shape": list(numbers.shape), "data_offsets": places}
        data += added
    text = json.dumps({"__metadata__": {"format": "pt"}, **renamed}).encode()
    text += b" " * (-len(text) % HEADER_ALIGN)
    return len(text).to_bytes(8, "little") + text + data
