"""kill -9 of gateway, node, engine, PostgreSQL, S3 while batches run: `python -m bench.batches [--kills N] [--json]`.

Batches of `--lines` lines run one after another, until as many kills have happened. At the end of each, and of all:

* every `custom_id` of the file is exactly once in the output or the error file, and the vectors are right;
* the ledger has charged each answered line once, at the batch's price, and no line of the error file: what was charged
  is the sum over all lines of `ceil(tokens x price)`, to the nano-USD; nothing is held any more, and it adds up;
* after each kill the batch goes on within ON_S_MAX, without help.

Exit code 0 only if all of it holds.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from http.client import HTTPConnection, HTTPException
from math import ceil
from random import Random
from typing import Any, Literal

import msgspec
import numpy as np

from bench.crash import OPEN_HOLDS, VECTOR_ERROR_MAX, kill, kill_postgres, learn
from bench.rig import ledger
from bench.rig.command import bench, progress, wrong
from bench.rig.http import MODEL, vectors_of
from bench.rig.live import Live, serving
from bench.rig.object_storage import S3Server
from bench.rig.postgres import PostgresServer, serving_if
from bench.rig.processes import wait_for
from embedmesh.rules.batches import batch_price

KINDS = ("gateway", "node", "worker")
POSTGRES, STORAGE = "postgres", "storage"
CALM_S = (0.3, 2.5)  # between two kills
ON_S_MAX = 15.0  # the promise: a batch goes on by then
GIVE_UP_S = 120.0  # without any progress, after which a batch has failed
LOOK_S = 0.05
ASK_S = 30.0
PRICE = batch_price(10_000_000, 500_000)  # of the built-in model, in nano-USD per million tokens
BAD_SHARE = 50  # one line in so many is refused by the endpoint: it is in the error file
FINAL = ("completed", "failed", "expired", "cancelled")
CHARGED = """
    SELECT tab_id, count(*), coalesce(sum(cost), 0), coalesce(sum(tokens), 0) FROM usage
    WHERE tab_id LIKE 'batch%' GROUP BY 1
"""
TWICE = "SELECT count(*) - count(DISTINCT hold_id) FROM usage"
HELD = "SELECT tab_id, captured, state FROM tabs WHERE tab_id LIKE 'batch%'"


class Ended(msgspec.Struct):
    """One batch at its end, read line by line."""

    batch_id: str
    state: str
    lines: int
    answered: int
    refused: int
    tokens: int  # of all answers
    nanousd: int  # what these cost, each rounded up by itself
    missing: int  # lines of the file that are in neither output
    twice: int
    wrong_vectors: int
    codes: dict[str, int]
    seconds: float


class Figures(msgspec.Struct):
    """What was found. Money in nano-USD, times in seconds."""

    kills: dict[str, int]
    batches: list[Ended]
    on_s: dict[str, dict[str, float]]
    charged_nanousd: int
    charged_lines: int
    charged_twice: int
    left_open: int
    apart: list[str]  # batches of which the ledger says something else than their files
    ledger_check_ok: bool
    internal_errors_logged: int

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        slowest = max((each["max"] for each in self.on_s.values()), default=0.0)
        conditions: dict[str, object] = {
            f"{sum(each.missing for each in self.batches)} lines are in no file": sum(
                each.missing for each in self.batches
            ),
            f"{sum(each.twice for each in self.batches)} lines are there twice": sum(
                each.twice for each in self.batches
            ),
            f"{sum(each.wrong_vectors for each in self.batches)} vectors are wrong": sum(
                each.wrong_vectors for each in self.batches
            ),
            "a batch did not complete": any(each.state != "completed" for each in self.batches),
            f"the ledger and the files of {self.apart} differ": self.apart,
            f"{self.charged_twice} lines were charged twice": self.charged_twice,
            f"{self.left_open} holds or tabs are still open": self.left_open,
            f"a batch stood still for {slowest:.1f} s": slowest > ON_S_MAX,
            "`ledger check` found something": not self.ledger_check_ok,
            f"{self.internal_errors_logged} internal errors were logged": self.internal_errors_logged,
            "nothing was answered": not sum(each.answered for each in self.batches),
        }
        return wrong(conditions)


class Api:
    """The gateway's API, asked again while it is away."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> bytes:
        """The body of a 200. What fails because the gateway is away is tried again, until ASK_S have passed."""
        until = time.monotonic() + ASK_S
        while True:
            try:
                status, answer = self._once(method, path, body, headers)
                if status == 200:
                    return answer
                if status < 500 and status != 429:
                    raise RuntimeError(f"{method} {path}: {status} {answer[:300]!r}")
            except (OSError, HTTPException):
                status = 0
            if time.monotonic() > until:
                raise RuntimeError(f"{method} {path}: no answer within {ASK_S:.0f} s ({status})")
            time.sleep(LOOK_S)

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The same for JSON."""
        encoded = None if body is None else msgspec.json.encode(body)
        return msgspec.json.decode(self.ask(method, path, encoded, **{"Content-Type": "application/json"}))

    def upload(self, data: bytes) -> str:
        """The id of a new file."""
        form = (
            b'--XyZ\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            b'--XyZ\r\nContent-Disposition: form-data; name="file"; filename="lines.jsonl"\r\n\r\n'
            + data
            + b"\r\n--XyZ--\r\n"
        )
        kind = {"Content-Type": "multipart/form-data; boundary=XyZ"}
        file_id: str = msgspec.json.decode(self.ask("POST", "/v1/files", form, **kind))["id"]
        return file_id

    def _once(self, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = HTTPConnection(*self._live.address, timeout=ASK_S)
        try:
            key = {"Authorization": f"Bearer {self._live.api_key}"}
            connection.request(method, path, body, key | headers)
            reply = connection.getresponse()
            return reply.status, reply.read()
        finally:
            connection.close()


def file_of(dice: Random, texts: list[str], lines: int) -> tuple[bytes, dict[str, list[str]]]:
    """A batch's file, and the texts of each line by its id; an empty list for one that is refused."""
    asked: dict[str, list[str]] = {}
    rows = []
    for number in range(lines):
        several = dice.choices(texts, k=dice.choice((1, 1, 1, 1, 3)))
        refused = number % BAD_SHARE == BAD_SHARE - 1
        asked[f"line-{number}"] = [] if refused else several
        body = {"model": MODEL, "input": [""] if refused else several, "encoding_format": "base64"}
        whole = {"custom_id": f"line-{number}", "method": "POST", "url": "/v1/embeddings", "body": body}
        rows.append(json.dumps(whole))
    return "\n".join(rows).encode() + b"\n", asked


