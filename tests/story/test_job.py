"""A job of `embedmesh embed` with a budget at `embedmesh serve`: whatever dies, each id is there once, charged once."""

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from embedmesh.bulk.sources import batches_of
from embedmesh.bulk.units import JobPlan, units_of
from embedmesh.commands.embed import EMBED_MODEL as MODEL
from tests.story.endpoint import COMMAND, SAME, Endpoint, run, wait_until

INPUTS, LINES = 12, 20  # a unit each
BACK_S = 60.0
NANOUSD_A_TOKEN = 10  # of the built-in catalogue


def text_of(number: int) -> str:
    return f"number {number} of a library that is embedded unit by unit" + ", and once more" * 3


def write_inputs(folder: Path) -> list[str]:
    """As many files of JSON lines, with ids that are not the rows' numbers."""
    names = []
    for at in range(INPUTS):
        rows = [{"id": f"id-{n}", "text": text_of(n)} for n in range(at * LINES, (at + 1) * LINES)]
        (folder / f"{at:02}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        names.append(str(folder / f"{at:02}.jsonl"))
    return names


def part_names(inputs: list[str]) -> list[str]:
    """Of the job's parts: they follow from the input."""
    plan = JobPlan(base_url="", api_key="", fields={"model": MODEL}, output="", ids="id")
    units = units_of(batches_of(inputs, None, None), plan)
    return [f"part-{unit.number:06}-{unit.key[:8]}.parquet" for unit in units]


def committed(out: Path) -> int:
    manifest = out / "_manifest.jsonl"
    return manifest.read_bytes().count(b'"unit"') if manifest.exists() else 0


def wait_for_more(out: Path, done: int) -> None:
    wait_until(f"more than {done} units are committed", lambda: committed(out) > done, BACK_S)


def jobs(endpoint: Endpoint) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = endpoint.http.get(f"{endpoint.base_url}/jobs").json()["data"]
    return found


def test_every_id_once_and_charged_once(victim: Endpoint, tmp_path: Path) -> None:
    """Units are charged and cannot be written; command and gateway are killed; the same command does the rest, once."""
    victim.embed("warm")
    before, out, inputs = victim.account().balance_nanousd, tmp_path / "out", write_inputs(tmp_path)
    command = ["embed", *inputs, "-o", f"{out}/", "--id", "id", "--budget", "1", "--concurrency", "4"]
    command += ["--data-dir", str(victim.data_dir)]
    blocked = [out / name for name in part_names(inputs)[:4]]
    for name in blocked:
        name.mkdir(parents=True)
    stopped = run(*command)
    assert stopped.returncode == 3 and b"output failed (Is a directory)" in stopped.stderr, stopped.stderr
    assert committed(out) == 0 and jobs(victim)[0]["requests"] >= 1
    for name in blocked:
        name.rmdir()
    for dies in ("command", "gateway"):
        done = committed(out)
        with subprocess.Popen([*COMMAND, *command], stderr=subprocess.PIPE, env=os.environ) as process:
            wait_for_more(out, done)
            if dies == "gateway":
                pid = victim.pid("gateway")
                assert pid is not None
                os.kill(pid, signal.SIGKILL)
                wait_for_more(out, done + 3)
            process.kill()
            assert b"Traceback" not in process.communicate()[1]
        assert committed(out) < INPUTS
    ended = run(*command, "--json")
    assert ended.returncode == 0, ended.stderr.decode()
    told = json.loads(ended.stdout)
    rows = [row for part in sorted(out.glob("part-*")) for row in parquet.read_table(part).to_pylist()]
    assert [row["id"] for row in rows] == [f"id-{number}" for number in range(INPUTS * LINES)]
    (job,) = jobs(victim)
    assert (job["status"], job["texts"]) == ("closed", INPUTS * LINES) and job["recomputed_tokens"] > 0
    assert job["charged_nanousd"] == NANOUSD_A_TOKEN * job["tokens"] == told["charged_nanousd"]
    assert before - victim.account().balance_nanousd == job["charged_nanousd"]
    victim.check_ledger()
    some = [0, 77, INPUTS * LINES - 1]
    plain = victim.embed([text_of(number) for number in some])
    assert np.abs(np.array([rows[number]["embedding"] for number in some]) - plain).max() < SAME


def test_a_budget_that_is_not_enough(victim: Endpoint, tmp_path: Path) -> None:
    """The job costs no more. It says so, and with a larger budget it does the rest."""
    before, names = victim.account().balance_nanousd, write_inputs(tmp_path)[:4]
    command = ["embed", *names, "-o", f"{tmp_path}/out/", "--data-dir", victim.data_dir, "--concurrency", "1"]
    ended = run(*command, "--budget", "0.000009", "--json")
    assert ended.returncode == 3 and b"does not cover this" in ended.stderr, ended.stderr
    assert b"embedmesh jobs cancel job_" in ended.stderr
    told = json.loads(ended.stdout)
    assert 0 < told["cost_nanousd"] <= 9_000 and 0 < told["texts"] < 4 * LINES
    refused = run(*command)
    assert refused.returncode == 2 and b"begun with a --budget" in refused.stderr
    ended = run(*command, "--budget", "0.01", "--json")
    assert ended.returncode == 0, ended.stderr
    charged = json.loads(ended.stdout)["charged_nanousd"]
    assert before - victim.account().balance_nanousd == charged
    assert sum(job["texts"] for job in jobs(victim)[:2]) == 4 * LINES
    assert {job["status"] for job in jobs(victim)} == {"closed"}
    victim.check_ledger()
