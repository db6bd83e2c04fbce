"""The JSON files of a model folder, which are untrusted input. Every refusal is one line that shows no path."""

from pathlib import Path
from typing import Any

import msgspec

from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import MODEL_CONFIG_BYTES_MAX

FETCH_AGAIN = "Fetch the model again; the default one: `embedmesh setup`."

Fields = dict[str, Any]


def read_object(path: Path, *, absent_is_empty: bool = False) -> Fields:
    """The fields of a JSON object. Raises SetupError for anything else."""
    if absent_is_empty and not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise SetupError(f"Model file {_short(path)} is not a JSON object.")
    return value


def read_json(path: Path) -> object:
    """The value of a bounded JSON file. Raises SetupError."""
    try:
        with path.open("rb") as file:
            text = file.read(MODEL_CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise SetupError(f"Cannot read model file {_short(path)}: {error.strerror}. {FETCH_AGAIN}") from None
    if len(text) > MODEL_CONFIG_BYTES_MAX:
        raise SetupError(f"Model file {_short(path)} is larger than {MODEL_CONFIG_BYTES_MAX:,} bytes: not a config.")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise SetupError(f"Model file {_short(path)} is not JSON: fetch the model again.") from None


def text(fields: Fields, name: str, folder: Path, file: str = "config.json") -> str:
    """A field, of that file in the model's folder, that must be a string."""
    value = fields.get(name)
    if not isinstance(value, str):
        raise SetupError(f"Model folder {folder.name}: {name} of {file} is missing or not a string.")
    return value


def count(fields: Fields, name: str, folder: Path, file: str = "config.json") -> int:
    """A field, of that file in the model's folder, that must be a positive integer."""
    value = fields.get(name)
    if type(value) is not int or value < 1:
        raise SetupError(f"Model folder {folder.name}: {name} of {file} is missing or not a positive integer.")
    return value


def only_known(fields: Fields, known: dict[str, tuple[object, ...]], file: str, folder: Path) -> None:
    """Refuse a field that is not in `known`, or whose value is not among the known ones (an empty tuple allows any)."""
    for name, value in fields.items():
        if name not in known or (known[name] and value not in known[name]):
            raise refused(folder, f"{file} has {name!r}" + (f" = {value!r}"[:80] if name in known else ""))


def refused(folder: Path, what: str) -> SetupError:
    """The refusal of something that changes vectors and is not understood."""
    return SetupError(f"Model folder {folder.name} cannot be served: {what}, which this version does not know.")


def _short(path: Path) -> str:
    """A file's name with its folder's, and nothing above."""
    return f"{path.parent.name}/{path.name}"
