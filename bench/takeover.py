"""Two gateways with a node each on one PostgreSQL, as on two machines; the one that works on a batch is killed, with
all that is its: `python -m bench.takeover [--rounds N] [--json]`.

The other one must go on within ON_S_MAX, and at the end every line is there once, and is charged once.
Exit code 0 only if all of it holds.
"""

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import msgspec

from bench.batches import CHARGED, FINAL, ON_S_MAX, TWICE, Api, Ended, file_of, read_end
from bench.crash import learn
from bench.rig import ledger
from bench.rig.command import bench, wrong
from bench.rig.live import Live, serving
from bench.rig.postgres import serving_if
from bench.rig.processes import EMBEDMESH, Process, children_of, wait_for

KEY_SECRET = "key.secret"
EPOCHS = "SELECT batch_id, epoch FROM batches"  # a gateway that takes a batch raises it
WITHIN_S = 300.0  # for a batch, on a slow machine


class Figures(msgspec.Struct):
    """What was found, round by round."""

    on_s: list[float]  # from the kill until the other gateway had the batch, and worked on
    moved_s: list[float]  # until it had settled a unit: that takes what a node takes, on this machine and today
    ended: list[Ended]
    apart: list[str]
    charged_twice: int
    ledger_check_ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return wrong(
            {
                f"a batch stood still for {max(self.on_s):.1f} s": max(self.on_s) > ON_S_MAX,
                "a line is missing, or there twice": any(each.missing or each.twice for each in self.ended),
                "a vector is wrong": any(each.wrong_vectors for each in self.ended),
                "a batch did not complete": any(each.state != "completed" for each in self.ended),
                f"the ledger and the files of {self.apart} differ": self.apart,
                f"{self.charged_twice} lines were charged twice": self.charged_twice,
                "`ledger check` found something": not self.ledger_check_ok,
            }
        )


@contextmanager
def beside(first: Live) -> Iterator[Live]:
    """Another gateway and node on the same store and files, with a data directory of its own."""
    with tempfile.TemporaryDirectory(prefix="embedmesh-beside-") as folder:
        data_dir = Path(folder) / "data"
        data_dir.mkdir(mode=0o700)
        shutil.copy2(first.data_dir / KEY_SECRET, data_dir / KEY_SECRET)
        command = [*EMBEDMESH, "serve", "--json", "--port", "0", "--data-dir", str(data_dir)]
        with Process(command, Path(folder) / "log", environment=first.environment, stdout=subprocess.PIPE) as process:
            assert process.popen.stdout is not None
            ready = msgspec.json.decode(process.popen.stdout.readline())
            yield Live(process, ready["base_url"], first.credentials, data_dir, first.environment)


def kill_all(live: Live) -> float:
    """kill -9 of a gateway, its node and what watches them; the moment when they were dead."""
    pids = [live.process.pid]
    for pid in pids:
        with suppress(OSError):
            pids.extend(children_of(pid))
    for pid in pids:  # first what would start them again
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    live.process.popen.wait()
    return time.monotonic()


def done_of(api: Api, batch_id: str) -> tuple[str, int]:
    """Where a batch is, and how many of its lines are done."""
    batch = api.json("GET", f"/v1/batches/{batch_id}")
    return batch["status"], sum(batch["request_counts"][name] for name in ("completed", "failed"))


def measure(rounds: int = 3, lines: int = 3_000, seed: int = 1) -> Figures:
    """Each round with two new gateways, on a new store."""
    dice = Random(seed)
    figures = Figures([], [], [], [], 0, ledger_check_ok=True)
    with serving_if("postgres") as server:
        assert server is not None
        for _ in range(rounds):
            with tempfile.TemporaryDirectory(prefix="embedmesh-files-") as files:
                environment = {"EMBEDMESH_STORE": server.new(), "EMBEDMESH_FILES_DIR": files}
                with serving(environment=environment) as first:
                    one_round(first, dice, lines, figures)
    return figures


def one_round(first: Live, dice: Random, lines: int, figures: Figures) -> None:
    """A batch begins at the first gateway, which has it when the second one comes."""
    known = learn(first, dice)
    data, asked = file_of(dice, list(known), lines)
    began, api = time.monotonic(), Api(first)
    request = {"input_file_id": api.upload(data), "endpoint": "/v1/embeddings", "completion_window": "24h"}
    batch_id = api.json("POST", "/v1/batches", request)["id"]
    wait_for(lambda: done_of(api, batch_id)[1], WITHIN_S)
    with beside(first) as second:
        epochs = ledger.read(second.store, EPOCHS)
        killed, api = kill_all(first), Api(second)
        before = done_of(api, batch_id)
        wait_for(lambda: ledger.read(second.store, EPOCHS) != epochs, WITHIN_S)
        figures.on_s.append(time.monotonic() - killed)
        wait_for(lambda: done_of(api, batch_id) != before, WITHIN_S)
        figures.moved_s.append(time.monotonic() - killed)
        wait_for(lambda: done_of(api, batch_id)[0] in FINAL, WITHIN_S)
        batch = api.json("GET", f"/v1/batches/{batch_id}")
        figures.ended.append(end := read_end(api, batch, asked, known, time.monotonic() - began))
        second.stop()
        charged, [(twice,)] = ledger.read(second.store, CHARGED, TWICE)
        figures.charged_twice += int(twice)
        if [(name, int(n), int(cost), int(tokens)) for name, n, cost, tokens in charged] != [
            (batch_id, end.answered, end.nanousd, end.tokens)
        ]:
            figures.apart.append(batch_id)
        figures.ledger_check_ok &= ledger.check(second.data_dir, second.environment)


if __name__ == "__main__":
    bench(measure, rounds="each with two new gateways", lines="of each batch", seed="of texts")
