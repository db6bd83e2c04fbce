"""Architectures: one file each, and the one table that maps `model_type` of config.json to it.

A builder turns a folder and its weights into an OpenVINO graph with two inputs, `ids` (int32, [rows, length]) and
`mask` (float32, [rows, length], 1 for a token and 0 for padding), and one output, the vectors (float32, [rows, width]).
"""

from collections.abc import Callable

import openvino as ov

from embedmesh.engine.folder import Folder
from embedmesh.engine.models import bert
from embedmesh.engine.safetensors import WeightsFile
from embedmesh.rules.errors import SetupError

BUILDERS: dict[str, Callable[[Folder, WeightsFile], ov.Model]] = {"bert": bert.build}


def build_graph(folder: Folder, weights: WeightsFile) -> ov.Model:
    """The graph of a folder, pooling included. Raises SetupError for an architecture that is not in the table."""
    builder = BUILDERS.get(folder.model_type)
    if builder is None:
        known = ", ".join(sorted(BUILDERS))
        raise SetupError(f"Model type {folder.model_type!r} is not supported; this version knows: {known}.")
    return builder(folder, weights)