def read_end(
    api: Api, batch: dict[str, Any], asked: dict[str, list[str]], known: dict[str, Any], seconds: float
) -> Ended:
    """Read the files of a batch that has ended."""
    seen: Counter[str] = Counter()
    codes: Counter[str] = Counter()
    answered = refused = tokens = nanousd = wrong_vectors = 0
    for file_id in (batch["output_file_id"], batch["error_file_id"]):
        for line in _lines(api, file_id):
            seen[line["custom_id"]] += 1
            response = line["response"]
            if response is None or response["status_code"] != 200:
                refused += 1
                codes[line["error"]["code"] if response is None else response["body"]["error"]["code"]] += 1
                continue
            answered += 1
            body, texts = response["body"], asked.get(line["custom_id"], [])
            tokens += body["usage"]["total_tokens"]
            nanousd += ceil(body["usage"]["total_tokens"] * PRICE / 10**6)
            found = vectors_of(item["embedding"] for item in body["data"])
            right = np.array([known[text] for text in texts])
            wrong_vectors += found.shape != right.shape or bool(np.abs(found - right).max() > VECTOR_ERROR_MAX)
    return Ended(
        batch_id=batch["id"],
        state=batch["status"],
        lines=len(asked),
        answered=answered,
        refused=refused,
        tokens=tokens,
        nanousd=nanousd,
        missing=len(asked.keys() - seen.keys()),
        twice=sum(count - 1 for count in seen.values()) + len(seen.keys() - asked.keys()),
        wrong_vectors=wrong_vectors,
        codes=dict(codes),
        seconds=seconds,
    )


def _lines(api: Api, file_id: str | None) -> Iterator[dict[str, Any]]:
    if file_id is not None:
        for row in api.ask("GET", f"/v1/files/{file_id}/content").splitlines():
            yield msgspec.json.decode(row)


class Killer:
    """Kills by dice while a batch runs, and notes how soon it goes on."""

    def __init__(
        self, live: Live, server: PostgresServer | None, storage: S3Server | None, order: list[str], dice: Random
    ) -> None:
        self._live, self._server, self._storage, self._dice = live, server, storage, dice
        self.order = order  # what is still to be killed, the last first
        self.killed: Counter[str] = Counter()
        self.on_s: dict[str, list[float]] = {}

    def kill(self) -> tuple[str, float]:
        """One process; what it was, and the moment when it was dead, or was there again."""
        kind = self.order.pop()
        self.killed[kind] += 1
        if kind == POSTGRES:
            assert self._server is not None
            return kind, kill_postgres(self._server)
        if kind == STORAGE:
            assert self._storage is not None
            self._storage.kill_and_start()
            return kind, time.monotonic()
        return kind, kill(self._live, kind, self._dice)

    def watch(self, api: Api, batch_id: str) -> dict[str, Any]:
        """Follow a batch to its end, and kill on the way. Raises RuntimeError where it stands still."""
        last, moved = None, time.monotonic()
        killed: tuple[str, float] | None = None
        next_kill = time.monotonic() + self._dice.uniform(*CALM_S)
        while True:
            batch: dict[str, Any] = api.json("GET", f"/v1/batches/{batch_id}")
            now = time.monotonic()
            progress_now = batch["status"], batch["request_counts"]["completed"] + batch["request_counts"]["failed"]
            if progress_now != last:
                if killed is not None:
                    self.on_s.setdefault(killed[0], []).append(now - killed[1])
                    killed = None
                last, moved = progress_now, now
            if batch["status"] in FINAL:
                return batch
            if now - moved > GIVE_UP_S:
                raise RuntimeError(f"the batch stands still: {batch}")
            if self.order and now > next_kill and killed is None:
                killed = self.kill()
                next_kill = time.monotonic() + self._dice.uniform(*CALM_S)
            time.sleep(LOOK_S)


