"""`int8.json`: how a model's linear layers become 8-bit integers, and the change of the graph at load.

A linear layer computes W x + b. Of its input each channel c is first moved and scaled, x' = (x - shift) / scale, which
leaves the result as it was once W is scaled the other way and W·shift is added to b. That moves the large channels of
x, which 8 bits are bad at, into the weights (SmoothQuant, Xiao et al. 2022; shifts: Outlier Suppression+, Wei et al.
2023). Then x' is cut to `low`..`high` in 256 steps, and each row of W to 255 steps around 0. OpenVINO makes kernels of
8-bit integers of that.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as op

from embedmesh.engine.layout import INT8_FILE
from embedmesh.engine.precision import Rest
from embedmesh.rules.errors import SetupError

INT8_FILE_BYTES_MAX = 64 * 1024 * 1024  # some 10 bytes a channel: 250 kB for 22 M parameters, 6 MB for 560 M
INPUT_LEVELS = 256
WEIGHT_LEVELS = 255  # -127 to 127

Array = npt.NDArray[np.float32]


class Range(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one input becomes 8 bits: (x - shift) / scale for each channel, cut to low..high. `shift` may be empty."""

    low: float
    high: float
    scale: list[float]
    shift: list[float] = []


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How far int8 is from exact on `texts` texts of the kind `on`: cosines, and of each text's 10 nearest how many
    are the same, in percent."""

    texts: int
    on: str
    cosine_mean: float
    cosine_min: float
    top10_overlap: float


class Ranges(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file. `inputs` has one entry an input of linear layers, in the graph's order; None is not 8 bits but `rest`.

    `weights` is the digest of the layers' weights in that order: a file for another model, or from a version that
    builds the graph in another order, is refused. `rest` is also what everything else is computed in, attention for
    one; files from before there was a choice have bfloat16.
    """

    format: Literal[1]
    weights: str
    inputs: list[Range | None]
    quality: Quality
    rest: Rest = "bfloat16"


class Input(NamedTuple):
    """A tensor that goes into linear layers, and their multiplications."""

    source: ov.Output
    layers: list[ov.Node]

    @property
    def kernels(self) -> list[Array]:
        """The weights of each layer, [outputs, inputs]."""
        return [_kernel(layer) for layer in self.layers]


def read(folder: Path) -> Ranges:
    """A folder's `int8.json`. Raises SetupError, in one line, if it is absent or damaged."""
    try:
        with (folder / INT8_FILE).open("rb") as file:
            content = file.read(INT8_FILE_BYTES_MAX + 1)
    except OSError:
        raise SetupError(
            f"Model folder {folder.name} has no {INT8_FILE}, which tier 'int8' needs: run `embedmesh models quantize`."
        ) from None
    try:
        if len(content) > INT8_FILE_BYTES_MAX:
            raise ValueError
        return msgspec.json.decode(content, type=Ranges)
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors
        raise SetupError(f"{INT8_FILE} of {folder.name} is damaged: run `embedmesh models quantize` again.") from None


def write(folder: Path, ranges: Ranges) -> None:
    """Put `int8.json` into a folder, whole or not at all."""
    half = folder / f"{INT8_FILE}.part"
    half.write_bytes(msgspec.json.encode(ranges))
    half.replace(folder / INT8_FILE)


def find_inputs(graph: ov.Model) -> list[Input]:
    """Every tensor of states that is multiplied by constant weights, in the graph's order."""
    found: dict[tuple[str, int], Input] = {}
    for node in graph.get_ordered_ops():
        if _is_linear(node):
            source = node.input_value(0)
            key = source.get_node().get_friendly_name(), source.get_index()
            found.setdefault(key, Input(source, [])).layers.append(node)
    return list(found.values())


def weights_digest(inputs: Sequence[Input]) -> str:
    """SHA-256, in hex, over the layers' weights."""
    digest = hashlib.sha256()
    for each in inputs:
        for kernel in each.kernels:
            digest.update(np.ascontiguousarray(kernel).data)
    return digest.hexdigest()


