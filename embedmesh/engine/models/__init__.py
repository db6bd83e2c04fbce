"""Architectures: one file each, and the one table that maps `model_type` of config.json to it."""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Folder
from embedmesh.engine.layout import has_types
from embedmesh.engine.models import (
    bert,
    distilbert,
    electra,
    gte,
    heads,
    modernbert,
    mpnet,
    nomic_bert,
    onnx,
    roberta,
    static,
)
from embedmesh.engine.models.pooling import dense, normalize, pool
from embedmesh.engine.safetensors import Weights

Builder = Callable[..., ov.Output]
"""config.json, weights, ids (int32, [rows, length]) and mask (float32, [rows, length], 1 for a token and 0 for padding)
-> token states (float32, [rows, length, hidden]). Raises SetupError for a variant that is not known.

Those of architectures with token types take these too (`types`, int32, [rows, length]); without them all are 0.
"""

FIRST_ONLY = ("bert", "camembert", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta")
"""Those whose builders take `first_only`: nothing but the first token's states is wanted, [rows, 1, hidden]."""

BUILDERS: dict[str, Builder] = {
    "bert": bert.build,
    "camembert": roberta.build,
    "distilbert": distilbert.build,
    "electra": electra.build,
    "gte": gte.build,
    "modernbert": modernbert.build,
    "mpnet": mpnet.build,
    "new": gte.build,
    "nomic_bert": nomic_bert.build,
    "roberta": roberta.build,
    "xlm-roberta": roberta.build,
}

HEADS: dict[str, heads.Head] = {
    "bert": heads.BERT,
    "camembert": heads.ROBERTA,
    "distilbert": heads.DISTILBERT,
    "electra": heads.ELECTRA,
    "gte": heads.GTE,
    "modernbert": modernbert.head,
    "mpnet": heads.ROBERTA,
    "new": heads.GTE,
    "nomic_bert": heads.BERT,
    "roberta": heads.ROBERTA,
    "xlm-roberta": heads.ROBERTA,
}


def build_graph(folder: Folder, weights: Weights) -> ov.Model:
    """The graph of a folder: inputs `ids` and `mask` as a Builder takes them, and the vectors (float32, [rows, width]).

    Of a reranker the vectors are logits, and among `ids` may be a mark; see `heads.split_segments`. Raises SetupError
    for a variant of the architecture that is not known, and for weights that do not fit.
    """
    ids = op.parameter([-1, -1], np.int32, name="ids")
    mask = op.parameter([-1, -1], np.float32, name="mask")
    vectors = _build(folder, weights, ids.output(0), mask.output(0))
    return ov.Model([vectors], [ids, mask], folder.model_type)


def _build(folder: Folder, weights: Weights, ids: ov.Output, mask: ov.Output) -> ov.Output:
    types: ov.Output | None = None
    if folder.reranks:
        ids, types = heads.split_segments(ids)
    own_head = folder.reranks and not folder.dense
    match folder.source:
        case "onnx":
            states = onnx.build(folder, ids, mask, types)
            if own_head:
                return states  # these are logits
        case "static":
            states = static.build(weights, ids)
        case "safetensors":
            pair: dict[str, Any] = {}
            if types is not None and has_types(folder.model_type, folder.config):
                pair["types"] = types
            if own_head and folder.pooling == "cls" and folder.model_type in FIRST_ONLY:
                pair["first_only"] = True
            states = BUILDERS[folder.model_type](folder.config, weights, ids, mask, **pair)
    vectors = pool(states, mask, folder.pooling)
    if own_head:
        return HEADS[folder.model_type](folder.config, weights, vectors)
    for layer in folder.dense:
        vectors = dense(vectors, layer)
    if folder.normalize:
        vectors = normalize(vectors)
    return vectors
