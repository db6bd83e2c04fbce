"""A load says what it does, in steps that only go up; and how long anything may take follows the arithmetic."""

import asyncio
import logging
from pathlib import Path

import pytest

from bench.engine.large_folder import MODELS
from embedmesh.engine.bounds import Bounds
from embedmesh.engine.estimate import FLOPS_A_CORE, Sizes
from embedmesh.engine.folder import digest
from embedmesh.engine.frames import Loading, LoadModel
from embedmesh.engine.process import WorkerProcess
from embedmesh.engine.progress import LOAD_LOG_S, STEPS, LoadProgress
from embedmesh.engine.watch import WATCH_LOOK_S, Sample
from tests.engine.tiny import make_folder


@pytest.mark.story
async def test_a_worker_says_every_step(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "tiny")
    heard: list[Loading] = []
    worker = await WorkerProcess.spawn()
    try:
        await worker.load(LoadModel(str(folder), digest(folder), 16, 48, 1), lambda sample: None, heard.append)
    finally:
        worker.kill()
        await worker.gone(10.0)
    assert [(each.step, each.percent) for each in heard] == list(STEPS.items())
    assert sorted(STEPS.values()) == list(STEPS.values())


def test_only_a_long_load_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    now = [100.0]
    progress = LoadProgress("large", lambda: now[0])
    assert str(progress) == "loading"
    caplog.set_level(logging.INFO, "embedmesh.engine")
    for pause_s, lines in ((0.0, 0), (LOAD_LOG_S / 2, 0), (LOAD_LOG_S, 1), (0.0, 2)):
        now[0] += pause_s
        step, percent = list(STEPS.items())[min(lines, 3)]
        progress.note(Loading(step, percent))
        assert len(caplog.records) == lines
    progress.note(Loading("checks its files", 0))  # it was started again
    assert len(caplog.records) == 2
    assert str(progress) == "loading, 0 %: its engine checks its files"


@pytest.mark.parametrize(("rows", "length"), [(1, 8_192), (4, 256), (1, 512)])
def test_a_large_float16_model_has_time_for_its_longest_text(rows: int, length: int) -> None:
    """A core may be half as fast as one with AVX2; the file of half the bytes is no reason to give it half the time."""
    config = MODELS["bge-m3"].config
    hidden, wide, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    sizes = Sizes(layers * (4 * hidden * hidden + 2 * hidden * wide), 0, layers, hidden)
    takes_s = rows * length * sizes.flops(length) / (FLOPS_A_CORE["avx2"] / 2)
    watch = Bounds(1_100_000_000, sizes, lambda seconds, shortage: None).watch_batch(rows, length)
    assert watch.look(Sample(0.0, "R", 0.0)) is None
    assert watch.look(Sample(takes_s, "R", takes_s)) is None
    assert "spins" in (watch.look(Sample(9 * takes_s, "R", 9 * takes_s)) or "")


def test_a_large_load_without_cpu_or_at_a_slow_disk_is_waited_for() -> None:
    """Ten minutes of hardly any CPU, and twenty seconds of a disk; but not for ever asleep."""
    starved: list[float] = []
    bounds = Bounds(1_100_000_000, Sizes(300_000_000, 0, 24, 1_024), lambda seconds, shortage: starved.append(seconds))
    watch = bounds.watch_start()
    looks = [Sample(at * WATCH_LOOK_S, "RS", at * WATCH_LOOK_S / 50) for at in range(3_000)]
    assert [watch.look(each) for each in looks] == [None] * len(looks)
    assert sum(starved) > 500
    last = looks[-1]
    disk = [last._replace(at=last.at + at * WATCH_LOOK_S, states="DS") for at in range(1, 100)]
    assert [watch.look(each) for each in disk] == [None] * len(disk)
    asleep = [disk[-1]._replace(at=disk[-1].at + at * WATCH_LOOK_S, states="SS") for at in range(1, 300)]
    assert "hangs" in "".join(filter(None, map(watch.look, asleep)))


@pytest.mark.story
async def test_what_an_engine_s_process_says_at_its_end_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """By type and place: a message that cannot be read ends it."""
    worker = await WorkerProcess.spawn()
    try:
        worker._socket.write(b"\x06\x00\x00\x00\xa5hello")
        async with asyncio.timeout(60):
            while "says: nobody caught" not in caplog.text:
                await asyncio.sleep(0.01)
    finally:
        worker.kill()
        await worker.gone(10.0)
    said = next(message for message in caplog.messages if "nobody caught" in message)
    assert said.startswith(f"the engine's process {worker.pid} says: nobody caught FrameError at frames.py:")
    assert "in main < worker.py" in said and "hello" not in caplog.text and "Traceback" not in caplog.text
