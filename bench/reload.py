"""Does a reload lose a request? `python -m bench.reload [--requests N] [--workers N] [--json]`.

A real `serve` over TLS, with two gateways that share its port. Callers embed on connections that are kept and on new
ones, others read streams of a server of another make, and batches run. Meanwhile the file of settings, the catalogue
and the certificate change several times a second, and the gateways are told so by SIGHUP and by the admin API in turn;
every fifth file is broken, and must change nothing. Promised:

* every request is answered as if nothing had happened: a 200, the same vector, a stream to its end, each line of a
  batch once;
* after the last change all workers have it: limits, catalogue, CORS, certificate; no broken file changed anything;
* no bug is met, and the ledger adds up.
"""

import asyncio
import base64
import json
import signal
import ssl
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
import msgspec
import numpy as np

from bench.rig.command import CannotRun, bench, model_folder, progress, wrong
from bench.rig.http import MODEL
from bench.rig.live import Live, serving
from bench.rig.speakers import Speaker, speakers
from tests.http.test_tls import Pair

CHAT = "acme/chat"
EMBEDDERS, READERS = 8, 2
FRESH_EVERY = 25  # requests of one caller on a connection, before it opens a new one
STREAM_EVERY_S = 0.1  # most of the work is vectors
BETWEEN_S = 0.15  # two changes
BROKEN_EVERY = 5
BATCH_LINES = 200
VECTOR_ERROR_MAX = 1e-6  # a text alone and in any batch, component by component
LOOKS = 24  # at the end, each on a connection of its own: whichever worker answers
FOLLOWS_S = 10.0  # within which the last change is everywhere
FOUND_S = 60.0  # of the other server, by every gateway
DIGEST = "8b15441b4c169b78dcc3f86d491663fade918ca0772dae0b58d0eba4f681d569"
TEXTS = [f"Text number {number} is about the {word}." for number in range(40) for word in ("harbour", "orchard")]

CATALOGUE = """
[[models]]
id = "sentence-transformers/{model}"
aliases = ["{model}", "alias-{number}"]
folder = "{folder}"
width = 384
max_tokens = 256
price = {price}
digest = "{digest}"

[[models]]
id = "{chat}"
modalities = ["chat"]
max_tokens = 8_000
price = {price}
output_price = {price}
token_ids = "native"

[[models]]
id = "acme/extra-{number}"
modalities = ["chat"]
max_tokens = 8_000
price = 1
token_ids = "native"
"""
SETTINGS = """
catalogue = "models.toml"
tls_cert = "tls.pem"
tls_key = "tls.key"
cors_origin = ["https://app-{number}.example.com"]
in_flight_max = {in_flight}
policy = "{policy}"
cache_bytes_max = {cache}
batch_price_percent = {percent}
key_defaults = "requests-a-minute={number}"
"""


class Figures(msgspec.Struct):
    """What was found. `lost` are requests by how they ended that were not answered as promised."""

    requests: int
    streams: int
    batch_lines: int
    seconds: float
    slowest_s: float
    reloads: dict[str, int]
    lost: dict[str, int]
    followed: bool
    counted: dict[str, float]
    ledger_check_ok: bool

    @property
    def broken(self) -> list[str]:
        """The promises that were not kept, in words."""
        return wrong(
            {
                f"not answered as promised: {self.lost}": self.lost,
                f"too few reloads to say anything: {self.reloads}": min(self.reloads.values(), default=0) < 3,
                "no stream or no batch went through": not (self.streams and self.batch_lines),
                "a worker did not follow": not self.followed,
                "a broken file was not refused": not self.counted.get("settings_reloads_refused_total"),
                "there was a bug": self.counted.get("internal_errors_total"),
                "`ledger check` found something": not self.ledger_check_ok,
            }
        )


