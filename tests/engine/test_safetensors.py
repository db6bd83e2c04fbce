"""A weights file is input: whatever is in it, the reader gives the right array or one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedmesh.engine.safetensors import WeightsFile
from embedmesh.rules.errors import SetupError
from tests.engine.tiny import write_safetensors

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def raw(path: Path, header: Any, data: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]} | changes}


def test_arrays_come_back_after_their_pages_were_released(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w", {"b": ARRAY + 10, "a": ARRAY})
    weights = WeightsFile(tmp_path / "w")
    array = weights.get("a", 2, 3)
    assert (array == ARRAY).all()
    weights.release_pages()
    assert (array == ARRAY).all()


@pytest.mark.parametrize(
    ("header", "says"),
    [
        ({}, "no tensor a"),
        (entry(dtype="BF16"), "as BF16, and only F32"),
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
        WeightsFile(raw(tmp_path / "w", header)).get("a", 2, 3)
    assert says in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"abc", (2**62).to_bytes(8, "little"), (50).to_bytes(8, "little") + b"{}"])
def test_a_file_cut_short_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(SetupError):
        WeightsFile(tmp_path / "w")


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="embedmesh setup"):
        WeightsFile(tmp_path / "w")
