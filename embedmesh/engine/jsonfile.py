"""The JSON files of a model folder, read as what they are: input. Every refusal is one line that shows no path."""

from pathlib import Path
from typing import Any

import msgspec

from embedmesh.rules.errors import SetupError

FETCH_AGAIN = "Fetch the model again; the default one: `embedmesh setup`."
CONFIG_BYTES_MAX = 1024 * 1024  # the largest config.json in use has some 30 kB

Members = dict[str, Any]


def read_object(path: Path, *, absent_is_empty: bool = False) -> Members:
    """The members of a JSON object. Raises SetupError for anything else."""
    if absent_is_empty and not path.exists():
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise SetupError(f"Model file {_shown(path)} is not a JSON object.")
    return value


def read_json(path: Path) -> object:
    """What a bounded JSON file says. Raises SetupError."""
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_BYTES_MAX + 1)
    except OSError as error:
        raise SetupError(f"Cannot read model file {_shown(path)}: {error.strerror}. {FETCH_AGAIN}") from None
    if len(text) > CONFIG_BYTES_MAX:
        raise SetupError(f"Model file {_shown(path)} is larger than {CONFIG_BYTES_MAX:,} bytes: not a config.")
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise SetupError(f"Model file {_shown(path)} is not JSON: fetch the model again.") from None


def text(members: Members, name: str, folder: Path, file: str = "config.json") -> str:
    """A member, of that file in the model's folder, that must be a string."""
    value = members.get(name)
    if not isinstance(value, str):
        raise SetupError(f"Model folder {folder.name}: {name} of {file} is missing or not a string.")
    return value


def count(members: Members, name: str, folder: Path, file: str = "config.json") -> int:
    """A member, of that file in the model's folder, that must be a positive integer."""
    value = members.get(name)
    if type(value) is not int or value < 1:
        raise SetupError(f"Model folder {folder.name}: {name} of {file} is missing or not a positive integer.")
    return value


def only_known(members: Members, known: dict[str, tuple[object, ...]], file: str, folder: Path) -> None:
    """Refuse by name a member that is not in `known`, or whose value is none of those it has there (none: any)."""
    for name, value in members.items():
        if name not in known or (known[name] and value not in known[name]):
            raise refused(folder, f"{file} has {name!r}" + (f" = {value!r}"[:80] if name in known else ""))


def refused(folder: Path, what: str) -> SetupError:
    """Something that changes vectors and is not understood."""
    return SetupError(f"Model folder {folder.name} cannot be served: {what}, which this version does not know.")


def _shown(path: Path) -> str:
    """A file of a model, with the folder that it is in and nothing above."""
    return f"{path.parent.name}/{path.name}"
