"""Where the parts of a model folder lie, and what its graph is to be made from."""

from pathlib import Path
from typing import Literal

import msgspec

from embedmesh.engine.jsonfile import FETCH_AGAIN, read_object, refused
from embedmesh.engine.modules import FILE as MODULES_FILE
from embedmesh.engine.modules import list_modules
from embedmesh.engine.safetensors import weight_files
from embedmesh.rules.errors import SetupError

Source = Literal["safetensors", "onnx", "static"]

ONNX_FILES = ("model.onnx", "onnx/model.onnx")
SENTENCES_FILE = "config_sentence_transformers.json"
INT8_FILE = "int8.json"
SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""One file by all the names that it has had; the first one there counts, as in sentence-transformers."""


class Kind(msgspec.Struct, frozen=True):
    """How config.json of an architecture spells what is needed before a graph is built. The first name there counts.

    `reserved`: positions start behind that of padding (RoBERTa and what follows it), so that those before are lost.
    """

    width: tuple[str, ...] = ("hidden_size",)
    positions: tuple[str, ...] = ("max_position_embeddings",)
    reserved: bool = False


KINDS: dict[str, Kind] = {
    "bert": Kind(),
    "roberta": Kind(reserved=True),
    "xlm-roberta": Kind(reserved=True),
    "camembert": Kind(reserved=True),
    "distilbert": Kind(width=("dim",)),
    "mpnet": Kind(reserved=True),
    "nomic_bert": Kind(width=("n_embd", "hidden_size"), positions=("n_positions", "max_position_embeddings")),
    "modernbert": Kind(),
    "gte": Kind(),
    "new": Kind(),
}
"""Of the architectures that are built from safetensors; `models.BUILDERS` has the same keys."""


def find_first(path: Path) -> tuple[Path, bool]:
    """The folder of the first module, and whether it is a static model's. Model2Vec once wrote no modules.json."""
    if not (path / MODULES_FILE).is_file() and _is_model2vec(path):
        return path, True
    modules = list_modules(path)
    if not modules:
        raise refused(path, f"{MODULES_FILE} lists nothing")
    kind, where = modules[0]
    return path / where, kind == "StaticEmbedding"


def _is_model2vec(path: Path) -> bool:
    config = read_object(path / "config.json", absent_is_empty=True)
    return config.get("model_type") == "model2vec"


def find_source(path: Path, transformer: Path, model_type: str) -> Literal["safetensors", "onnx"]:
    """Safetensors where the architecture is known, else an .onnx file. Never pickled weights.

    That the weights are there is for `check_weights` to say: a gateway, which only counts, needs none.
    """
    if model_type in KINDS and weight_files(transformer):
        return "safetensors"
    if find_onnx(transformer) is not None:
        return "onnx"
    if model_type not in KINDS:
        raise SetupError(
            f"Model folder {path.name}: the model type {model_type!r} is not supported without a model.onnx; from "
            f"safetensors this version knows {', '.join(KINDS)}."
        )
    return "safetensors"


def check_weights(path: Path, transformer: Path) -> None:
    """Raises SetupError where a folder has nothing that a graph could be made from."""
    if not weight_files(transformer) and find_onnx(transformer) is None:
        raise SetupError(
            f"Model folder {path.name} has no weights that are read: model.safetensors or model.onnx. {FETCH_AGAIN} "
            "Pickled weights must be converted to safetensors."
        )


def find_onnx(transformer: Path) -> Path | None:
    """The .onnx file of a folder, if there is one."""
    return next((transformer / name for name in ONNX_FILES if (transformer / name).is_file()), None)
