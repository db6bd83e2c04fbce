"""Which engine runs a model here: our own kernels where they are faster, OpenVINO everywhere else."""

import os
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt

from embedmesh.engine.cpu import cpu_flags
from embedmesh.engine.folder import Folder
from embedmesh.engine.frames import Step
from embedmesh.engine.native import library
from embedmesh.engine.no_openvino import no_openvino
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Tier

Engine = Literal["native", "openvino"]

ENGINE_NAMES: dict[Engine, str] = {"native": "our own kernels", "openvino": "OpenVINO"}
ENGINE_VARIABLE = "EMBEDMESH_ENGINE"
WIDE_FLAG = "avx512f"  # OpenVINO uses it, and the kernels do not


class RunningModel(Protocol):
    """A model that is loaded. Not for two threads at one time."""

    def run(self, sequences: Sequence[Sequence[int]], rows: int, length: int) -> npt.NDArray[np.float32]:
        """Vectors [len(sequences), width] of token ids, special tokens included, planned as `rows` x `length`."""


class Choice(NamedTuple):
    """An engine, and why it and not the other, in words."""

    engine: Engine
    why: str


def choose_engine(folder: Folder | None = None, tier: Tier = "exact") -> Choice:
    """What runs a folder in a tier; without one, what this machine prefers for models of BERT's kind.

    Raises SetupError where EMBEDMESH_ENGINE names no engine, or the kernels and they cannot run it.
    """
    forced = os.environ.get(ENGINE_VARIABLE, "")
    if forced not in ("", *get_args(Engine)):
        raise SetupError(f"{ENGINE_VARIABLE} is {forced[:40]!r}: set it to native or openvino, or to nothing.")
    if forced == "openvino":
        return Choice("openvino", f"{ENGINE_VARIABLE} says so")
    obstacle = library.obstacle()
    if not obstacle and tier != "exact":
        obstacle = "the kernels have the tier exact only"
    if not obstacle and folder is not None:
        from embedmesh.engine.native.family import unsupported

        obstacle = unsupported(folder)
    if forced and obstacle:
        raise SetupError(f"{ENGINE_VARIABLE} is native, but {obstacle}.")
    if forced:
        return Choice("native", f"{ENGINE_VARIABLE} says so")
    if obstacle:
        return Choice("openvino", obstacle)
    if WIDE_FLAG in cpu_flags():
        return Choice("openvino", "this CPU has AVX-512, which the kernels do not use")
    return Choice("native", "this CPU has AVX2 and no AVX-512")


def make_model(
    folder: Folder, threads: int, tier: Tier, on_step: Callable[[Step], None] = lambda step: None
) -> RunningModel:
    """A folder's model, loaded; a first token is embedded. Raises SetupError. `on_step` is called as each step begins.

    Both engines read a folder with OpenVINO's help, which is imported here: no other process needs it.
    """
    try:
        from embedmesh.engine.compiled import CompiledModel
        from embedmesh.engine.native.model import NativeModel
    except ImportError as error:
        raise SetupError(no_openvino(error)) from None
    if choose_engine(folder, tier).engine == "native":
        on_step("packs its weights")
        return NativeModel(folder, threads)
    return CompiledModel(folder, threads, tier, on_step)
