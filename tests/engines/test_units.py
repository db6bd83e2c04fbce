"""Units of a job on Daft and on Ray: every one done and told once, whatever dies; and what a worker raises."""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest

from embedmesh.bulk.engines import engine_for
from embedmesh.bulk.lines import LineBatch
from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.units import JobPlan, units_of
from tests.client.gateway import ALIAS, KEY, Answer, Received, ScriptedGateway, envelope, vector_of
from tests.engines.conftest import needs

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(300)]
ENGINES = [pytest.param(name, marks=needs(name)) for name in ("daft", "ray")]
ROWS = 400
WORKERS = 2
WORKER_NAMES = {"daft": "daft", "ray": "ray::RayUnitWorker"}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    yield
    try:
        import ray
    except ImportError:
        return
    ray.shutdown()


def units(plan: JobPlan, count: int) -> Iterator[dict[str, Any]]:
    """Of ROWS texts each."""

    def batches() -> Iterator[LineBatch]:
        for number in range(count):
            lines = [f'"text {number * ROWS + at}"'.encode() for at in range(ROWS)]
            yield LineBatch(number * ROWS, [*lines], f"d{number}", 1_000 * (number + 1), (), [()] * ROWS)

    return (unit.as_dict() for unit in units_of(batches(), plan))


def run(engine: str, gateway: ScriptedGateway, folder: Path, count: int) -> Iterator[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    fields: dict[str, str | int] = {"model": ALIAS}
    plan = JobPlan(base_url=gateway.base_url, api_key=KEY, fields=fields, output=f"parquet:{folder}")
    return engine_for(engine)(units(plan, count), plan, WORKERS)


def check_parts(folder: Path, count: int) -> None:
    tables = [pyarrow.parquet.read_table(path) for path in sorted(folder.glob("part-*"))]
    numbers = [number for table in tables for number in table.column("index").to_pylist()]
    vectors = np.concatenate([np.stack(table.column("embedding").to_numpy()) for table in tables])
    assert numbers == list(range(count * ROWS))
    assert np.array_equal(
        vectors[::97], np.stack([np.frombuffer(vector_of(f"text {at}"), "<f4") for at in numbers[::97]])
    )


def workers(engine: str) -> list[int]:
    """Descendants of this process, or of any cluster of ours, by their name."""
    found = subprocess.run(["pgrep", "-f", WORKER_NAMES[engine]], capture_output=True, text=True)
    return [pid for pid in map(int, found.stdout.split()) if pid != os.getpid() and is_ours(pid)]


def is_ours(pid: int) -> bool:
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
        if pid == os.getpid():
            return True
    return False


@pytest.mark.parametrize("engine", ENGINES)
def test_every_unit_is_done_and_told_once(engine: str, gateway: ScriptedGateway, tmp_path: Path) -> None:
    rows = list(run(engine, gateway, tmp_path / "out", 40))
    assert sorted(row["unit"] for row in rows) == list(range(40))
    assert sum(row["tokens"] for row in rows) == 3 * 40 * ROWS
    check_parts(tmp_path / "out", 40)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_a_dead_worker_had_is_done_again(engine: str, gateway: ScriptedGateway, tmp_path: Path) -> None:
    gateway.script = lambda received: time.sleep(0.05)  # so that there is something to kill
    killed: list[int] = []

    def kill() -> None:
        until = time.monotonic() + 60
        while len(killed) < 2 and time.monotonic() < until:
            for pid in workers(engine)[:1]:
                if pid not in killed and len(gateway.received) > 10 * (1 + len(killed)):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
            time.sleep(0.05)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    rows = list(run(engine, gateway, tmp_path / "out", 60))
    thread.join()
    assert len(killed) == 2 and sorted(row["unit"] for row in rows) == list(range(60))
    check_parts(tmp_path / "out", 60)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_ends_the_run_is_told_as_the_worker_says_it(engine: str, gateway: ScriptedGateway, tmp_path: Path) -> None:
    def script(received: Received) -> Answer | None:
        is_late = any(text.rpartition(" ")[2] == str(5 * ROWS) for text in received.body["input"])
        return (429, envelope("insufficient_quota", "the money is gone")) if is_late else None

    gateway.script = script
    given: list[int] = []
    with pytest.raises(Stopped, match="the money is gone"):
        given.extend(row["unit"] for row in run(engine, gateway, tmp_path / "out", 100))
    assert len(gateway.received) < 100


@pytest.mark.parametrize("engine", ENGINES)
def test_units_are_taken_as_they_are_needed(engine: str, gateway: ScriptedGateway, tmp_path: Path) -> None:
    """And what is begun ends with the one who asked."""
    taken = 0
    fields: dict[str, str | int] = {"model": ALIAS}
    plan = JobPlan(base_url=gateway.base_url, api_key=KEY, fields=fields, output=f"parquet:{tmp_path}")

    def endless() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for unit in units(plan, 10_000):
            taken += 1
            yield unit

    rows = engine_for(engine)(endless(), plan, WORKERS)
    assert next(rows)["rows"] == ROWS
    assert taken <= 16 * WORKERS
    rows.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 30
    while workers(engine) and time.monotonic() < until:
        time.sleep(0.1)
    assert engine == "daft" or workers(engine) == []
