"""The tiers fast and int8 of every architecture, on small random models.

Random weights say that the graph is computed as it is named, and little about quality: that `quantize` measures itself.
"""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from embedmesh.engine import int8, precision
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.models import build_graph
from embedmesh.engine.plan import pad_length
from embedmesh.engine.quantize import compare, quantize
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.models import Tier
from tests.data import THOROUGH
from tests.engine.test_architectures import GOLDENS, NAMES, config, unit
from tests.engine.test_quantize import needs

TWINS = ("gte_published", "modernbert_biases", "nomic_bert_published", "xlm_roberta")  # a builder's with other numbers
TOKENS_MAX = 20
FAST_COSINE_MIN = 0.9995  # found: 0.99994 and above
INT8_COSINE_MEAN_MIN = 0.998  # found: 0.9994 and above; a single text of random words may be at 0.96
OVERLAP_MIN = 80.0  # of random words' neighbours; found: 95 and above

Sequences = list[list[int]]
Array = npt.NDArray[np.float32]


def some_sequences(name: str, count: int, seed: int) -> Sequences:
    """Random words."""
    dice, words = np.random.default_rng(seed), config(name)["vocab_size"]
    return [dice.integers(4, words - 4, dice.integers(2, TOKENS_MAX)).tolist() for _ in range(count)]


def vectors(folder: Path, tier: Tier, sequences: Sequences) -> Array:
    """All in one batch, unit length."""
    return unit(CompiledModel(read_folder(folder), 1, tier).run(sequences, len(sequences), pad_length(TOKENS_MAX)))


def cosines(ours: Array, theirs: Array) -> Array:
    found: Array = (ours * theirs).sum(axis=1)
    return found


def linked(name: str, path: Path) -> Path:
    """The golden folder again, so that a file can be put into it."""
    path.mkdir()
    for source in sorted(GOLDENS.joinpath(name).rglob("*")):
        target = path / source.relative_to(GOLDENS / name)
        if source.is_dir():
            target.mkdir()
        else:
            os.symlink(source, target)
    return path


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_near_exact(name: str) -> None:
    """As near as bfloat16 is, and not the same: every architecture's graph takes the precision."""
    needs("fast")
    sequences = some_sequences(name, 20, 5)
    exact, fast = (vectors(GOLDENS / name, tier, sequences) for tier in ("exact", "fast"))
    assert np.abs(exact - fast).max() > 1e-5
    assert cosines(exact, fast).min() > FAST_COSINE_MIN


@pytest.mark.story
@pytest.mark.parametrize("name", NAMES if THOROUGH else [name for name in NAMES if name not in TWINS])
def test_every_architecture_is_quantized_and_served(tmp_path: Path, name: str) -> None:
    """All its linear layers are 8 bits but those that the file leaves out; vectors and quality are as it says."""
    needs("int8")
    folder = linked(name, tmp_path / name)
    model = read_folder(folder)
    judged = some_sequences(name, 40, 2)
    ranges = quantize(
        model,
        some_sequences(name, 60, 1),
        judged,
        "random words",
        threads=1,
        rest="float32",
        overlap_min=OVERLAP_MIN,
        on_progress=lambda done, of: None,
    )
    int8.write(folder, ranges)
    exact, small = (vectors(folder, tier, judged) for tier in ("exact", "int8"))
    assert cosines(exact, small).mean() > INT8_COSINE_MEAN_MIN
    again = compare(exact, small, "random words")
    assert abs(again.cosine_mean - ranges.quality.cosine_mean) < 1e-4
    assert abs(again.top10_overlap - ranges.quality.top10_overlap) < 5

    graph = build_graph(model, Weights(model.transformer))
    inputs = int8.find_inputs(graph)
    layers = sum(len(each.layers) for each in inputs)
    left = sum(len(each.layers) for each, one in zip(inputs, ranges.inputs, strict=True) if one is None)
    int8.insert(graph, ranges, name)
    compiled = precision.compile_graph(graph, 1, "int8", ranges.rest).get_runtime_model()
    said = [node.get_rt_info() for node in compiled.get_ops()]
    found = Counter(one["runtimePrecision"].value for one in said if one["layerType"].value == "FullyConnected")
    assert found["f32"] == left
    assert found["u8"] + found["i8"] == layers - left > 0
    assert found.total() == layers
