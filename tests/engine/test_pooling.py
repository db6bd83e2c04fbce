"""Each pooling, dense layer and normalisation is its formula, for every length of a padded batch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
from openvino import opset13 as op

from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import Pooling, read_folder
from embedmesh.engine.models.pooling import pool
from embedmesh.rules.errors import SetupError
from tests.engine.test_folder import TANH, dense
from tests.engine.tiny import make_folder, make_weights, textbook, write_safetensors

pytestmark = pytest.mark.story

LENGTHS = (1, 2, 5, 9)


def by_formula(states: npt.NDArray[np.float64], pooling: Pooling) -> Any:
    """One text's vector from its token states, as sentence-transformers describes each mode."""
    weights = np.arange(1, len(states) + 1)[:, None]
    return {
        "cls": lambda: states[0],
        "last": lambda: states[-1],
        "max": lambda: states.max(0),
        "mean": lambda: states.sum(0) / len(states),
        "weighted_mean": lambda: (states * weights).sum(0) / weights.sum(),
    }[pooling]()


@pytest.mark.parametrize("pooling", ["cls", "last", "max", "mean", "weighted_mean"])
def test_a_pooling_is_its_formula(pooling: Pooling) -> None:
    """Padding holds large numbers, which must not show."""
    states = op.parameter([-1, -1, 6], np.float32)
    mask = op.parameter([-1, -1], np.float32)
    graph = ov.Model([pool(states.output(0), mask.output(0), pooling)], [states, mask])
    compiled = ov.Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    dice = np.random.default_rng(3)
    values = dice.normal(-2, 1, (len(LENGTHS), 12, 6)).astype(np.float32)  # below 0, so that a 0 of padding would win
    present = (np.arange(12) < np.array(LENGTHS)[:, None]).astype(np.float32)
    values[present == 0] = 1e6
    expected = [
        by_formula(row[:length].astype(np.float64), pooling) for row, length in zip(values, LENGTHS, strict=True)
    ]
    assert np.abs(compiled([values, present])[0] - expected).max() <= 1e-6


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    TANH: np.tanh,
    "torch.nn.modules.linear.Identity": lambda x: x,
    "torch.nn.modules.activation.ReLU": lambda x: np.maximum(x, 0),
    "torch.nn.modules.activation.GELU": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dense_layer_is_its_formula(tmp_path: Path, activation: str, bias: bool) -> None:
    folder = make_folder(tmp_path / "tiny", normalize=False)
    dense(activation_function=activation, bias=bias)(folder)
    dice = np.random.default_rng(4)
    kernel, shift = dice.normal(0, 0.5, (8, 16)).astype(np.float32), dice.normal(0, 0.5, 8).astype(np.float32)
    tensors = {"linear.weight": kernel} | ({"linear.bias": shift} if bias else {})
    write_safetensors(folder / "2_Dense" / "model.safetensors", tensors)
    ids = [2, 7, 9, 3]
    pooled = textbook(ids, make_weights(), pooling="mean", normalize=False)
    expected = ACTIVATIONS[activation](kernel.astype(np.float64) @ pooled + (shift if bias else 0))
    vector = CompiledModel(read_folder(folder), threads=1).run([ids], 1, 8)
    assert vector.shape == (1, 8)
    assert np.abs(vector[0] - expected).max() <= 1e-5


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no tensor linear.weight"),
        ({"linear.weight": np.zeros((16, 8), np.float32)}, "shape"),
        ({"linear.weight": np.zeros((8, 16), np.float32)}, "no tensor linear.bias"),
        (None, "2_Dense cannot be used: there is no model.safetensors"),
    ],
)
def test_a_dense_layer_without_its_weights_is_refused(tmp_path: Path, tensors: Any, says: str) -> None:
    folder = make_folder(tmp_path / "tiny")
    dense()(folder)
    if tensors is not None:
        write_safetensors(folder / "2_Dense" / "model.safetensors", tensors)
    with pytest.raises(SetupError) as refused:
        CompiledModel(read_folder(folder), threads=1)
    assert says in str(refused.value)
