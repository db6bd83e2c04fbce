"""One job of an engine through kills of its driver, its workers and the gateway, and what is there at its end."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np

from bench.crash import OPEN_HOLDS
from bench.gateway.node import SPECIALS
from bench.rig import ledger, processes
from bench.rig.command import wrong
from bench.rig.http import MODEL
from bench.rig.install import NotInstalled, install
from bench.rig.processes import EMBEDMESH, HOST, Process, family_of, free_port, wait_for
from embedmesh.catalogue import load_catalogue
from embedmesh.client.access import find_access
from embedmesh.client.errors import EmbedmeshError
from embedmesh.client.models import served_width
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.embeddings import ServedModel, ServedModels
from embedmesh.settings import store_path
from tests.data import CHECKOUT, model_folder

DRIVER, WORKER, GATEWAY = KINDS = ("driver", "worker", "gateway")
TABLE_ROWS = 4_096
SEED = 19
START_S = 60.0
STILL_S = 180.0  # without a new part, after which a job has failed
LOOK_S = 0.02
BUDGET_USD = 40
STARTS_MAX = 60
CHARGED = "SELECT count(*), count(DISTINCT hold_id), coalesce(sum(tokens), 0), coalesce(sum(cost), 0) FROM usage"
JOBS = "SELECT count(*), coalesce(sum(captured), 0) FROM tabs WHERE tab_id LIKE 'job%'"
RAY_WORKER = b"ray::RayUnitWorker"


class KillRun(msgspec.Struct, frozen=True):
    """One engine's job. Tokens are those of the ledger, and those of all texts, counted here."""

    engine: str
    texts: int
    kills: dict[str, int]
    started: int  # times that the command was run
    seconds: float
    missing: int
    twice: int
    wrong_vectors: int
    charged_tokens: int
    tokens: int
    charged_nanousd: int
    jobs: int  # budgets that were opened
    job_nanousd: int  # what was taken of them
    charged_twice: int
    left_open: int
    ledger_check_ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept."""
        found = {
            f"{self.missing} ids are missing": self.missing,
            f"{self.twice} ids are there twice": self.twice,
            f"{self.wrong_vectors} vectors are wrong": self.wrong_vectors,
            f"{self.charged_tokens:,} tokens were charged of {self.tokens:,}": self.charged_tokens != self.tokens,
            f"{self.jobs} jobs have paid {self.job_nanousd}, the ledger says {self.charged_nanousd}": (
                self.jobs != 1 or self.job_nanousd != self.charged_nanousd
            ),
            f"{self.charged_twice} requests were charged twice": self.charged_twice,
            f"{self.left_open} holds or tabs are open": self.left_open,
            "`ledger check` found something": not self.ledger_check_ok,
        }
        return [f"{self.engine}: {words}" for words in wrong(found)]


class KilledGateway:
    """A gateway in front of a node that costs nearly nothing; it is started again when it was killed."""

    def __init__(self, folder: Path, node: Path, stack: ExitStack) -> None:
        self._stack, self._folder = stack, folder
        self.data_dir, port = folder / "data", free_port()
        self.base_url = f"http://{HOST}:{port}/v1"
        self.api_key = bootstrap(self.data_dir, self.base_url).api_key
        command = [*EMBEDMESH, "gateway", "--data-dir", str(self.data_dir), "--port", str(port)]
        self._command = [*command, "--nodes", f"unix:{node}"]
        self.start()

    def start(self) -> None:
        """Start it."""
        self.process = self._stack.enter_context(Process(self._command, self._folder / "gateway-log"))

    def kill(self) -> None:
        """kill -9, and start it again."""
        self.process.kill()
        self.start()


@contextmanager
def killed_gateway(folder: Path) -> Iterator[tuple[KilledGateway, Any]]:
    """It, and the rows of its node's table. Raises NotInstalled where it does not answer."""
    model = load_catalogue(None, assets=assets_dir()).models[0]
    table = np.random.default_rng(SEED).standard_normal((TABLE_ROWS, model.width))
    table = (table / np.linalg.norm(table, axis=1, keepdims=True)).astype("<f4")
    np.save(folder / "table.npy", table)
    offer = ServedModel(model.id, model.width, model.max_tokens, model.digest, model.tier)
    (folder / "models").write_bytes(msgspec.json.encode(ServedModels([offer])))
    sock = folder / "node.sock"
    node = [sys.executable, "-m", "bench.client.node", str(sock), str(folder / "table.npy"), str(folder / "models")]
    with ExitStack() as stack:
        first = stack.enter_context(Process(node, folder / "node-log"))
        if not wait_for(sock.exists, START_S, lambda: first.lives):
            raise NotInstalled(f"the node did not start: {first.log_tail()}")
        gateway = KilledGateway(folder, sock, stack)
        access = find_access(gateway.base_url, gateway.api_key, None)

        def ready() -> int:
            try:
                return served_width(access, MODEL)
            except EmbedmeshError:
                return 0

        if not wait_for(ready, START_S):
            raise NotInstalled(f"the gateway did not start: {gateway.process.log_tail()}")
        yield gateway, table


@contextmanager
def ray_cluster(folder: Path) -> Iterator[tuple[Process, dict[str, str]]]:
    """A cluster of its own, which outlives drivers; and the environment that leads to it. Raises NotInstalled."""
    port = free_port()
    options = ["--head", "--block", f"--port={port}", "--num-cpus=2"]
    options += ["--include-dashboard=false", f"--temp-dir={folder / 'r'}", "--node-ip-address=127.0.0.1"]
    command = [str(install("engines").with_name("ray")), "start", *options]
    with Process(command, folder / "ray-log", environment=quiet(folder)) as cluster:
        if not wait_for(lambda: b"Ray runtime started" in cluster.log.read_bytes(), START_S, lambda: cluster.lives):
            raise NotInstalled(f"ray did not start: {cluster.log_tail()}")
        yield cluster, {"RAY_ADDRESS": f"127.0.0.1:{port}"}


