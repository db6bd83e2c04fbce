"""Half-precision weights: what is widened can be given back, and what is looked up is never widened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.engine.large_folder import MODELS, make_folder
from embedmesh.engine import widened
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder
from embedmesh.engine.safetensors import WEIGHTS_FILE, Weights
from embedmesh.engine.widened import IN_FILE_BYTES_MIN, Widened, takes_memory
from tests.engine.tiny import make_folder as make_tiny
from tests.engine.tiny import make_weights, write_safetensors

LARGE_ENOUGH = IN_FILE_BYTES_MIN // 4
LAYERS, WIDTH, WIDE, WORDS = 6, 512, 2_048, 50_000
LINEAR_BYTES = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * WIDE) * 4

LOAD = """
import json, sys
from pathlib import Path
from embedmesh.engine.compiled import CompiledModel
from embedmesh.engine.folder import read_folder

def memory():
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in ("RssAnon", "RssFile")}

first = CompiledModel(read_folder(Path(sys.argv[1])), 1)  # libraries, and what they make once
before = memory()
model = CompiledModel(read_folder(Path(sys.argv[2])), 1)
print(json.dumps([before, memory()]))
"""


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that counts as one on a disk, wherever tests run."""
    monkeypatch.setattr(widened, "takes_memory", lambda fd: False)
    return tmp_path


def test_numbers_come_back_after_their_pages_were_released(disk: Path) -> None:
    room = Widened([disk])
    arrays = [room.place(LARGE_ENOUGH + at) for at in range(3)]
    for at, array in enumerate(arrays):
        array.fill(at)
    room.release_pages()
    assert [set(array.tolist()) for array in arrays] == [{0.0}, {1.0}, {2.0}]
    assert room.bytes_in_file >= 3 * IN_FILE_BYTES_MIN


def test_the_file_has_no_name(disk: Path) -> None:
    array = Widened([disk]).place(LARGE_ENOUGH)
    array.fill(1.0)
    assert list(disk.iterdir()) == []


def test_small_tensors_and_those_without_a_folder_are_ordinary_memory(disk: Path) -> None:
    for room, count in ((Widened([disk]), LARGE_ENOUGH - 1), (Widened([disk / "none"]), LARGE_ENOUGH)):
        assert room.place(count).shape == (count,)
        assert room.bytes_in_file == 0


def test_without_room_on_the_disk_it_is_ordinary_memory(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = os.statvfs(disk)
    monkeypatch.setattr(widened, "DISK_LEFT_BYTES_MIN", usage.f_blocks * usage.f_frsize)
    room = Widened([disk])
    assert room.place(LARGE_ENOUGH).shape == (LARGE_ENOUGH,)
    assert room.bytes_in_file == 0


@pytest.mark.parametrize(("kind", "takes"), [("tmpfs", True), ("ramfs", True), ("ext4", False)])
def test_a_file_system_in_memory_is_known(tmp_path: Path, kind: str, takes: bool) -> None:
    with (tmp_path / "file").open("wb") as file:
        device = os.fstat(file.fileno()).st_dev
        mounts = tmp_path / "mountinfo"
        mounts.write_text(
            "1 0 0:9 / /elsewhere rw - tmpfs none rw\n"
            f"2 1 {os.major(device)}:{os.minor(device)} / / rw,relatime shared:1 - {kind} none rw\n"
        )
        assert takes_memory(file.fileno(), mounts) is takes
        assert not takes_memory(file.fileno(), tmp_path / "absent")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_gives_the_vectors_of_the_same_numbers_in_float32(tmp_path: Path, dtype: str) -> None:
    halves, exact = {}, {}
    for name, array in make_weights().items():
        half = array.astype(np.float16) if dtype == "F16" else (array.view(np.uint32) >> 16).astype(np.uint16)
        halves[name] = half
        exact[name] = half.astype(np.float32) if dtype == "F16" else (half.astype(np.uint32) << 16).view(np.float32)
    vectors = []
    for name, weights in (("half", halves), ("full", exact)):
        folder = make_tiny(tmp_path / name)
        write_safetensors(folder / WEIGHTS_FILE, weights)
        vectors.append(CompiledModel(read_folder(folder), 1).run([[2, 5, 6, 3]], 1, 4))
    assert (vectors[0] == vectors[1]).all()


def test_a_float16_table_stays_as_it_is(tmp_path: Path) -> None:
    write_safetensors(tmp_path / WEIGHTS_FILE, {"a": np.ones((2, 3), np.float16), "b": np.ones((2, 3), np.float32)})
    weights = Weights(tmp_path)
    assert [weights.table(name, 2, 3).dtype.name for name in "ab"] == ["float16", "float32"]
    assert weights.get("a", 2, 3).dtype.name == "float32"


@pytest.mark.story
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_loaded_a_model_takes_one_copy_of_its_linear_layers(tmp_path: Path, dtype: str) -> None:
    """Not its word table, nor what was read or widened to make that copy."""
    large = MODELS["multilingual-e5-large-instruct"]
    config = large.config | {
        "num_hidden_layers": LAYERS,
        "hidden_size": WIDTH,
        "intermediate_size": WIDE,
        "vocab_size": WORDS,
    }
    folder = make_folder(large._replace(config=config), tmp_path / "large", dtype)  # type: ignore[arg-type]
    command = [sys.executable, "-c", LOAD, str(make_tiny(tmp_path / "tiny")), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=110)
    before, after = json.loads(run.stdout)
    grown = {name: after[name] - before[name] for name in before}
    assert LINEAR_BYTES < grown["RssAnon"] < 1.25 * LINEAR_BYTES
    assert grown["RssFile"] < LINEAR_BYTES / 4
