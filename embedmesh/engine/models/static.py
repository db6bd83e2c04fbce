"""Static models: a look-up of one vector a token. Model2Vec's and sentence-transformers' StaticEmbedding."""

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.models.graph import Table, axes, table_weight, weight
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError


def build(weights: Weights, ids: ov.Output) -> ov.Output:
    """Token states [rows, length, width]: row `mapping[id]` of the table times `weights[id]`, as far as there are any.

    Mapping and weights are what Model2Vec's vocabulary quantisation leaves: tokens then share rows. Raises SetupError.
    """
    table = _read_table(weights)
    rows = ids
    tokens = table.shape[0]
    if weights.has("mapping"):
        mapping = weights.integers("mapping", *weights.entry("mapping").shape)
        if mapping.ndim != 1 or mapping.size == 0 or not 0 <= mapping.min() <= mapping.max() < len(table):
            raise SetupError("The static model's mapping points outside of its table. Fetch the model again.")
        tokens = len(mapping)
        rows = op.gather(op.constant(mapping), ids, axes(0)).output(0)
    states = op.gather(table_weight(table), rows, axes(0)).output(0)
    if weights.has("weights"):
        scale = op.gather(weight(weights.get("weights", tokens)), ids, axes(0))
        states = op.multiply(states, op.unsqueeze(scale, axes(-1))).output(0)
    return states


def _read_table(weights: Weights) -> Table:
    name = "embeddings" if weights.has("embeddings") else "embedding.weight"
    entry = weights.entry(name)
    if entry.dtype == "I8":  # Model2Vec drops the scale: only the direction is meant
        return weights.integers(name, *entry.shape).astype(np.float32)
    return weights.table(name, *entry.shape)