class Operator:
    """Who changes the settings. `folder` has their files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.number = self.last = self.before = 1
        self.reloads: Counter[str] = Counter()
        self.write()

    def write(self) -> None:
        """Other settings than the last ones: limits, catalogue, prices, CORS, certificate."""
        self.last, self.before = self.number, self.last
        even = self.number % 2 == 0
        price = 10_000_000 + self.number
        _put(
            self.folder / "models.toml",
            CATALOGUE.format(
                model=MODEL, chat=CHAT, folder=model_folder(), digest=DIGEST, number=self.number, price=price
            ),
        )
        Pair(self.folder).write(f"certificate {self.number}")
        _put(
            self.folder / "embedmesh.toml",
            SETTINGS.format(
                number=self.number,
                in_flight=64 if even else 1_024,
                policy="cheapest" if even else "fastest",
                cache=0 if even else 64 * 1024 * 1024,
                percent=40 if even else 50,
            ),
        )

    async def change(self, live: Live, session: aiohttp.ClientSession) -> None:
        """The next change, told by a signal or by the admin API."""
        self.number += 1
        broken = self.number % BROKEN_EVERY == 0
        if broken:
            _put(
                self.folder / "embedmesh.toml",
                f'in_flight_max = "many"\ncors_origin = ["https://broken-{self.number}"]',
            )
        else:
            self.write()
        if self.number % 2:
            live.process.popen.send_signal(signal.SIGHUP)
            self.reloads["signal, broken" if broken else "signal"] += 1
        else:
            headers = {"Authorization": f"Bearer {live.credentials.admin_key}"}
            async with session.post(f"{live.base_url}/admin/reload", headers=headers) as reply:
                told = await reply.json()
            assert reply.status == (400 if broken else 200), told
            assert broken or not told["needs_restart"], told
            self.reloads["admin, broken" if broken else "admin"] += 1


def _put(file: Path, text: str) -> None:
    """As a careful editor does: never half a file."""
    draft = file.with_suffix(".draft")
    draft.write_text(text)
    draft.replace(file)


class Callers:
    """Who must notice nothing."""

    def __init__(self, live: Live, requests_max: int) -> None:
        self.live, self.requests_max = live, requests_max
        self.requests = self.streams = self.batch_lines = 0
        self.slowest_s = 0.0
        self.lost: Counter[str] = Counter()
        self.known: dict[str, np.ndarray] = {}

    @property
    def ended(self) -> bool:
        return self.requests >= self.requests_max or self.lost.total() > 100

    def session(self) -> aiohttp.ClientSession:
        headers = {"Authorization": f"Bearer {self.live.api_key}"}
        return aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=False, limit=1))

    async def embed(self, number: int) -> None:
        """Ask for vectors, one request after another."""
        while not self.ended:
            async with self.session() as session:
                for each in range(FRESH_EVERY):
                    await self._vector(session, TEXTS[(number + each * EMBEDDERS + self.requests) % len(TEXTS)])

    async def _vector(self, session: aiohttp.ClientSession, text: str) -> None:
        began = time.monotonic()
        body = {"model": MODEL, "input": text, "encoding_format": "base64"}
        try:
            async with session.post(f"{self.live.base_url}/embeddings", json=body) as reply:
                told = await reply.json()
            if reply.status != 200:
                self.lost[f"{reply.status} {told['error']['code']}"] += 1
                return
        except (aiohttp.ClientError, OSError, ValueError) as error:
            self.lost[type(error).__name__] += 1
            return
        self.requests += 1
        self.slowest_s = max(self.slowest_s, time.monotonic() - began)
        found = np.frombuffer(base64.b64decode(told["data"][0]["embedding"]), "<f4")
        known = self.known.setdefault(text, found)
        if np.abs(found - known).max() > VECTOR_ERROR_MAX:
            self.lost["another vector"] += 1

    async def read(self) -> None:
        """Read streams to their end."""
        body = {"model": CHAT, "messages": [{"role": "user", "content": "Say something."}], "stream": True}
        while not self.ended:
            await asyncio.sleep(STREAM_EVERY_S)
            async with self.session() as session:
                try:
                    async with session.post(f"{self.live.base_url}/chat/completions", json=body) as reply:
                        text = await reply.text()
                except (aiohttp.ClientError, OSError) as error:
                    self.lost[f"stream: {type(error).__name__}"] += 1
                    continue
            if reply.status == 200 and text.endswith("data: [DONE]\n\n"):
                self.streams += 1
            else:
                self.lost[f"stream: {reply.status}"] += 1

    async def batches(self) -> None:
        """Have batches done, each to its end."""
        lines = [
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": MODEL, "input": TEXTS[number % len(TEXTS)], "encoding_format": "base64"},
            }
            for number in range(BATCH_LINES)
        ]
        content = "\n".join(map(json.dumps, lines)).encode()
        async with self.session() as session:
            while not self.ended:
                form = aiohttp.FormData({"purpose": "batch"})
                form.add_field("file", content, filename="lines.jsonl")
                file = await self._json(session, "POST", "/files", data=form)
                wanted = {"input_file_id": file["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
                batch = await self._json(session, "POST", "/batches", json=wanted)
                while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
                    await asyncio.sleep(0.1)
                    batch = await self._json(session, "GET", f"/batches/{batch['id']}")
                if batch["status"] != "completed" or batch["error_file_id"]:
                    self.lost[f"batch: {batch['status']} {batch['request_counts']}"] += 1
                    return
                async with session.get(f"{self.live.base_url}/files/{batch['output_file_id']}/content") as reply:
                    rows = [json.loads(line) for line in (await reply.text()).splitlines()]
                if sorted(row["custom_id"] for row in rows) != sorted(str(line["custom_id"]) for line in lines):
                    self.lost["batch: other lines"] += 1
                self.batch_lines += len(rows)

    async def _json(self, session: aiohttp.ClientSession, method: str, path: str, **more: Any) -> Any:
        async with session.request(method, self.live.base_url + path, **more) as reply:
            told = await reply.json()
        if reply.status != 200:
            self.lost[f"batch: {path} {reply.status}"] += 1
        reply.raise_for_status()
        return told


async def served(callers: Callers) -> None:
    """Wait until all gateways have found the other server. Raises CannotRun."""
    until, in_a_row = time.monotonic() + FOUND_S, 0
    while in_a_row < LOOKS:
        async with callers.session() as session, session.get(f"{callers.live.base_url}/models") as reply:
            in_a_row = in_a_row + 1 if CHAT in await reply.text() else 0
        if time.monotonic() > until:
            raise CannotRun("the other server is not found")


async def followed(live: Live, operator: Operator) -> bool:
    """Whether every one of LOOKS connections sees the last change."""
    origin = f"https://app-{operator.last}.example.com"
    headers = {"Authorization": f"Bearer {live.api_key}", "Origin": origin}
    body = {"model": f"alias-{operator.last}", "input": TEXTS[0]}
    gone = {"model": f"alias-{operator.before}", "input": TEXTS[0]}
    host, port = live.base_url.removeprefix("https://").removesuffix("/v1").split(":")
    wanted = ssl.PEM_cert_to_DER_cert((operator.folder / "tls.pem").read_text())
    for _ in range(LOOKS):
        async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(ssl=False)) as session:
            async with session.post(f"{live.base_url}/embeddings", json=body) as reply:
                if reply.status != 200 or reply.headers.get("Access-Control-Allow-Origin") != origin:
                    return False
            async with session.post(f"{live.base_url}/embeddings", json=gone) as reply:
                if reply.status != 404:
                    return False
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        _, writer = await asyncio.open_connection(host, int(port), ssl=context)
        shown = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.close()
        if shown != wanted:
            return False
    return True


@contextmanager
def endpoint(folder: Path, workers: int) -> Iterator[tuple[Live, Operator, Speaker]]:
    """A `serve` with a file of settings, and a server of another make that it uses."""
    operator = Operator(folder)
    more = ["--config", str(folder / "embedmesh.toml"), "--workers", str(workers)]
    trusted = {"SSL_CERT_FILE": str(folder / "tls.pem")}  # of the commands
    with speakers(1) as (speaker,), serving(more, trusted) as live:
        yield live, operator, speaker


async def load(live: Live, operator: Operator, requests: int) -> Figures:
    """The callers, and the operator beside them, until enough was answered."""
    callers, began = Callers(live, requests), time.monotonic()
    await served(callers)
    tasks = [asyncio.create_task(callers.embed(number)) for number in range(EMBEDDERS)]
    tasks += [asyncio.create_task(callers.read()) for _ in range(READERS)]
    tasks.append(asyncio.create_task(callers.batches()))
    with progress() as bar:
        task = bar.add_task("requests", total=requests)
        async with callers.session() as session:
            while not callers.ended and not any(each.done() and each.exception() for each in tasks):
                await operator.change(live, session)
                bar.update(task, completed=callers.requests)
                await asyncio.sleep(BETWEEN_S)
            await asyncio.gather(*tasks)
            operator.number += -operator.number % BROKEN_EVERY  # so that the next is no broken one
            await operator.change(live, session)
            follows, until = False, time.monotonic() + FOLLOWS_S
            while not follows and time.monotonic() < until:
                follows = await followed(live, operator)
            headers = {"Authorization": f"Bearer {live.credentials.admin_key}"}
            async with session.get(live.base_url.removesuffix("/v1") + "/metrics", headers=headers) as reply:
                page = (await reply.text()).splitlines()
    names = ("settings_reloads_total", "settings_reloads_refused_total", "internal_errors_total")
    counted = {name: _number(page, name) for name in names}
    checked = await asyncio.to_thread(live.command, "ledger", "check", "--offline")
    return Figures(
        requests=callers.requests,
        streams=callers.streams,
        batch_lines=callers.batch_lines,
        seconds=time.monotonic() - began,
        slowest_s=callers.slowest_s,
        reloads=dict(operator.reloads),
        lost=dict(callers.lost),
        followed=follows,
        counted=counted,
        ledger_check_ok=checked.returncode == 0,
    )


def _number(page: list[str], name: str) -> float:
    return next((float(line.rpartition(" ")[2]) for line in page if line.startswith(f"embedmesh_{name} ")), 0.0)


def measure(requests: int = 10_000, workers: int = 2) -> Figures:
    """Run it once."""
    with (
        TemporaryDirectory(prefix="embedmesh-reload-") as folder,
        endpoint(Path(folder), workers) as (live, operator, one),
    ):
        added = live.command("nodes", "add", one.url, "--model", CHAT)
        if added.returncode:
            raise CannotRun(added.stderr.decode())
        return asyncio.run(load(live, operator, requests))


if __name__ == "__main__":
    bench(measure, file="reload.json", requests="requests for vectors that are answered", workers="gateways")
