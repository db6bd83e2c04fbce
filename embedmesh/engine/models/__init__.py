"""Architectures: one file each, and the one table that maps `model_type` of config.json to it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Folder
from embedmesh.engine.models import bert, distilbert, gte, modernbert, mpnet, nomic_bert, onnx, roberta, static
from embedmesh.engine.models.pooling import dense, normalize, pool
from embedmesh.engine.safetensors import Weights

Builder = Callable[[dict[str, Any], Weights, ov.Output, ov.Output], ov.Output]
"""config.json, weights, ids (int32, [rows, length]) and mask (float32, [rows, length], 1 for a token and 0 for padding)
-> token states (float32, [rows, length, hidden]). Raises SetupError for a variant that is not known."""

BUILDERS: dict[str, Builder] = {
    "bert": bert.build,
    "camembert": roberta.build,
    "distilbert": distilbert.build,
    "gte": gte.build,
    "modernbert": modernbert.build,
    "mpnet": mpnet.build,
    "new": gte.build,
    "nomic_bert": nomic_bert.build,
    "roberta": roberta.build,
    "xlm-roberta": roberta.build,
}


def build_graph(folder: Folder, weights: Weights) -> ov.Model:
    """The graph of a folder: inputs `ids` and `mask` as a Builder takes them, and the vectors (float32, [rows, width]).

    Raises SetupError for a variant of the architecture that is not known, and for weights that do not fit.
    """
    ids = op.parameter([-1, -1], np.int32, name="ids")
    mask = op.parameter([-1, -1], np.float32, name="mask")
    match folder.source:
        case "onnx":
            states = onnx.build(folder, ids.output(0), mask.output(0))
        case "static":
            states = static.build(weights, ids.output(0))
        case "safetensors":
            states = BUILDERS[folder.model_type](folder.config, weights, ids.output(0), mask.output(0))
    vectors = pool(states, mask.output(0), folder.pooling)
    for layer in folder.dense:
        vectors = dense(vectors, layer)
    if folder.normalize:
        vectors = normalize(vectors)
    return ov.Model([vectors], [ids, mask], folder.model_type)
