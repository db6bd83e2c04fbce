"""Where the parts of a model folder are, and what its graph is made from."""

from pathlib import Path
from typing import Literal

import msgspec

from embedmesh.engine.jsonfile import FETCH_AGAIN, Fields, read_object, refused
from embedmesh.engine.modules import MODULES_FILE, list_modules
from embedmesh.engine.safetensors import weight_files
from embedmesh.rules.errors import SetupError

Source = Literal["safetensors", "onnx", "static"]

ONNX_FILES = ("model.onnx", "onnx/model.onnx")
SENTENCES_FILE = "config_sentence_transformers.json"
CROSS_ENCODER = "CrossEncoder"  # the `model_type` in that file
SETTINGS_FILE = "tokenizer_config.json"
CLASSIFIER = "ForSequenceClassification"  # how the architecture of a model with such a head ends, in config.json
INT8_FILE = "int8.json"
SENTENCE_FILES = tuple(
    f"sentence_{name}_config.json"
    for name in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
"""All names that this file has had; the first one there counts, as in sentence-transformers."""


class Architecture(msgspec.Struct, frozen=True):
    """How an architecture's config.json spells the fields that are needed before a graph is built.

    Of several names the first one in the file counts. `reserved`: positions start behind that of padding (RoBERTa and
    its successors), so that those before are lost. `types`: there may be a table of token types.
    """

    width: tuple[str, ...] = ("hidden_size",)
    positions: tuple[str, ...] = ("max_position_embeddings",)
    reserved: bool = False
    types: bool = True


ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(),
    "roberta": Architecture(reserved=True),
    "xlm-roberta": Architecture(reserved=True),
    "camembert": Architecture(reserved=True),
    "distilbert": Architecture(width=("dim",), types=False),
    "electra": Architecture(),
    "mpnet": Architecture(reserved=True, types=False),
    "nomic_bert": Architecture(width=("n_embd", "hidden_size"), positions=("n_positions", "max_position_embeddings")),
    "modernbert": Architecture(types=False),
    "gte": Architecture(),
    "new": Architecture(),
}
"""The architectures that are built from safetensors; `models.BUILDERS` has the same keys."""

ONNX_FIRST = ("electra",)  # built since there are rerankers: a folder with both keeps its vectors and its digest


def find_first(path: Path) -> tuple[Path, bool]:
    """The folder of the first module, and whether it is a static model's.

    Model2Vec once wrote no modules.json, and most rerankers have none.
    """
    if not (path / MODULES_FILE).is_file():
        config = read_object(path / "config.json", absent_is_empty=True)
        if (static := config.get("model_type") == "model2vec") or is_classifier(config):
            return path, static
    modules = list_modules(path)
    if not modules:
        raise refused(path, f"{MODULES_FILE} lists nothing")
    kind, where = modules[0]
    return path / where, kind == "StaticEmbedding"


def module_folders(path: Path) -> set[Path]:
    """The folders of all modules."""
    listed = list_modules(path) if (path / MODULES_FILE).is_file() else []
    return {find_first(path)[0], *(path / where for _, where in listed)}


def is_classifier(config: Fields) -> bool:
    """Whether a config.json is that of a model with a head for texts, or pairs of them, as a whole."""
    named = config.get("architectures")
    return isinstance(named, list) and any(str(each).endswith(CLASSIFIER) for each in named)


def is_reranker(path: Path) -> bool:
    """Whether a folder's model scores pairs: CrossEncoder has saved it, or, without modules, its class has a head."""
    if not (path / MODULES_FILE).is_file():
        return is_classifier(read_object(path / "config.json", absent_is_empty=True))
    return read_object(path / SENTENCES_FILE, absent_is_empty=True).get("model_type") == CROSS_ENCODER


def has_types(model_type: str, config: Fields) -> bool:
    """Whether it matters to a model which tokens are of the second text."""
    return ARCHITECTURES.get(model_type, Architecture()).types and config.get("type_vocab_size") not in (0, 1)


def find_source(path: Path, transformer: Path, model_type: str) -> Literal["safetensors", "onnx"]:
    """Safetensors where the architecture is known, else an .onnx file. Never pickled weights.

    It does not check that there are weights: a gateway, which only counts, needs none. `check_weights` does.
    """
    onnx = find_onnx(transformer) is not None
    if model_type in ARCHITECTURES and weight_files(transformer) and not (onnx and model_type in ONNX_FIRST):
        return "safetensors"
    if onnx:
        return "onnx"
    if model_type not in ARCHITECTURES:
        raise SetupError(
            f"Model folder {path.name}: the model type {model_type!r} is not supported without a model.onnx; from "
            f"safetensors this version knows {', '.join(ARCHITECTURES)}."
        )
    return "safetensors"


def check_weights(path: Path, transformer: Path) -> None:
    """Raises SetupError where a folder has no weights that a graph could be made from."""
    if not weight_files(transformer) and find_onnx(transformer) is None:
        raise SetupError(
            f"Model folder {path.name} has no weights that are read: model.safetensors or model.onnx. {FETCH_AGAIN} "
            "Pickled weights must be converted to safetensors."
        )


def find_onnx(transformer: Path) -> Path | None:
    """The .onnx file of a folder, if there is one."""
    return next((transformer / name for name in ONNX_FILES if (transformer / name).is_file()), None)