def quiet(folder: Path) -> dict[str, str]:
    """No engine tells its makers; what is imported is this checkout."""
    return {"DO_NOT_TRACK": "true", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(CHECKOUT), "HOME": str(folder)}


class KilledJob:
    """`embedmesh embed --engine ENGINE`, started again until it says that it is done."""

    def __init__(self, engine: str, gateway: KilledGateway, folder: Path, environment: dict[str, str]) -> None:
        self.engine, self.gateway, self.folder = engine, gateway, folder
        self.out = folder / "out"
        self.environment = {
            **quiet(folder),
            **environment,
            "EMBEDMESH_BASE_URL": gateway.base_url,
            "EMBEDMESH_API_KEY": gateway.api_key,
        }
        self.started = 0

    def run(self, order: list[str], units: int, dice: Random, workers_of: Process | None) -> Counter[str]:
        """To its end. A process is killed each time that some more parts are there. Raises RuntimeError."""
        killed: Counter[str] = Counter()
        step = units / (len(order) + 1)
        marks = [step * (at + dice.random()) for at in range(len(order))]
        moved, parts = time.monotonic(), -1
        driver = self._start()
        try:
            while True:
                now = len(list(self.out.glob("part-*")))
                moved, parts = (time.monotonic(), now) if now != parts else (moved, parts)
                if time.monotonic() - moved > STILL_S:
                    raise RuntimeError(f"{self.engine} stands still: {driver.log_tail()}")
                if not driver.lives:
                    if driver.popen.returncode == 0:
                        return killed
                    driver = self._start()
                if order and parts >= marks[0] and self._kill(order[0], driver, workers_of):
                    killed[order.pop(0)] += 1
                    marks.pop(0)
                time.sleep(LOOK_S)
        finally:
            driver.kill()

    def _start(self) -> Process:
        self.started += 1
        if self.started > STARTS_MAX:
            raise RuntimeError(f"{self.engine} does not end: {(self.folder / 'driver-log').read_text()[-2_000:]}")
        python = install("engines")
        options = ["--engine", self.engine, "--id", "id", "--column", "text", "--budget", str(BUDGET_USD)]
        command = [str(python), "-m", "embedmesh", "embed", str(self.folder / "texts.parquet"), "-o", f"{self.out}/"]
        command += [*options, "--model", MODEL, "--url", self.gateway.base_url]
        return Process(command, self.folder / "driver-log", environment=self.environment)

    def _kill(self, kind: str, driver: Process, workers_of: Process | None) -> bool:
        """Whether there was one to kill."""
        if kind == GATEWAY:
            self.gateway.kill()
        elif kind == DRIVER:
            driver.kill()
        else:
            found = self._workers(driver, workers_of)
            for pid in found[:1]:
                processes.kill(pid)
            return bool(found)
        return True

    def _workers(self, driver: Process, workers_of: Process | None) -> list[int]:
        found = []
        for pid in family_of(workers_of.pid if workers_of else driver.pid)[1:]:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if words.startswith(RAY_WORKER) if workers_of else b"daft" in words:
                found.append(pid)
        return found


def write_texts(file: Path, texts: Sequence[str]) -> None:
    """As Parquet, with ids that are no row numbers."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": [f"id-{at}" for at in range(len(texts))], "text": list(texts)})
    pyarrow.parquet.write_table(table, file, row_group_size=10_000)


def judge(job: KilledJob, texts: Sequence[str], table: Any, killed: Counter[str], seconds: float) -> KillRun:
    """What is in the parts and in the ledger, against the texts themselves. The gateway has stopped."""
    import pyarrow.parquet

    tokenizer = ModelTokenizer(model_folder(), max_tokens=256)
    ids = tokenizer.ids(list(texts))
    right = {f"id-{at}": (31 * one[0] + 7 * one[-1] + one[len(one) // 2]) % len(table) for at, one in enumerate(ids)}
    seen: Counter[str] = Counter()
    wrong_vectors = 0
    for file in sorted(job.out.glob("part-*")):
        part = pyarrow.parquet.read_table(file)
        names = part.column("id").to_pylist()
        seen.update(names)
        vectors = np.stack(part.column("embedding").to_numpy())
        wrong_vectors += int((vectors != table[[right[name] for name in names]]).any(axis=1).sum())
    data_dir = job.gateway.data_dir
    [(rows, distinct, tokens, cost)], [(left,)], [(jobs, captured)] = ledger.read(
        store_path(data_dir), CHARGED, OPEN_HOLDS, JOBS
    )
    return KillRun(
        engine=job.engine,
        texts=len(texts),
        kills=dict(killed),
        started=job.started,
        seconds=seconds,
        missing=len(right.keys() - seen.keys()),
        twice=sum(count - 1 for count in seen.values()),
        wrong_vectors=wrong_vectors,
        charged_tokens=int(tokens),
        tokens=sum(len(one) + SPECIALS for one in ids),
        charged_nanousd=int(cost),
        jobs=int(jobs),
        job_nanousd=int(captured),
        charged_twice=int(rows) - int(distinct),
        left_open=int(left),
        ledger_check_ok=ledger.check(data_dir),
    )
