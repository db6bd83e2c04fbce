"""From token states to one vector a text: the poolings, dense layers and normalisation of sentence-transformers."""

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Dense, Pooling
from embedmesh.engine.models.graph import axes, small, weight
from embedmesh.engine.safetensors import Weights

NORM_EPS = 1e-12  # as torch.nn.functional.normalize has it
LOWEST = -1e9  # what padding counts as in a maximum


def pool(states: ov.Output, mask: ov.Output, pooling: Pooling) -> ov.Output:
    """Token states [rows, length, width] to vectors [rows, width]. Every row of `mask` starts with a token."""
    match pooling:
        case "cls":
            return op.gather(states, op.constant(np.int64(0)), op.constant(np.int64(1))).output(0)
        case "last":
            last = op.subtract(op.convert(op.reduce_sum(mask, axes(1), False), "i64"), op.constant(np.int64(1)))
            return op.gather(states, last, op.constant(np.int64(1)), 1).output(0)
        case "max":
            real = op.greater(op.unsqueeze(mask, axes(2)), small(0.0))
            return op.reduce_max(op.select(real, states, small(LOWEST)), axes(1), False).output(0)
        case "mean":
            return _average(states, mask)
        case "weighted_mean":  # the first token weighs 1, the second 2 ...
            return _average(states, op.multiply(mask, op.cum_sum(mask, op.constant(np.int64(1)))).output(0))


def dense(vectors: ov.Output, layer: Dense) -> ov.Output:
    """Vectors [rows, inputs] to [rows, outputs]. Raises SetupError when the layer's weights are not its config's."""
    weights = Weights(layer.path)
    product = op.matmul(vectors, weight(weights.get("linear.weight", layer.outputs, layer.inputs)), False, True)
    if layer.bias:
        product = op.add(product, weight(weights.get("linear.bias", layer.outputs)))
    match layer.activation:
        case "identity":
            return product.output(0)
        case "tanh":
            return op.tanh(product).output(0)
        case "gelu":
            return op.gelu(product, "erf").output(0)
        case "relu":
            return op.relu(product).output(0)


def normalize(vectors: ov.Output) -> ov.Output:
    """Vectors [rows, width] of unit length."""
    return op.normalize_l2(vectors, axes(1), NORM_EPS, "max").output(0)


def _average(states: ov.Output, weights: ov.Output) -> ov.Output:
    sums = op.squeeze(op.matmul(op.unsqueeze(weights, axes(1)), states, False, False), axes(1))
    return op.divide(sums, op.reduce_sum(weights, axes(1), True)).output(0)