def insert(graph: ov.Model, ranges: Ranges, name: str) -> None:
    """Make the graph of the model `name` an 8-bit one. Raises SetupError when the file was made for another graph."""
    inputs = find_inputs(graph)
    fits = len(inputs) == len(ranges.inputs) and weights_digest(inputs) == ranges.weights
    if not fits or not all(map(_fits, inputs, ranges.inputs)):
        raise SetupError(f"{INT8_FILE} of {name} was made for other weights: run `embedmesh models quantize` again.")
    quantize_inputs(inputs, ranges.inputs)


def quantize_inputs(inputs: Sequence[Input], ranges: Sequence[Range | None]) -> None:
    """Put the quantisation of each input that has a range, and of the weights it meets, into the graph."""
    for each, chosen in zip(inputs, ranges, strict=True):
        if chosen is not None:
            _quantize_input(each, chosen)


def _quantize_input(given: Input, chosen: Range) -> None:
    scale = np.array(chosen.scale, np.float32)
    shift = np.array(chosen.shift or [0.0], np.float32)
    moved = op.multiply(given.source, _constant(1 / scale))
    if chosen.shift:
        moved = op.add(moved, _constant(-shift / scale))
    cut = _cut(moved.output(0), np.float32(chosen.low), np.float32(chosen.high), INPUT_LEVELS)
    for layer in given.layers:
        kernel = _kernel(layer)
        scaled = kernel * scale
        most = np.maximum(np.abs(scaled).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
        weights = _cut(_constant(scaled), -most, most, WEIGHT_LEVELS)
        product = op.matmul(cut, weights, False, True).output(0)
        _replace(layer, product, kernel @ shift if chosen.shift else None)


def _replace(layer: ov.Node, product: ov.Output, bias: Array | None) -> None:
    """Replace `layer` by `product` plus `bias`, if any. A bias that the layer has already is changed instead."""
    users = list(layer.output(0).get_target_inputs())
    if bias is None:
        for user in users:
            user.replace_source_output(product)
        return
    for user in users:
        add = user.get_node()
        other = add.input_value(1 - user.get_index()).get_node() if add.get_type_name() == "Add" else None
        if other is not None and other.get_type_name() == "Constant":
            user.replace_source_output(product)
            add.input(1 - user.get_index()).replace_source_output(_constant(other.data + bias))
        else:
            user.replace_source_output(op.add(product, _constant(bias)).output(0))


def _is_linear(node: ov.Node) -> bool:
    if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_a"]:
        return False
    kernel = node.input_value(1)
    constant = kernel.get_node().get_type_name() == "Constant" and kernel.get_element_type() == ov.Type.f32
    return constant and len(kernel.get_shape()) == 2 and node.input_value(0).get_partial_shape().rank.is_static


def _kernel(layer: ov.Node) -> Array:
    """The weights of a layer, [outputs, inputs]: a view where they lie so."""
    kernel: Array = layer.input_value(1).get_node().data
    return kernel if layer.get_attributes()["transpose_b"] else kernel.T


def _fits(given: Input, chosen: Range | None) -> bool:
    if chosen is None:
        return True
    width = given.kernels[0].shape[1]
    numbers = np.array([chosen.low, chosen.high, *chosen.scale, *chosen.shift])
    return (
        len(chosen.scale) == width
        and len(chosen.shift) in (0, width)
        and bool(np.isfinite(numbers).all())
        and min(chosen.scale) > 0
        and chosen.low < chosen.high
    )


def _cut(x: ov.Output, low: npt.ArrayLike, high: npt.ArrayLike, levels: int) -> ov.Output:
    ends = [_constant(low), _constant(high)]
    return op.fake_quantize(x, *ends, *ends, levels).output(0)


def _constant(array: npt.ArrayLike) -> ov.Output:
    return op.constant(np.asarray(array, np.float32)).output(0)
