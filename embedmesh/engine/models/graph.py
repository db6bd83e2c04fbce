"""The few graph pieces that encoders share, in the words of their papers."""

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.folder import Pooling

Array = npt.NDArray[np.float32]
MASKED = -1e4  # added to a score, its exp() is exactly 0 in float32
NORM_EPS = 1e-12  # as torch.nn.functional.normalize has it


def weight(array: Array) -> ov.Output:
    """A constant that shares the array's memory, so that weights are never copied before they are packed."""
    return op.constant(array, shared_memory=True).output(0)


def small(value: float) -> ov.Output:
    """A scalar constant of float32."""
    return op.constant(np.float32(value)).output(0)


def axes(*values: int) -> ov.Output:
    """A constant list of int64, for axes and shapes."""
    return op.constant(np.array(values, np.int64)).output(0)


def linear(x: ov.Output, kernel: Array, bias: Array) -> ov.Output:
    """x · kernelᵀ + bias."""
    return op.add(op.matmul(x, weight(kernel), False, True), weight(bias)).output(0)


def layer_norm(x: ov.Output, scale: Array, shift: Array, eps: float) -> ov.Output:
    """Layer normalisation over the last axis."""
    normal = op.mvn(x, axes(-1), True, eps, "inside_sqrt")
    return op.add(op.multiply(normal, weight(scale)), weight(shift)).output(0)


def attention(q: ov.Output, k: ov.Output, v: ov.Output, mask: ov.Output, heads: int) -> ov.Output:
    """Multi-head attention of [rows, length, width] tensors; `mask` is 1 for tokens, [rows, length]."""
    score_mask = op.multiply(op.subtract(small(1.0), op.unsqueeze(mask, axes(1, 2))), small(MASKED))

    def split(x: ov.Output) -> ov.Output:
        return op.transpose(op.reshape(x, axes(0, 0, heads, -1), True), axes(0, 2, 1, 3)).output(0)

    out = op.scaled_dot_product_attention(split(q), split(k), split(v), score_mask)
    return op.reshape(op.transpose(out, axes(0, 2, 1, 3)), axes(0, 0, -1), True).output(0)


def pool(states: ov.Output, mask: ov.Output, pooling: Pooling, normalize: bool) -> ov.Output:
    """Token states [rows, length, width] to vectors [rows, width]."""
    if pooling == "cls":
        vectors = op.gather(states, op.constant(np.int64(0)), op.constant(np.int64(1)))
    else:
        sums = op.squeeze(op.matmul(op.unsqueeze(mask, axes(1)), states, False, False), axes(1))
        vectors = op.divide(sums, op.reduce_sum(mask, axes(1), True))
    if normalize:
        vectors = op.normalize_l2(vectors, axes(1), NORM_EPS, "max")
    return vectors.output(0)
