"""Our client beside its peers: `python -m bench.client [--rounds N] [--only NAME ...] [--json]`.

The `openai` package's asynchronous client with a semaphore, and `baseten-performance-client`, each installed in an
environment under `.bench`, and ours, in turns and in the same run: against one gateway in front of a node that costs
nearly nothing, so that the client is what is measured, and against a real `embedmesh serve`. Every client has the same
requests (`--batch-size`, `--concurrency`); baseten and we also as we come. Every vector is compared.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from bench.rig.command import bench, check_names, progress
from bench.rig.corpus import corpus
from bench.rig.figures import Spread, Target
from bench.rig.http import MODEL
from bench.rig.install import NotInstalled, install
from bench.rig.live import serving
from bench.rig.processes import EMBEDMESH, HOST, Process, clean_environment, cpu_s, family_of, free_port, wait_for
from embedmesh.catalogue import load_catalogue
from embedmesh.client import Client
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.embeddings import ServedModel, ServedModels
from tests.data import CHECKOUT

OURS, OURS_DEFAULT, OURS_STREAM = "embedmesh", "embedmesh, as it comes", "embedmesh, stream"
OPENAI, BASETEN, BASETEN_DEFAULT = "openai", "baseten", "baseten, as it comes"
BASETEN_BASE64 = "baseten, base64"  # which it does not decode
NAMES = (OPENAI, BASETEN, BASETEN_BASE64, BASETEN_DEFAULT, OURS, OURS_DEFAULT, OURS_STREAM)
CHEAP, REAL = "a node that costs nothing", "a real node"
TABLE_ROWS = 4_096
CHARS_MAX = 1_000_000  # of a request of baseten's: no request is cut by that
SAME = 2e-4  # vectors of one text in two batches of a real node differ by less
RUN_S = 300.0
START_S = 30.0
OVER_OPENAI, OVER_BASETEN = 1.5, 1.0  # the targets
STREAM_MB_MAX = 64.0  # what a stream's memory may grow by
SEED = 19


class Run(msgspec.Struct, frozen=True):
    """One client once. `gateway_us` is CPU of the gateway a text."""

    texts_per_s: float
    cpu_us: float  # of the client, a text
    gateway_us: float
    grown_mb: float
    wrong: int


class Row(msgspec.Struct, frozen=True):
    """One client over all rounds."""

    node: str
    client: str
    texts_per_s: Spread
    cpu_us: Spread
    gateway_us: Spread
    grown_mb: Spread
    wrong: int


class Figures(msgspec.Struct, frozen=True):
    """All of it."""

    texts: int
    batch_size: int
    concurrency: int
    rows: list[Row]
    left_out: dict[str, str]
    targets: list[Target]

    @property
    def broken(self) -> list[str]:
        """Wrong vectors; a busy machine is no bug."""
        return [f"{row.client}: {row.wrong} wrong vectors" for row in self.rows if row.wrong]


class Endpoint(msgspec.Struct, frozen=True):
    """A gateway that answers."""

    name: str
    base_url: str
    api_key: str
    pids: list[int]


@contextmanager
def cheap_endpoint() -> Iterator[Endpoint]:
    """A gateway in front of a node of `bench.client.node`."""
    model = load_catalogue(None, assets=assets_dir()).models[0]
    with tempfile.TemporaryDirectory(prefix="embedmesh-client-") as name:
        folder = Path(name)
        table = np.random.default_rng(SEED).standard_normal((TABLE_ROWS, model.width))
        np.save(folder / "table.npy", (table / np.linalg.norm(table, axis=1, keepdims=True)).astype("<f4"))
        offer = ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier)
        (folder / "models").write_bytes(msgspec.json.encode(ServedModels([offer])))
        sock, port = folder / "node.sock", free_port()
        base_url = f"http://{HOST}:{port}/v1"
        key = bootstrap(folder / "data", base_url).api_key
        node = [sys.executable, "-m", "bench.client.node", str(sock), str(folder / "table.npy"), str(folder / "models")]
        gateway = [*EMBEDMESH, "gateway", "--data-dir", str(folder / "data"), "--port", str(port)]
        with Process(node, folder / "node-log") as first:
            if not wait_for(sock.exists, START_S, lambda: first.lives):
                raise NotInstalled(f"the node did not start: {first.log_tail()}")
            with Process([*gateway, "--nodes", f"unix:{sock}"], folder / "log") as second:
                with Client(base_url=base_url, api_key=key, max_retries=50) as client:
                    client.embeddings.create(model=MODEL, input="ready")
                yield Endpoint(CHEAP, base_url, key, [second.pid])


@contextmanager
def real_endpoint() -> Iterator[Endpoint]:
    """`embedmesh serve`."""
    with serving() as live:
        yield Endpoint(REAL, live.base_url, live.api_key, live.gateways())


def drive(name: str, endpoint: Endpoint, job: dict[str, Any], folder: Path, expected: Any) -> Run:
    """One client once. Raises NotInstalled."""
    ours = name.startswith("embedmesh")
    python = Path(sys.executable) if ours else install("client")
    file, vectors = folder / "job.json", folder / "vectors.npy"
    given = job | {"base_url": endpoint.base_url, "api_key": endpoint.api_key, "vectors": str(vectors)}
    file.write_text(json.dumps(given))
    vectors.unlink(missing_ok=True)
    script = Path(__file__).with_name("drive.py")
    environment = clean_environment({"PYTHONPATH": str(CHECKOUT)} if ours else {"PYTHONPATH": ""})
    family = family_of(*endpoint.pids)
    used = cpu_s(family)
    done = subprocess.run(
        [str(python), str(script), name, str(file)],
        capture_output=True,
        text=True,
        timeout=RUN_S,
        env=environment,
        stdin=subprocess.DEVNULL,
    )
    used = cpu_s(family) - used
    if done.returncode:
        raise NotInstalled((done.stderr.strip() or "no words").splitlines()[-1][:200])
    said = json.loads(done.stdout.splitlines()[-1])
    count = len(given["texts"])
    wrong = abs(count - said["count"])
    if vectors.exists():
        found = np.load(vectors)
        wrong = count if found.shape != expected.shape else int((np.abs(found - expected).max(axis=1) > SAME).sum())
    asked = count + 2 * job["batch_size"]  # those to warm up, too
    return Run(
        texts_per_s=count / said["seconds"],
        cpu_us=1e6 * said["cpu_s"] / count,
        gateway_us=1e6 * used / asked,
        grown_mb=said["peak_mb"] - said["before_mb"],
        wrong=wrong,
    )


def expected_of(endpoint: Endpoint, texts: Sequence[str]) -> Any:
    """The vectors by the plainest way: one request after another."""
    with Client(base_url=endpoint.base_url, api_key=endpoint.api_key) as client:
        rows = [
            item.embedding
            for at in range(0, len(texts), 64)
            for item in client.embeddings.create(model=MODEL, input=texts[at : at + 64]).data
        ]
    return np.array(rows, dtype=np.float32)


def rows_of(
    endpoint: Endpoint, texts: list[str], job: dict[str, Any], rounds: int, names: Sequence[str]
) -> tuple[list[Row], dict[str, str]]:
    """Every client in turns; and what is left out, with why."""
    runs: dict[str, list[Run]] = {}
    left_out: dict[str, str] = {}
    given = job | {"texts": texts}
    expected = expected_of(endpoint, texts)
    with tempfile.TemporaryDirectory(prefix="embedmesh-client-") as folder, progress() as bar:
        for _ in bar.track(range(rounds), description=endpoint.name):
            for name in names:
                if name in left_out:
                    continue
                try:
                    runs.setdefault(name, []).append(drive(name, endpoint, given, Path(folder), expected))
                except NotInstalled as error:
                    left_out[name] = str(error)
    fields = ("texts_per_s", "cpu_us", "gateway_us", "grown_mb")
    rows = []
    for name, each in runs.items():
        if each:
            spreads = {field: Spread.of([getattr(run, field) for run in each]) for field in fields}
            rows.append(Row(endpoint.name, name, wrong=sum(run.wrong for run in each), **spreads))
    return rows, left_out


def targets_of(rows: Sequence[Row]) -> list[Target]:
    """What is promised."""
    found = {row.client: row for row in rows if row.node == CHEAP}

    def over(peer: str, ours: str) -> Spread | None:
        if peer not in found or ours not in found:
            return None
        return Spread.of([found[ours].texts_per_s.median / found[peer].texts_per_s.median])

    stream = found.get(OURS_STREAM)
    return [
        Target("texts/s over openai's, same requests", OVER_OPENAI, True, over(OPENAI, OURS)),
        Target("texts/s over baseten's, same requests", OVER_BASETEN, True, over(BASETEN, OURS)),
        Target("texts/s over baseten's, same requests, base64", OVER_BASETEN, True, over(BASETEN_BASE64, OURS)),
        Target("texts/s over baseten's, as both come", OVER_BASETEN, True, over(BASETEN_DEFAULT, OURS_DEFAULT)),
        Target("memory of a stream", STREAM_MB_MAX, False, stream.grown_mb if stream else None, " MB"),
    ]


def measure(
    rounds: int = 5,
    texts: int = 50_000,
    real_texts: int = 4_000,
    batch_size: int = 128,
    concurrency: int = 16,
    only: Sequence[str] = (),
) -> Figures:
    """Both endpoints, one after another."""
    check_names(only, NAMES)
    names = [name for name in NAMES if not only or name in only]
    job = {"model": MODEL, "batch_size": batch_size, "concurrency": concurrency, "chars_max": CHARS_MAX}
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    for started, count in ((cheap_endpoint, texts), (real_endpoint, real_texts)):
        if count:
            with started() as endpoint:
                some, without = rows_of(endpoint, corpus("Q", count), job, rounds, names)
                rows += some
                left_out |= without
    return Figures(texts, batch_size, concurrency, rows, left_out, targets_of(rows))


if __name__ == "__main__":
    bench(
        measure,
        file="client.json",
        width=130,
        texts="with the cheap node; 0 for none",
        real_texts="with the real node; 0 for none",
        only="clients, such as openai",
    )