def measure(
    kills: int = 25,
    lines: int = 10_000,
    seed: int = 1,
    store: Literal["sqlite", "postgres"] = "sqlite",
    workers: int = 0,
    files: Literal["folder", "s3"] = "folder",
) -> Figures:
    """The whole run."""
    with serving_if(store) as server, S3Server.started() if files == "s3" else nullcontext() as storage:
        return run_batches(kills, lines, seed, workers or (2 if server is not None else 1), server, storage)


def run_batches(
    kills: int, lines: int, seed: int, workers: int, server: PostgresServer | None, storage: S3Server | None
) -> Figures:
    """`kills` of each kind, in an order and at moments by dice, over as many batches as that takes."""
    dice = Random(seed)
    more = [*([POSTGRES] if server is not None else []), *([STORAGE] if storage is not None else [])]
    order = [*KINDS, *more] * kills
    dice.shuffle(order)
    environment = {"EMBEDMESH_STORE": server.new()} if server is not None else {}
    if storage is not None:
        environment |= storage.environment | {"EMBEDMESH_FILES_DIR": f"s3://{storage.bucket}/files"}
    ended: list[Ended] = []
    with serving(["--workers", str(workers)], environment) as live, progress() as bar:
        api, known = Api(live), learn(live, dice)
        killer = Killer(live, server, storage, order, dice)
        task = bar.add_task("kill -9", total=len(order))
        while not ended or killer.order:
            data, asked = file_of(dice, list(known), lines)
            began = time.monotonic()
            request = {"input_file_id": api.upload(data), "endpoint": "/v1/embeddings", "completion_window": "24h"}
            batch = killer.watch(api, api.json("POST", "/v1/batches", request)["id"])
            ended.append(read_end(api, batch, asked, known, time.monotonic() - began))
            bar.update(task, completed=sum(killer.killed.values()))
            end = ended[-1]
            words = f"{end.answered:,} answered, {end.refused:,} refused, {end.missing} missing, {end.twice} twice"
            bar.console.print(f"{end.batch_id}: {end.state} in {end.seconds:.0f} s: {words}")
        wait_for(lambda: ledger.read(live.store, OPEN_HOLDS) == [[(0,)]], ON_S_MAX)
        live.stop()
        return join(live, ended, killer)


def join(live: Live, ended: list[Ended], killer: Killer) -> Figures:
    """The batches' files against the ledger."""
    charged, [(twice,)], [(left,)], tabs = ledger.read(live.store, CHARGED, TWICE, OPEN_HOLDS, HELD)
    by_batch = {batch_id: (int(lines), int(cost), int(tokens)) for batch_id, lines, cost, tokens in charged}
    captured = {batch_id: int(amount) for batch_id, amount, _ in tabs}
    apart = [
        each.batch_id
        for each in ended
        if by_batch.get(each.batch_id) != (each.answered, each.nanousd, each.tokens)
        or captured.get(each.batch_id) != each.nanousd
    ]
    return Figures(
        kills=dict(killer.killed),
        batches=ended,
        on_s={
            kind: {"kills": len(each), "median": float(np.median(each)), "max": max(each)}
            for kind, each in killer.on_s.items()
        },
        charged_nanousd=sum(cost for _, cost, _ in by_batch.values()),
        charged_lines=sum(lines for lines, _, _ in by_batch.values()),
        charged_twice=int(twice),
        left_open=int(left),
        apart=apart,
        ledger_check_ok=ledger.check(live.data_dir, live.environment),
        internal_errors_logged=live.process.log.read_text(errors="replace").count("internal error"),
    )


if __name__ == "__main__":
    bench(
        measure,
        kills="of each kind: gateway, node, engine worker, PostgreSQL, object storage",
        lines="of each batch",
        seed="of order, moments and texts",
        store="kill -9 of its server, too",
        workers="gateways; 0 is 1 on SQLite, 2 on PostgreSQL",
        files="where files are: kill -9 of its server, too",
    )
