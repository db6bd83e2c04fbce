"""The digest of a model folder: a catalogue names it, and a worker compares it before it loads anything."""

import hashlib
import mmap
from pathlib import Path

from embedmesh.engine import layout
from embedmesh.engine.jsonfile import FETCH_AGAIN, read_object, text
from embedmesh.engine.modules import MODULES_FILE
from embedmesh.engine.safetensors import WEIGHTS_INDEX_FILE
from embedmesh.rules.errors import SetupError

ONNX_LOCATION = b"\x0a\x08location\x12"  # how ONNX (protobuf) says in which file beside it a tensor lies
ONNX_LOCATION_BYTES_MAX = 127  # one byte of length


def digest(path: Path) -> str:
    """SHA-256, in hex, over the files that decide a model's vectors.

    One line a file is hashed, `SHA256-OF-FILE␠relative/name\\n`, the lines sorted, for each of these files that exists:
    `modules.json`, `config_sentence_transformers.json` and `int8.json`; of the folder itself and of each one that
    `modules.json` names, `config.json`, `sentence_*_config.json`, `tokenizer.json`, `model.safetensors.index.json` and
    every `*.safetensors`; and, where the graph is made from it, the `.onnx` file with the files of tensors beside it.
    Of a reranker `tokenizer_config.json`, too: the node reads there whether its model is given token types. Of others
    not it and its like: they decide ids, which gateways make and nodes are sent.
    Takes about 60 ms for 90 MB, and reads all of it.
    """
    lines = sorted(f"{_hash_file(file)} {file.relative_to(path).as_posix()}\n" for file in _deciding_files(path))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def size_bytes(path: Path) -> int:
    """The size of these files, mostly weights. Raises SetupError for a folder that is no model's."""
    return sum(file.stat().st_size for file in _deciding_files(path))


def _deciding_files(path: Path) -> set[Path]:
    first, static = layout.find_first(path)
    names = ["config.json", *layout.SENTENCE_FILES, "tokenizer.json", WEIGHTS_INDEX_FILE]
    files = {path / MODULES_FILE, path / layout.SENTENCES_FILE, path / layout.INT8_FILE}
    for folder in {path, *layout.module_folders(path)}:
        files |= {*(folder / name for name in names), *folder.glob("*.safetensors")}
    if layout.is_reranker(path):
        files.add(first / layout.SETTINGS_FILE)
    layout.check_weights(path, first)
    if not static:
        model_type = text(read_object(first / "config.json"), "model_type", path)
        if layout.find_source(path, first, model_type) == "onnx":
            files |= _onnx_files(first)
    return {file for file in files if file.is_file()}


def _onnx_files(transformer: Path) -> set[Path]:
    """The .onnx file and those that it keeps tensors in. Raises SetupError when one is not beside it."""
    onnx = layout.find_onnx(transformer)
    assert onnx is not None  # the source is "onnx"
    files = {onnx}
    try:
        with onnx.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            at = content.find(ONNX_LOCATION)
            while at >= 0:
                start = at + len(ONNX_LOCATION) + 1
                length = content[start - 1]
                name = content[start : start + length].decode(errors="replace")
                if length > ONNX_LOCATION_BYTES_MAX or Path(name).name != name or not (onnx.parent / name).is_file():
                    raise SetupError(f"{onnx.name} keeps tensors in {name!r}, which is no file beside it.")
                files.add(onnx.parent / name)
                at = content.find(ONNX_LOCATION, start)
    except (OSError, ValueError, IndexError):
        raise SetupError(f"Cannot read model file {onnx.name}. Fetch the model again.") from None
    return files


def _hash_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SetupError(f"Cannot read model file {path.name}: {error.strerror}. {FETCH_AGAIN}") from None
