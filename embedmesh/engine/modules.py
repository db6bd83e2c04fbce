"""`modules.json` of sentence-transformers: how token states become a vector.

Its spellings before and after version 6 are both read. Unknown settings that may change vectors are refused.
"""

from pathlib import Path
from typing import Literal

import msgspec

from embedmesh.engine.jsonfile import Fields, count, only_known, read_json, read_object, refused, text
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import MODEL_MODULES_MAX

Pooling = Literal["mean", "cls", "last", "max", "weighted_mean"]
Activation = Literal["identity", "tanh", "gelu", "relu"]

MODULES_FILE = "modules.json"
EMBEDDING = "sentence_embedding"  # what modules give each other

POOLING_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""A Pooling config's modes before version 6: one flag for each."""

POOLINGS: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "max": "max",
    "weightedmean": "weighted_mean",
    "lasttoken": "last",
}
"""The modes of version 6 that are served."""

POOLING_KNOWN: dict[str, tuple[object, ...]] = dict.fromkeys(
    (*POOLING_FLAGS, "pooling_mode", "word_embedding_dimension", "embedding_dimension", "include_prompt"), ()
)
DENSE_ACTIVATIONS: dict[str, Activation] = {
    "torch.nn.modules.linear.Identity": "identity",
    "torch.nn.modules.activation.Tanh": "tanh",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.ReLU": "relu",
}
NAMES_KNOWN: dict[str, tuple[object, ...]] = dict.fromkeys(("module_input_name", "module_output_name"), (EMBEDDING,))
DENSE_KNOWN: dict[str, tuple[object, ...]] = {
    **NAMES_KNOWN,
    **dict.fromkeys(("in_features", "out_features", "activation_function"), ()),
    "bias": (True, False),
    "use_residual": (False,),
}


class Dense(msgspec.Struct, frozen=True):
    """A linear layer behind the pooling; `model.safetensors` of its folder has `linear.weight` and `linear.bias`."""

    path: Path
    inputs: int
    outputs: int
    activation: Activation
    bias: bool


class Modules(msgspec.Struct, frozen=True):
    """What `modules.json` lists behind the transformer, or the table of a static model."""

    pooling: Pooling
    dense: tuple[Dense, ...]
    normalize: bool


def read_modules(path: Path, width: int | None, *, result: str = EMBEDDING) -> Modules:
    """Read and check `modules.json` and the configs that it points to. Raises SetupError.

    `width` is that of token states, None for a static model; the widths of all modules must follow from it. `result` is
    what the last dense layer gives.
    """
    listed = list_modules(path)
    kinds = [kind for kind, _ in listed]
    ends = 1 if kinds[-1:] == ["Normalize"] else 0
    start = ["StaticEmbedding"] if width is None else ["Transformer", "Pooling"]
    middle = kinds[len(start) : len(kinds) - ends]
    if kinds[: len(start)] != start or any(kind != "Dense" for kind in middle):
        raise refused(path, f"{MODULES_FILE} lists {' + '.join(kinds) or 'nothing'}")
    places = [where for kind, where in listed if kind == "Dense"]
    dense = tuple(
        _read_dense(path, where, result if at == len(places) else EMBEDDING) for at, where in enumerate(places, 1)
    )
    if ends:
        only_known(_config(path / listed[-1][1]), NAMES_KNOWN, _config_name(listed[-1][1]), path)
    pooling: Pooling = "mean"
    if width is not None:
        pooling = _read_pooling(path, listed[1][1], width)
        for layer in dense:
            if layer.inputs != width:
                raise SetupError(f"Model folder {path.name}: a dense layer takes {layer.inputs} of {width} components.")
            width = layer.outputs
    elif dense:
        raise refused(path, f"{MODULES_FILE} lists {' + '.join(kinds)}")
    return Modules(pooling, dense, bool(ends))


def list_modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order. Raises SetupError."""
    if not (path / MODULES_FILE).is_file():
        raise SetupError(
            f"Model folder {path.name} has no {MODULES_FILE}, which says how token states become a vector. "
            "Add the one of sentence-transformers (pooling is never guessed)."
        )
    listed = read_json(path / MODULES_FILE)
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise SetupError(f"Model folder {path.name}: {MODULES_FILE} is not a list of modules.")
    if len(listed) > MODEL_MODULES_MAX:
        raise refused(path, f"{MODULES_FILE} lists {len(listed)} modules")
    return [_module(module, path) for module in listed]


def _module(module: Fields, path: Path) -> tuple[str, str]:
    package, _, kind = text(module, "type", path, MODULES_FILE).rpartition(".")
    where = module.get("path")
    if package.partition(".")[0] != "sentence_transformers" or not isinstance(where, str):
        raise refused(path, f"{MODULES_FILE} has a module of type {module.get('type')!r}")
    if where.startswith("/") or ".." in Path(where).parts:
        raise refused(path, f"{MODULES_FILE} points outside of the folder")
    if module.get("kwargs"):
        raise refused(path, f"{MODULES_FILE} gives its {kind} arguments of its own")
    return kind, where


def _config(folder: Path) -> Fields:
    return read_object(folder / "config.json", absent_is_empty=True)


def _config_name(where: str) -> str:
    return (Path(where) / "config.json").as_posix()


def _read_pooling(path: Path, where: str, width: int) -> Pooling:
    config, file = read_object(path / where / "config.json"), _config_name(where)
    only_known(config, POOLING_KNOWN, file, path)
    if config.get("include_prompt", True) is not True:
        raise refused(path, f"{file} leaves the prompt out of the pooling ('include_prompt')")
    for name in ("word_embedding_dimension", "embedding_dimension"):
        if config.get(name, width) != width:
            raise SetupError(f"Model folder {path.name}: {name} of {file} is not the {width} of its model.")
    modes = config.get("pooling_mode", [mode for flag, mode in POOLING_FLAGS.items() if config.get(flag)])
    names = [str(mode) for mode in modes] if isinstance(modes, list) else [str(modes)]
    if len(names) != 1 or names[0] not in POOLINGS:
        raise refused(path, f"its pooling is {' + '.join(names) or 'none'} in {file}")
    return POOLINGS[names[0]]


def _read_dense(path: Path, where: str, result: str) -> Dense:
    config, file = read_object(path / where / "config.json"), _config_name(where)
    known = DENSE_KNOWN | {"module_output_name": (result,)}
    only_known({"module_output_name": EMBEDDING} | config, known, file, path)
    activation = DENSE_ACTIVATIONS.get(text(config, "activation_function", path, file))
    if activation is None:
        raise refused(path, f"{file} has 'activation_function' = {config['activation_function']!r}"[:160])
    inputs, outputs = (count(config, name, path, file) for name in ("in_features", "out_features"))
    return Dense(path / where, inputs, outputs, activation, config.get("bias", True))
