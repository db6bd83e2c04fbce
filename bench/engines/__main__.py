"""Daft and Ray before our gateway: `python -m bench.engines [--only NAME ...] [--texts N] [--kills N] [--json]`.

They are installed in `.bench/engines`, where the tests of tests/engines run first. Then:

* `embedmesh embed --engine …` over `--texts` texts with a budget, while its driver, its workers and the gateway are
  killed by dice: every id once with its own vector, every token charged once, nothing held in the end;
* `--real-texts` texts at a real `embedmesh serve`, in turns: our client, Daft with our provider and with its own, Ray.
  Engines keep the node as busy as our client does, but for NODE_SHARE_MIN. An engine's own processes take CPU from a
  node on the same cores, so the node's busy share is told, too: the time in which a batch runs, of all time.

Exit code 0 only if the tests pass and every promise of the kills is kept; speed is told beside its target.
"""

import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import httpx
import msgspec
import numpy as np

from bench.engines.drive import CLIENT, DAFT, DAFT_OPENAI, RAY
from bench.engines.kills import KINDS, KilledJob, KillRun, judge, killed_gateway, quiet, ray_cluster, write_texts
from bench.rig.command import bench, check_names, progress, say
from bench.rig.corpus import corpus
from bench.rig.figures import Spread, Target
from bench.rig.http import MODEL
from bench.rig.install import NotInstalled, install
from bench.rig.live import Live, serving
from bench.rig.processes import clean_environment
from tests.data import CHECKOUT

ENGINES = ("daft", "ray")
WAYS = (CLIENT, DAFT, DAFT_OPENAI, RAY)
NODE_SHARE_MIN = 0.95
CORPUS_TEXTS = 5_000
UNIT_TEXTS = 2_048  # of a unit of short texts
RUN_S = 900.0
TESTS_S = 600.0
SAME = 2e-4  # vectors of one text in two batches of a real node differ by less
SEED = 44
BATCH_SECONDS = re.compile(r"^embedmesh_node_batch_seconds_sum\{.*\} (\S+)$", re.MULTILINE)


class WayRow(msgspec.Struct, frozen=True):
    """One way to a real node over all rounds."""

    way: str
    texts_per_s: Spread
    share_of_client: Spread
    node_busy: Spread
    wrong: int


class Figures(msgspec.Struct, frozen=True):
    """All of it. `tests` is the last line of pytest."""

    tests: str
    tests_failed: bool
    kills: list[KillRun]
    real_node: list[WayRow]
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        found = [words for run in self.kills for words in run.broken]
        found += [f"{row.way}: {row.wrong} wrong vectors" for row in self.real_node if row.wrong]
        found += [f"{name} did not run: {why}" for name, why in self.left_out.items()]
        return found + ([f"tests/engines: {self.tests}"] if self.tests_failed else [])


def run_tests() -> tuple[str, bool]:
    """The tests that need engines, where they are."""
    command = [str(install("engines")), "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/engines"]
    with tempfile.TemporaryDirectory(prefix="embedmesh-engines-") as home:
        done = subprocess.run(
            command,
            cwd=CHECKOUT,
            env=clean_environment(quiet(Path(home))),
            capture_output=True,
            text=True,
            timeout=TESTS_S,
            stdin=subprocess.DEVNULL,
        )
    say(done.stdout[-4_000:] if done.returncode else "")
    return (done.stdout.strip() or done.stderr.strip() or "no words").splitlines()[-1], done.returncode != 0


