"""int8.json: made from text, read back, put into a graph; and everything that is not as it should be refused."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine import int8, precision
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.layout import INT8_FILE
from embedmesh.engine.models import build_graph
from embedmesh.engine.quantize import _choices, compare, quantize
from embedmesh.engine.safetensors import Weights
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Tier
from tests.engine.tiny import POISON, make_folder, make_weights, write_safetensors

RANDOM_OVERLAP_MIN = 80.0  # random words are all about as near, and a small model is coarse
RANGE = int8.Range(low=-2.0, high=2.0, scale=[1.0, 2.0], shift=[0.0, 0.5])
QUALITY = int8.Quality(texts=30, on="words", cosine_mean=0.99, cosine_min=0.9, top10_overlap=95.0)
RANGE_OF_ALL = int8.Range(low=-4.0, high=4.0, scale=[1.0] * 16)
RANGES = int8.Ranges(format=1, weights="0" * 64, inputs=[RANGE, None], quality=QUALITY)


def some_sequences(count: int, seed: int) -> list[list[int]]:
    """Random words between the two special tokens."""
    dice = np.random.default_rng(seed)
    return [[2, *dice.integers(4, POISON, dice.integers(1, 30)).tolist(), 3] for _ in range(count)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "tiny")


def needs(tier: Tier) -> None:
    """Skip where the CPU cannot run the tier at all."""
    if tier not in precision.tiers_here():
        pytest.skip(f"this CPU cannot run the tier {tier!r}")


def quantized(folder: Path, rest: precision.Rest = "float32") -> int8.Ranges:
    """The ranges of a folder, from and on random words."""
    steps: list[tuple[int, int]] = []
    model, words = read_folder(folder), (some_sequences(200, 1), some_sequences(60, 2))
    found = quantize(
        model,
        *words,
        "random words",
        threads=1,
        rest=rest,
        overlap_min=RANDOM_OVERLAP_MIN,
        on_progress=lambda done, of: steps.append((done, of)),
    )
    assert steps == [(done, len(steps)) for done in range(1, len(steps) + 1)]
    return found


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> int8.Ranges:
    """Those of the folder, made once."""
    needs("int8")
    return quantized(make_folder(tmp_path_factory.mktemp("quantized") / "tiny"))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """The file says all of it, and nothing else is left behind."""
    int8.write(tmp_path, RANGES)
    assert int8.read(tmp_path) == RANGES
    assert [file.name for file in tmp_path.iterdir()] == [INT8_FILE]


@pytest.mark.parametrize(
    "change",
    [{"format": 2}, {"quality": None}, {"inputs": [{"low": 0}]}, {"more": 1}, {"inputs": "none"}, {"rest": "float16"}],
)
def test_another_form_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    """A format, member or type that is not known."""
    int8.write(tmp_path, RANGES)
    file = tmp_path / INT8_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(SetupError, match="damaged"):
        int8.read(tmp_path)


def test_a_file_from_before_there_was_a_choice_has_bfloat16(tmp_path: Path) -> None:
    int8.write(tmp_path, RANGES)
    members = json.loads((tmp_path / INT8_FILE).read_text())
    del members["rest"]
    (tmp_path / INT8_FILE).write_text(json.dumps(members))
    assert int8.read(tmp_path).rest == "bfloat16"


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"null"])
def test_what_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INT8_FILE).write_bytes(content)
    with pytest.raises(SetupError, match="damaged"):
        int8.read(tmp_path)


def test_its_absence_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"no int8\.json.*models quantize"):
        int8.read(tmp_path)


def test_compare_counts_neighbours() -> None:
    """Equal vectors agree fully whatever their length; turning half of the texts around changes who is near them."""
    exact = np.random.default_rng(3).normal(size=(40, 8)).astype(np.float32)
    same = compare(exact, 3 * exact, "dice")
    assert (same.texts, same.cosine_mean, same.cosine_min, same.top10_overlap) == (40, 1, 1, 100)
    turned = exact * np.where(np.arange(40) < 20, 1, -1)[:, None].astype(np.float32)
    other = compare(exact, turned, "dice")
    assert (other.cosine_mean, other.cosine_min) == (0, -1)
    assert other.top10_overlap < 80


@pytest.mark.story
def test_int8_is_close_to_exact(folder: Path) -> None:
    """Made, written, loaded: vectors near the exact ones, but not the same, and as the file itself says."""
    needs("int8")
    ranges = quantized(folder)
    assert any(ranges.inputs)
    assert ranges.quality.cosine_min > 0.99
    int8.write(folder, ranges)
    sequences = some_sequences(20, 4)
    exact, small = (CompiledModel(read_folder(folder), 1, tier).run(sequences, 20, 48) for tier in ("exact", "int8"))
    gap = np.abs(exact - small).max()
    assert 1e-5 < gap < 0.1
    assert (exact * small).sum(axis=1).min() > 0.99


@pytest.mark.story
@pytest.mark.parametrize(("rest", "says"), [("bfloat16", "bf16"), ("float32", "f32")])
def test_kernels_are_what_the_file_says(folder: Path, rest: precision.Rest, says: str) -> None:
    """Linear layers with a range multiply 8-bit integers, the others what is said: nothing is left to a guess."""
    needs("int8")
    if rest == "bfloat16":
        needs("fast")
    model = read_folder(folder)
    weights = Weights(model.transformer)
    ranges = quantized(folder)
    ranges = int8.Ranges(1, ranges.weights, [RANGE_OF_ALL, *[None] * (len(ranges.inputs) - 1)], ranges.quality, rest)
    graph = build_graph(model, weights)
    int8.insert(graph, ranges, "tiny")
    nodes = precision.compile_graph(graph, 1, "int8", rest).get_runtime_model().get_ops()
    said = [node.get_rt_info() for node in nodes]
    linear = [info["runtimePrecision"].value for info in said if info["layerType"].value == "FullyConnected"]
    assert Counter(linear) == {"u8": 3, says: 9}  # query, key and value of the first of two layers


@pytest.mark.story
def test_the_same_text_gives_the_same_file(folder: Path) -> None:
    needs("int8")
    assert quantized(folder) == quantized(folder)


@pytest.mark.story
def test_a_file_of_other_weights_is_refused(folder: Path, ranges: int8.Ranges) -> None:
    """One weight that differs is enough."""
    int8.write(folder, ranges)
    weights = make_weights()
    weights["encoder.layer.1.output.dense.weight"][0, 0] += 1
    write_safetensors(folder / "model.safetensors", weights)
    with pytest.raises(SetupError, match="made for other weights"):
        CompiledModel(read_folder(folder), 1, "int8")


@pytest.mark.story
@pytest.mark.parametrize("change", [{"low": 2.0}, {"scale": [1.0]}, {"shift": [1.0, 2.0]}, {"scale": [0.0] * 16}])
def test_numbers_that_make_no_sense_are_refused(folder: Path, ranges: int8.Ranges, change: dict[str, Any]) -> None:
    int8.write(folder, ranges)
    CompiledModel(read_folder(folder), 1, "int8")  # those of a copy of the folder are right
    members: dict[str, Any] = {"low": -1.0, "high": 1.0, "scale": [1.0] * 16} | change
    wrong = int8.Range(**members)
    int8.write(folder, int8.Ranges(1, ranges.weights, [wrong, *ranges.inputs[1:]], ranges.quality))
    with pytest.raises(SetupError, match="made for other weights"):
        CompiledModel(read_folder(folder), 1, "int8")


@pytest.mark.story
def test_too_little_text_is_refused(folder: Path) -> None:
    needs("int8")
    with pytest.raises(SetupError, match="too little text"):
        quantize(
            read_folder(folder),
            some_sequences(3, 1),
            [],
            "nothing",
            threads=1,
            rest="float32",
            on_progress=lambda done, of: None,
        )


@pytest.mark.story
def test_what_is_too_coarse_is_refused(folder: Path) -> None:
    """No int8 finds all of the same neighbours; the message says how many it found, the bound, and what to do."""
    needs("int8")
    with pytest.raises(SetupError, match=r"finds at best [89]\d\.\d %.*bound is 100 %.*'exact'.*--overlap-min"):
        quantize(
            read_folder(folder),
            some_sequences(100, 1),
            some_sequences(60, 2),
            "words",
            threads=1,
            rest="float32",
            overlap_min=100.0,
            on_progress=lambda done, of: None,
        )


@pytest.mark.parametrize(
    ("losses", "sizes", "kept"),
    [
        ([1e-5] * 4, [1] * 4, [set()]),
        ([1e-4, 4e-4, 1e-3], [1, 1, 1], [{2}, {1, 2}]),
        ([1e-4, 4e-4, 1e-3], [1, 1, 9], []),  # the largest alone is more than may be left out
        ([1.0, 1.0], [1, 1], []),
        ([-1e-3, 1e-3], [1, 1], [{1}]),  # a gain by chance is not spent on others
    ],
)
def test_more_stays_as_it_is_at_each_try(losses: list[float], sizes: list[int], kept: list[set[int]]) -> None:
    """As long as a third of the products is left to be 8 bits, and never the same twice."""
    assert list(_choices(losses, sizes)) == kept
