"""What is told of a model before it is loaded: from headers, and near to what a process then takes."""

import asyncio
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from bench.engine.large_folder import MODELS, make_folder
from embedmesh.engine.estimate import FLOPS_A_CORE, estimate, flops_a_core, measure
from embedmesh.engine.folder import Folder, digest, read_folder
from embedmesh.engine.frames import LoadModel
from embedmesh.engine.memory import MemoryRoom
from embedmesh.engine.plan import BATCH_TOKENS_MAX
from embedmesh.engine.safetensors import WEIGHTS_FILE
from embedmesh.engine.supervise import Supervisor
from embedmesh.rules.errors import NodeBroke, SetupError
from tests.engine.tiny import make_folder as make_tiny
from tests.engine.tiny import make_weights, write_safetensors

LAYERS, WIDTH, WIDE, WORDS = 8, 768, 3_072, 20_000
LINEAR = LAYERS * (4 * WIDTH * WIDTH + 2 * WIDTH * WIDE)


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """57 million numbers in linear layers, and 15 in its tables, as float16."""
    large = MODELS["multilingual-e5-large-instruct"]
    form = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": WIDE, "num_attention_heads": 12}
    model = large._replace(config=large.config | form | {"vocab_size": WORDS})
    return read_folder(make_folder(model, tmp_path_factory.mktemp("medium"), "F16"))


def status_bytes(pid: int, name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def test_numbers_are_counted_from_headers(medium: Folder) -> None:
    sizes = measure(medium)
    assert (sizes.linear, sizes.widened, sizes.layers, sizes.hidden) == (LINEAR, LINEAR, LAYERS, WIDTH)
    assert sizes.flops(256) == 2 * LINEAR + 4 * 256 * WIDTH * LAYERS


@pytest.mark.parametrize("name", ["bert", "half"])
def test_float32_and_float16_files_of_one_model_say_the_same_of_its_speed(tmp_path: Path, name: str) -> None:
    folder = make_tiny(tmp_path / name)
    if name == "half":
        halves = {each: array.astype(np.float16) for each, array in make_weights().items()}
        write_safetensors(folder / WEIGHTS_FILE, halves)
    sizes = measure(read_folder(folder))
    assert sizes.linear == 2 * (4 * 16 * 16 + 2 * 16 * 24)
    assert sizes.widened == (sizes.linear if name == "half" else 0)
    one, two = (estimate(read_folder(folder), cores=cores).tokens_per_s for cores in (1, 2))
    assert one is not None
    assert two == pytest.approx(2 * one, abs=1)


def test_the_fast_tier_takes_half_the_linear_layers(medium: Folder) -> None:
    exact, fast = estimate(medium), estimate(medium, "fast")
    assert exact.memory_bytes - fast.memory_bytes == 2 * LINEAR


def test_without_room_on_a_disk_widened_numbers_take_memory(medium: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    before = estimate(medium)
    monkeypatch.setattr("embedmesh.engine.widened.DISK_LEFT_BYTES_MIN", 10**18)
    assert estimate(medium).memory_bytes - before.memory_bytes == 4 * LINEAR


@pytest.mark.parametrize(
    ("cpuinfo", "flag"),
    [("flags : fpu avx2 avx512f\n", "avx512f"), ("flags : fpu avx2\n", "avx2"), ("flags : a\n", "")],
)
def test_the_rate_follows_the_cpu(tmp_path: Path, cpuinfo: str, flag: str) -> None:
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert flops_a_core(tmp_path / "cpuinfo") == FLOPS_A_CORE[flag]


@pytest.mark.story
async def test_an_engine_s_process_takes_what_was_estimated(medium: Folder) -> None:
    """Within a fifth, as MiniLM and three models of real size do (docs/engine-figures.md); and it gives all back."""
    expected = estimate(medium)
    load = LoadModel(str(medium.path), digest(medium.path), WIDTH, 512, threads=1)
    supervisor = Supervisor(load, on_start=lambda: None)
    await supervisor.start()
    pid = supervisor.pid
    assert pid is not None
    try:
        await supervisor.run([[5] * 512] * 2, 2, BATCH_TOKENS_MAX // 2)
        assert 0.8 < status_bytes(pid, "VmRSS") / expected.memory_bytes < 1.2
    finally:
        await supervisor.stop()
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.story
async def test_a_model_that_does_not_fit_is_refused_and_starts_once_it_does(tmp_path: Path) -> None:
    """At the start, and when its engine has died and memory is short by then."""
    folder = make_tiny(tmp_path / "tiny")
    left = [10**6]
    load = LoadModel(str(folder), digest(folder), 16, 48, threads=1)
    supervisor = Supervisor(load, on_start=lambda: None, memory=MemoryRoom(lambda: left[0]))
    try:
        with pytest.raises(SetupError, match="needs about"):
            await supervisor.start()
        down = [supervisor.down]
        left[0] = 10**12
        async with asyncio.timeout(60):
            await supervisor.run([[2, 5, 3]], 1, 4)
        down.append(supervisor.down)
        left[0] = 10**6
        pid = supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(NodeBroke):
            await supervisor.run([[2, 5, 3]], 1, 4)
        assert [*down, supervisor.down] == [True, False, True]
    finally:
        await supervisor.stop()