def kill_run(engine: str, texts: Sequence[str], kills: int, dice: Random) -> KillRun:
    """One engine."""
    order = [KINDS[at % len(KINDS)] for at in range(kills)]
    dice.shuffle(order)
    with tempfile.TemporaryDirectory(prefix="em-") as name:
        folder = Path(name)
        write_texts(folder / "texts.parquet", texts)
        with killed_gateway(folder) as (gateway, table):
            units = -(-len(texts) // UNIT_TEXTS)
            began = time.monotonic()
            if engine == "ray":
                with ray_cluster(folder) as (cluster, environment):
                    job = KilledJob(engine, gateway, folder, environment)
                    killed = job.run(order, units, dice, cluster)
            else:
                job = KilledJob(engine, gateway, folder, {})
                killed = job.run(order, units, dice, None)
            seconds = time.monotonic() - began
            gateway.process.stop()
            return judge(job, texts, table, killed, seconds)


def real_rows(texts: list[str], rounds: int) -> tuple[list[WayRow], dict[str, str]]:
    """Every way in turns, at one real node."""
    rates: dict[str, list[float]] = {}
    busy: dict[str, list[float]] = {}
    wrong: dict[str, int] = {}
    left_out: dict[str, str] = {}
    with serving() as live, tempfile.TemporaryDirectory(prefix="embedmesh-engines-") as name, progress() as bar:
        file, vectors = Path(name) / "job.json", Path(name) / "vectors.npy"
        job = {"base_url": live.base_url, "api_key": live.api_key, "model": MODEL, "texts": texts}
        file.write_text(json.dumps(job | {"vectors": str(vectors)}))
        expected = None
        for _ in bar.track(range(rounds), description="a real node"):
            for way in (way for way in WAYS if way not in left_out):
                command = [str(install("engines")), str(Path(__file__).with_name("drive.py")), way, str(file)]
                before = batch_seconds(live)
                done = subprocess.run(
                    command,
                    env=clean_environment(quiet(Path(name))),
                    capture_output=True,
                    text=True,
                    timeout=RUN_S,
                    stdin=subprocess.DEVNULL,
                )
                if done.returncode:
                    left_out[way] = (done.stderr.strip() or "no words").splitlines()[-1][:200]
                    continue
                seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
                rates.setdefault(way, []).append(len(texts) / seconds)
                busy.setdefault(way, []).append((batch_seconds(live) - before) / seconds)
                found = np.load(vectors)
                expected = found if expected is None else expected
                same = found.shape == expected.shape
                wrong[way] = wrong.get(way, 0) + (
                    int((np.abs(found - expected).max(axis=1) > SAME).sum()) if same else len(texts)
                )
    ours = rates.get(CLIENT, [])
    rows = [
        WayRow(
            way,
            Spread.of(each),
            Spread.of([one / base for one, base in zip(each, ours, strict=False)]),
            Spread.of(busy[way]),
            wrong[way],
        )
        for way, each in rates.items()
        if ours
    ]
    return rows, left_out


def batch_seconds(live: Live) -> float:
    """How long the node has computed until now, by its own metrics."""
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(live.node_socket)), base_url="http://node") as node:
        page = node.get("/metrics").text
    return sum(float(found) for found in BATCH_SECONDS.findall(page))


def targets_of(rows: Sequence[WayRow]) -> list[Target]:
    """What is wished for."""
    found = {row.way: row.share_of_client for row in rows}
    words = "texts/s at a real node over our client's in the same round"
    return [Target(f"{way}: {words}", NODE_SHARE_MIN, True, found.get(way)) for way in (DAFT, RAY)]


def measure(
    texts: int = 200_000,
    kills: int = 10,
    real_texts: int = 4_000,
    rounds: int = 3,
    seed: int = SEED,
    only: Sequence[str] = (),
) -> Figures:
    """The tests, the kills, the real node. Raises CannotRun where the engines do not install."""
    check_names(only, (*ENGINES, "tests", "real"))
    wanted = set(only) or {*ENGINES, "tests", "real"}
    install("engines")
    tests, failed = run_tests() if "tests" in wanted else ("not run", False)
    some = corpus("S", CORPUS_TEXTS)
    many = [f"{some[at % len(some)]} {at}" for at in range(texts)]
    runs: list[KillRun] = []
    left_out: dict[str, str] = {}
    for engine in (one for one in ENGINES if one in wanted):
        say(f"{engine}: {texts:,} texts, {kills} kills")
        try:
            runs.append(kill_run(engine, many, kills, Random(seed)))
        except NotInstalled as error:
            left_out[engine] = str(error)
    rows: list[WayRow] = []
    if "real" in wanted and real_texts:
        rows, without = real_rows(corpus("S", real_texts), rounds)
        left_out |= without
    return Figures(tests, failed, runs, rows, left_out, targets_of(rows))


if __name__ == "__main__":
    bench(
        measure,
        file="engines.json",
        width=200,
        texts="of each job that is killed",
        kills="of each job: driver, workers, gateway",
        real_texts="at a real node; 0 for none",
        only="daft, ray, tests, real",
    )
