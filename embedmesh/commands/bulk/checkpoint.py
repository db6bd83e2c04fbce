"""How far a run got, in a small file beside its output (`OUT.state`): where the next run continues, or that it is done.

It stays when a run has finished, so that the same command run again can say so instead of paying twice.
"""

import hashlib
from pathlib import Path

import msgspec

from embedmesh.commands.output import WrongUsage

NOTHING_READ = hashlib.sha256().hexdigest()
Settings = dict[str, str | int | None]


class Checkpoint(msgspec.Struct):
    """`digest` is the SHA-256 of the input up to the last of `lines`, of which `refused` have no vector.

    `size_bytes` is the output's. `width` is None until a first vector has come.
    """

    settings: Settings
    lines: int = 0
    size_bytes: int = 0
    digest: str = NOTHING_READ
    refused: int = 0
    width: int | None = None
    finished: bool = False
    version: int = 1


def read_checkpoint(target: Path, settings: Settings) -> Checkpoint | None:
    """What the run before left beside `target`. Raises WrongUsage where that had other settings, or is damaged."""
    state = _beside(target)
    try:
        done = msgspec.json.decode(state.read_bytes(), type=Checkpoint)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        raise WrongUsage(f"{state} is damaged. Use --overwrite to start again.") from None
    other = [name for name in settings if done.settings.get(name) != settings[name]]
    if other:
        raise WrongUsage(f"{target} was begun with another {' and '.join(other)}. Give the same, or --overwrite.")
    return done


def save_checkpoint(target: Path, done: Checkpoint) -> None:
    """Whole or not at all. Raises OSError."""
    state = _beside(target)
    beside = state.with_name(state.name + ".new")
    beside.write_bytes(msgspec.json.encode(done))
    beside.replace(state)


def finished_before(target: Path, settings: Settings) -> Checkpoint | None:
    """The checkpoint of the run that finished `target`; None where there was none.

    Raises WrongUsage where it had other settings, or the output was changed since.
    """
    if not target.exists():
        return None
    done = read_checkpoint(target, settings)
    if done is None or not done.finished:
        return None
    if target.stat().st_size != done.size_bytes:
        raise WrongUsage(f"{target} was changed after it was complete. Choose another --output, or --overwrite it.")
    return done


def _beside(target: Path) -> Path:
    return target.with_name(target.name + ".state")
