"""A model folder in Hugging Face layout, read into one struct. What is not known is refused by name, never guessed.

Wrong pooling or a forgotten lower-casing gives vectors that look fine and are useless, so every member that changes
them is either understood here or refused.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from embedmesh.rules.errors import SetupError

Pooling = Literal["mean", "cls"]

CONFIG_BYTES_MAX = 1024 * 1024  # the largest config.json in use has some 30 kB
HASH_CHUNK_BYTES = 1024 * 1024

POOLING_FLAGS: dict[str, Pooling | None] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": None,
    "pooling_mode_mean_sqrt_len_tokens": None,
    "pooling_mode_weightedmean_tokens": None,
    "pooling_mode_lasttoken": None,
}
"""The flags of a Pooling config. None: known to others, not to us."""

POOLING_REST = {"word_embedding_dimension", "include_prompt"}
TRANSFORMER_KNOWN = {"max_seq_length", "do_lower_case"}


class Folder(msgspec.Struct, frozen=True):
    """What a model folder says. `max_tokens` bounds one input, special tokens included."""

    path: Path
    model_type: str
    config: dict[str, Any]
    pooling: Pooling
    normalize: bool
    width: int
    max_tokens: int
    prompts: dict[str, str]


def read_folder(path: Path) -> Folder:
    """Read and check all but weights and tokenizer. Raises SetupError, in one line, for what is not understood."""
    config = _read_object(path / "config.json")
    model_type = _text(config, "model_type", path)
    transformer, pooling_path, normalize = _read_modules(path)
    pooling = _read_pooling(path / pooling_path / "config.json")
    sentence = _read_object(path / transformer / "sentence_bert_config.json", absent_is_empty=True)
    if unknown := set(sentence) - TRANSFORMER_KNOWN:
        raise _refused(path, f"sentence_bert_config.json has {sorted(unknown)[0]!r}")
    if sentence.get("do_lower_case"):
        raise _refused(path, "sentence_bert_config.json asks for do_lower_case")
    positions = _count(config, "max_position_embeddings", path)
    max_tokens = _count(sentence, "max_seq_length", path) if sentence.get("max_seq_length") else positions
    if max_tokens > positions:
        raise SetupError(f"Model folder {path.name}: max_seq_length {max_tokens} exceeds its {positions} positions.")
    return Folder(
        path=path,
        model_type=model_type,
        config=config,
        pooling=pooling,
        normalize=normalize,
        width=_count(config, "hidden_size", path),
        max_tokens=max_tokens,
        prompts=_read_prompts(path),
    )


def digest(path: Path) -> str:
    """SHA-256, in hex, over what decides a model's vectors.

    Hashed is one line a file, `SHA256-OF-FILE␠relative/name\\n`, the lines sorted, of those of these files that exist:
    `config.json`, `modules.json`, `sentence_bert_config.json`, `config_sentence_transformers.json`, `tokenizer.json`,
    every `*.safetensors` of the folder, and `config.json` and `*.safetensors` of each module folder that `modules.json`
    names. Takes about 60 ms for 90 MB, and reads all of it: the worker calls this at load.
    """
    if not any(path.glob("*.safetensors")):
        raise SetupError(f"Model folder {path.name} has no weights (*.safetensors). Run `embedmesh setup`.")
    lines = sorted(f"{_hash_file(file)} {file.relative_to(path).as_posix()}\n" for file in _deciding_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _deciding_files(path: Path) -> list[Path]:
    names = ["config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"]
    files = {path / name for name in [*names, "tokenizer.json"]} | set(path.glob("*.safetensors"))
    for _, module in _list_modules(path):
        files |= {path / module / "config.json", *(path / module).glob("*.safetensors")}
    return [file for file in files if file.is_file()]


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"Cannot read model file {path.name}: {error.strerror}. Run `embedmesh setup`.") from None


def _read_modules(path: Path) -> tuple[str, str, bool]:
    """The folders of Transformer and Pooling, and whether vectors are normalised."""
    modules = _list_modules(path)
    kinds = [kind for kind, _ in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise _refused(path, f"modules.json lists {' + '.join(kinds) or 'nothing'}")
    if modules[0][1] not in ("", "."):
        raise _refused(path, "modules.json keeps its Transformer in a folder of its own")
    return modules[0][1], modules[1][1], len(modules) == 3


def _list_modules(path: Path) -> list[tuple[str, str]]:
    """(kind, folder) of each module, in order."""
    listed = _read_json(path / "modules.json")
    if not isinstance(listed, list) or not all(isinstance(module, dict) for module in listed):
        raise SetupError(f"Model folder {path.name}: modules.json is not a list of modules.")
    modules = []
    for module in listed:
        package, _, kind = _text(module, "type", path).rpartition(".")
        where = module.get("path")
        if package.partition(".")[0] != "sentence_transformers" or not isinstance(where, str):
            raise _refused(path, f"modules.json has a module of type {module.get('type')!r}")
        if where.startswith("/") or ".." in Path(where).parts:
            raise _refused(path, "modules.json points outside of the folder")
        modules.append((kind, where))
    return modules


def _read_pooling(path: Path) -> Pooling:
    config = _read_object(path)
    name = path.parent.parent
    if unknown := set(config) - set(POOLING_FLAGS) - POOLING_REST:
        raise _refused(name, f"the pooling config has {sorted(unknown)[0]!r}")
    if config.get("include_prompt", True) is not True:
        raise _refused(name, "the pooling config leaves the prompt out of the pooling")
    chosen = [flag for flag in POOLING_FLAGS if config.get(flag)]
    pooling = POOLING_FLAGS[chosen[0]] if len(chosen) == 1 else None
    if pooling is None:
        raise _refused(name, f"its pooling is {' + '.join(chosen) or 'none'}")
    return pooling


def _read_prompts(path: Path) -> dict[str, str]:
    config = _read_object(path / "config_sentence_transformers.json", absent_is_empty=True)
    if config.get("default_prompt_name") is not None:
        raise _refused(path, "config_sentence_transformers.json has a default prompt")
    try:
        return msgspec.convert(config.get("prompts") or {}, dict[str, str])
    except msgspec.ValidationError:
        raise SetupError(f"Model folder {path.name}: the prompts are not texts by name.") from None


def _read_object(path: Path, *, absent_is_empty: bool = False) -> dict[str, Any]:
    if absent_is_empty and not path.exists():
        return {}
    value = _read_json(path)
    if not isinstance(value, dict):
        raise SetupError(f"Model file {path.name} is not a JSON object.")
    return value


def _read_json(path: Path) -> object:
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise SetupError(f"Cannot read model file {path.name}: {error.strerror}. Run `embedmesh setup`.") from None
    if len(text) > CONFIG_BYTES_MAX:
        raise SetupError(f"Model file {path.name} is larger than {CONFIG_BYTES_MAX:,} bytes: not a config.")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise SetupError(f"Model file {path.name} is not JSON: fetch the model again.") from None


def _text(config: dict[str, Any], member: str, path: Path) -> str:
    value = config.get(member)
    if not isinstance(value, str):
        raise SetupError(f"Model folder {path.name}: {member} is missing or not a string.")
    return value


def _count(config: dict[str, Any], member: str, path: Path) -> int:
    value = config.get(member)
    if type(value) is not int or value < 1:
        raise SetupError(f"Model folder {path.name}: {member} is missing or not a positive integer.")
    return value


def _refused(path: Path, what: str) -> SetupError:
    return SetupError(f"Model folder {path.name} cannot be served: {what}, which this version does not know.")
