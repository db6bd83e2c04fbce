"""The few graph pieces that models share, in the words of their papers."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op

Array = npt.NDArray[np.float32]
Table = Array | npt.NDArray[np.float16]
KEEP_STORED = "decompression_0"
MASKED = -1e4  # added to a score, its exp() is exactly 0 in float32

ACTIVATION_OPS: dict[str, Callable[[ov.Output], ov.Node]] = {
    "gelu": lambda x: op.gelu(x, "erf"),
    "gelu_new": lambda x: op.gelu(x, "tanh"),
    "gelu_pytorch_tanh": lambda x: op.gelu(x, "tanh"),
    "relu": op.relu,
    "silu": op.swish,
    "swish": op.swish,
}
"""The config's word -> what it does."""


def weight(array: Array) -> ov.Output:
    """A constant that shares the array's memory, so that weights are never copied before they are packed."""
    return op.constant(array, shared_memory=True).output(0)


def table_weight(table: Table) -> ov.Output:
    """A constant that shares the table's memory, seen as float32. Only for look-ups: float16 then stays what it is.

    The mark is OpenVINO's own for weights that are stored in fewer bits. Without it, its compiler would widen them all.
    """
    stored = op.constant(table, shared_memory=True)
    if table.dtype == np.float32:
        return stored.output(0)
    wide = op.convert(stored, "f32")
    wide.get_rt_info()[KEEP_STORED] = ""
    return wide.output(0)


def small(value: float) -> ov.Output:
    """A scalar constant of float32."""
    return op.constant(np.float32(value)).output(0)


def axes(*values: int) -> ov.Output:
    """A constant list of int64, for axes and shapes."""
    return op.constant(np.array(values, np.int64)).output(0)


def linear(x: ov.Output, kernel: Array, bias: Array | None) -> ov.Output:
    """x · kernelᵀ + bias."""
    product = op.matmul(x, weight(kernel), False, True)
    return (product if bias is None else op.add(product, weight(bias))).output(0)


def layer_norm(x: ov.Output, scale: Array, shift: Array | None, eps: float) -> ov.Output:
    """The layer normalisation over the last axis."""
    scaled = op.multiply(op.mvn(x, axes(-1), True, eps, "inside_sqrt"), weight(scale))
    return (scaled if shift is None else op.add(scaled, weight(shift))).output(0)


def add(x: ov.Output, y: ov.Output) -> ov.Output:
    """x + y."""
    return op.add(x, y).output(0)


def first(x: ov.Output, axis: int) -> ov.Output:
    """The first of what lies along an axis, which keeps its place with a length of 1."""
    return op.slice(x, axes(0), axes(1), axes(1), axes(axis)).output(0)


def indexes(ids: ov.Output) -> ov.Output:
    """0, 1, 2 ... up to the length of `ids` [rows, length], as int32."""
    length = op.gather(op.shape_of(ids, "i32"), op.constant(np.int32(1)), op.constant(np.int32(0)))
    return op.range(op.constant(np.int32(0)), length, op.constant(np.int32(1)), "i32").output(0)


def rows_at(table: Array, at: ov.Output) -> ov.Output:
    """Rows of a constant table. Past its end the last is taken, since padding may reach further than any text."""
    return op.gather(weight(table), op.minimum(at, op.constant(np.int32(len(table) - 1))), axes(0)).output(0)


def score_mask(mask: ov.Output) -> ov.Output:
    """What to add to attention scores, [rows, 1, 1, length], so that padding gets no attention."""
    return op.multiply(op.subtract(small(1.0), op.unsqueeze(mask, axes(1, 2))), small(MASKED)).output(0)


def distances(ids: ov.Output) -> ov.Output:
    """Key's index minus query's index, int32 [length, length], made while the model runs."""
    at = indexes(ids)
    return op.subtract(op.unsqueeze(at, axes(0)), op.unsqueeze(at, axes(1))).output(0)
