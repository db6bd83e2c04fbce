"""A weights file is input: whatever is in it, the reader gives the right array or one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine.safetensors import WEIGHTS_FILE, WEIGHTS_INDEX_FILE, Weights
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import MODEL_SHARDS_MAX
from tests.engine.tiny import write_safetensors

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def raw(folder: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS_FILE).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


def test_arrays_come_back_after_their_pages_were_released(tmp_path: Path) -> None:
    write_safetensors(tmp_path / WEIGHTS_FILE, {"b": ARRAY + 10, "a": ARRAY})
    weights = Weights(tmp_path)
    array = weights.get("a", 2, 3)
    assert (array == ARRAY).all()
    weights.release_pages()
    assert (array == ARRAY).all()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({}, "no tensor a"),
        (entry(dtype="F64"), "as F64, and only F32, F16, BF16"),
        (entry(dtype="I8"), "as I8"),
        (entry(dtype="BF16"), "not its size"),
        (entry(shape=[3, 2]), "shape [3, 2]"),
        (entry(data_offsets=[0, 20]), "not its size"),
        (entry(data_offsets=[4, 28]), "not its size"),
        (entry(data_offsets=[-24, 0]), "not its size"),
        (entry(data_offsets=[24, 0]), "not its size"),
        (entry(data_offsets=[0]), "not safetensors"),
        (entry(shape="23"), "not safetensors"),
        ({"a": 1}, "not safetensors"),
        (b"{", "not safetensors"),
        (b"[" * 100_000, "not safetensors"),
        (b'{"\xff":1}', "not safetensors"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: Any, says: str) -> None:
    with pytest.raises(SetupError, match="cannot be used") as refused:
        Weights(raw(tmp_path, header)).get("a", 2, 3)
    assert says in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"abc", (2**62).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(SetupError):
        Weights(tmp_path)


def test_a_folder_without_weights_says_so_where_one_is_wanted(tmp_path: Path) -> None:
    weights = Weights(tmp_path)
    assert not weights.has("a")
    with pytest.raises(SetupError, match=r"there is no model\.safetensors"):
        weights.get("a", 2, 3)


def test_half_precision_becomes_float32_without_a_loss(tmp_path: Path) -> None:
    """Every pattern of bits: float16 as numpy has it, bfloat16 as the upper half of a float32."""
    bits = np.arange(1 << 16, dtype=np.uint16)
    write_safetensors(
        tmp_path / WEIGHTS_FILE, {"odd": np.zeros(1, np.int8), "half": bits.view(np.float16), "brain": bits}
    )
    weights = Weights(tmp_path)
    half, brain = weights.get("half", 1 << 16), weights.get("brain", 1 << 16)
    assert np.array_equal(half, bits.view(np.float16).astype(np.float32), equal_nan=True)
    assert np.array_equal(brain.view(np.uint32), bits.astype(np.uint32) << 16)
    assert brain.dtype == half.dtype == np.float32


def test_a_float32_that_lies_at_an_odd_place_is_read(tmp_path: Path) -> None:
    write_safetensors(tmp_path / WEIGHTS_FILE, {"odd": np.zeros(1, np.int8), "a": ARRAY})
    array = Weights(tmp_path).get("a", 2, 3)
    assert array.flags.aligned
    assert (array == ARRAY).all()


def test_integers_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / WEIGHTS_FILE, {"a": ARRAY.astype(np.int32), "b": ARRAY.astype(np.int8), "c": ARRAY})
    weights = Weights(tmp_path)
    assert (weights.integers("a", 2, 3) == ARRAY).all()
    assert (weights.integers("b", 2, 3) == ARRAY).all()
    with pytest.raises(SetupError, match="as F32, and only I64"):
        weights.integers("c", 2, 3)


@pytest.mark.parametrize("prefix", ["", "bert.", "model.encoder."])
def test_names_are_seen_without_their_prefix(tmp_path: Path, prefix: str) -> None:
    write_safetensors(
        tmp_path / WEIGHTS_FILE, {f"{prefix}words.weight": ARRAY, "head.weight": ARRAY, "my_words.weight": ARRAY}
    )
    weights = Weights(tmp_path).rooted("words.weight")
    assert (weights.get("words.weight", 2, 3) == ARRAY).all()
    assert weights.has("head.weight") == (prefix == "")


@pytest.mark.parametrize(
    ("names", "says"), [([], "no tensor words"), (["a.words", "b.words"], "several tensors words")]
)
def test_a_prefix_that_is_not_clear_is_refused(tmp_path: Path, names: list[str], says: str) -> None:
    write_safetensors(tmp_path / WEIGHTS_FILE, dict.fromkeys(names, ARRAY))
    with pytest.raises(SetupError, match=says):
        Weights(tmp_path).rooted("words")


def shards(folder: Path, weight_map: Any) -> Path:
    for number in (1, 2):
        write_safetensors(folder / f"model-{number}.safetensors", {f"t{number}": ARRAY * number})
    (folder / WEIGHTS_INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_are_one_model(tmp_path: Path) -> None:
    weights = Weights(shards(tmp_path, {"t1": "model-1.safetensors", "t2": "model-2.safetensors"}))
    assert (weights.get("t1", 2, 3) == ARRAY).all()
    weights.release_pages()
    assert (weights.get("t2", 2, 3) == ARRAY * 2).all()


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"t1": "../model-1.safetensors"}, "no safetensors file beside it"),
        ({"t1": "/etc/passwd"}, "no safetensors file beside it"),
        ({"t1": "model-1.bin"}, "no safetensors file beside it"),
        ({"t1": "a\n.safetensors"}, "no safetensors file beside it"),
        ({"t1": "model-3.safetensors"}, "Cannot read the weights"),
        ({f"t{n}": f"{n}.safetensors" for n in range(MODEL_SHARDS_MAX + 1)}, "65 shards"),
        (["t1"], "not an index"),
        ({"t1": 1}, "not an index"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, says: str) -> None:
    with pytest.raises(SetupError, match=says) as refused:
        Weights(shards(tmp_path, weight_map))
    assert "\n" not in str(refused.value)


def test_two_shards_with_one_tensor_are_refused(tmp_path: Path) -> None:
    shards(tmp_path, {"t1": "model-1.safetensors", "t2": "model-2.safetensors"})
    write_safetensors(tmp_path / "model-2.safetensors", {"t1": ARRAY})
    with pytest.raises(SetupError, match="two files hold t1"):
        Weights(tmp_path)
