"""From token states to one vector a text: the poolings, dense layers and normalisation of sentence-transformers."""

import numpy as np
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Dense, Pooling
from embedmesh.engine.models.graph import ACTIVATION_OPS, axes, linear, small
from embedmesh.engine.safetensors import Weights

UNIT_LENGTH_EPS = 1e-12  # as torch.nn.functional.normalize has it
PADDING_MAXIMUM = -1e9  # what padding counts as in a maximum


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
            return op.reduce_max(op.select(real, states, small(PADDING_MAXIMUM)), axes(1), False).output(0)
        case "mean":
            return _average(states, mask)
        case "weighted_mean":  # the first token weighs 1, the second 2 ...
            return _average(states, op.multiply(mask, op.cum_sum(mask, op.constant(np.int64(1)))).output(0))


def dense(vectors: ov.Output, layer: Dense) -> ov.Output:
    """Vectors [rows, inputs] to [rows, outputs]. Raises SetupError when the layer's weights are not its config's."""
    weights = Weights(layer.path)
    kernel = weights.get("linear.weight", layer.outputs, layer.inputs)
    product = linear(vectors, kernel, weights.get("linear.bias", layer.outputs) if layer.bias else None)
    match layer.activation:
        case "identity":
            return product
        case "tanh":
            return op.tanh(product).output(0)
        case "gelu" | "relu" as name:
            return ACTIVATION_OPS[name](product).output(0)


def normalize(vectors: ov.Output) -> ov.Output:
    """Vectors [rows, width] of unit length."""
    return op.normalize_l2(vectors, axes(1), UNIT_LENGTH_EPS, "max").output(0)


def _average(states: ov.Output, weights: ov.Output) -> ov.Output:
    sums = op.squeeze(op.matmul(op.unsqueeze(weights, axes(1)), states, False, False), axes(1))
    return op.divide(sums, op.reduce_sum(weights, axes(1), True)).output(0)
