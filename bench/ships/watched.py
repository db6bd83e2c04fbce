"""What watches: Prometheus' rules by its own tool, then a real one that reads a gateway and two nodes, all under load.

Every panel of the dashboard shows something, or says when it is empty. Then nodes, store and gateway are broken, and
the alerts that this must fire do. In a copy of the rules a minute that an alert waits is a second.
"""

import json
import math
import re
import signal
import ssl
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx

from bench.rig.install import NotInstalled
from bench.rig.postgres import PostgresServer, serving
from bench.rig.processes import EMBEDMESH, HOST, Process, clean_environment, free_port, kill, meanwhile, wait_for
from bench.ships.proxies import make_certificate
from bench.ships.tools import Checklist, run, system_tool
from embedmesh.credentials import Credentials, read_bootstrap
from tests.data import CHECKOUT

RULES = CHECKOUT / "deploy" / "prometheus"
DASHBOARD = CHECKOUT / "deploy" / "grafana" / "embedmesh.json"
START_S, WITHIN_S = 120.0, 90.0  # two nodes load a model; an alert looks at a few scrapes
LOAD_S = 45.0  # rates want some scrapes
CALLERS = 4
LARGE = [" ".join(["word"] * 100)] * 2_048  # 200,000 tokens: a node takes ten seconds
VARIABLES = {"$route": ".*", "$model": ".*", "$__rate_interval": "30s", "$__range": "10m"}
CONFIG = """
global: {{ scrape_interval: 1s, evaluation_interval: 1s }}
rule_files: [{folder}/rules.yaml, {folder}/alerts.yaml]
scrape_configs:
  - job_name: embedmesh-gateways
    scheme: https
    tls_config: {{ insecure_skip_verify: true }}
    authorization: {{ credentials: {key} }}
    static_configs: [{{ targets: ['{gateway}'] }}]
  - job_name: embedmesh-nodes
    static_configs: [{{ targets: {nodes} }}]
"""


def check_watched(rows: Checklist) -> None:
    """All of it. Raises ToolFailed."""
    try:
        promtool, prometheus = system_tool("promtool", "prometheus"), system_tool("prometheus")
        said = run([promtool, "check", "rules", RULES / "rules.yaml", RULES / "alerts.yaml"])
        rows.check("promtool takes rules and alerts", "FAILED" not in said, said)
        rows.check(
            "each alert fires, and before does not", True, run([promtool, "test", "rules", RULES / "alerts.test.yaml"])
        )
        with tempfile.TemporaryDirectory() as folder, serving() as server, ExitStack() as running:
            _check(rows, Watched(Path(folder), server, running), promtool, prometheus)
    except NotInstalled as why:
        rows.skip("Prometheus reads all there is to read", why)
    rows.skip("Grafana shows the dashboard", "no Grafana can be had here: its queries were asked of Prometheus")


class Watched:
    """A gateway with a certificate of two days, two nodes on its machine, and Prometheus."""

    def __init__(self, folder: Path, server: PostgresServer, running: ExitStack) -> None:
        self.folder, self.server, self._running = folder, server, running
        self.port, self.prometheus_port = free_port(), free_port()
        self.monitors = [free_port(), free_port()]
        self.environment = {"EMBEDMESH_STORE": server.new(), "EMBEDMESH_DATA_DIR": str(folder / "data")}
        make_certificate(folder)
        self._embedmesh("store", "init", "--base-url", self.url("/v1"))
        keys = read_bootstrap(folder / "data")
        assert keys is not None
        self.keys: Credentials = keys
        self.metrics_key = self._embedmesh("keys", "create", "--offline", "--scope", "metrics", "--name", "prometheus")
        context = ssl.create_default_context(cafile=str(folder / "fullchain.pem"))
        self.http = httpx.Client(verify=context, timeout=120.0, headers={"Authorization": f"Bearer {keys.api_key}"})
        self.nodes = [self.start_node(number) for number in range(2)]
        self.gateway = self.start_gateway()

    def url(self, path: str) -> str:
        return f"https://{HOST}:{self.port}{path}"

    def start_node(self, number: int) -> Process:
        command = [*EMBEDMESH, "node", "--uds", str(self.folder / f"{number}.sock"), "--threads", "1"]
        command += ["--monitor", f"{HOST}:{self.monitors[number]}", "--data-dir", str(self.folder / f"node-{number}")]
        return self._started(command, f"node-{number}")

    def start_gateway(self) -> Process:
        command = [*EMBEDMESH, "gateway", "--host", HOST, "--port", str(self.port)]
        command += [word for number in range(2) for word in ("--nodes", f"unix:{self.folder}/{number}.sock")]
        command += ["--tls-cert", str(self.folder / "fullchain.pem"), "--tls-key", str(self.folder / "privkey.pem")]
        return self._started(command, "gateway")

    def start_prometheus(self, program: str) -> Process:
        for name in ("rules.yaml", "alerts.yaml"):
            text = (RULES / name).read_text()
            (self.folder / name).write_text(re.sub(r"(?m)^( +for: \d+)[mh]$", r"\1s", text))
        nodes = [f"{HOST}:{port}" for port in self.monitors]
        config = self.folder / "prometheus.yml"
        gateway = f"{HOST}:{self.port}"
        config.write_text(CONFIG.format(folder=self.folder, key=self.metrics_key, gateway=gateway, nodes=nodes))
        command = [program, f"--config.file={config}", f"--storage.tsdb.path={self.folder}/tsdb"]
        command += [f"--web.listen-address={HOST}:{self.prometheus_port}", "--log.level=warn"]
        return self._started(command, "prometheus")

    def is_ready(self) -> bool:
        with suppress(httpx.TransportError):
            return self.http.get(self.url("/readyz")).status_code == 200
        return False

    def ask(self, query: str) -> list[dict[str, Any]]:
        """What Prometheus answers now, without what is not a number."""
        root = f"http://{HOST}:{self.prometheus_port}/api/v1/query"
        reply = httpx.get(root, params={"query": query}, timeout=30.0).json()
        if reply["status"] != "success":
            raise ValueError(f"{query}: {reply['error']}")
        return [each for each in reply["data"]["result"] if not math.isnan(float(each["value"][1]))]

    def firing(self) -> set[str]:
        """Names of alerts."""
        return {each["metric"]["alertname"] for each in self.ask('ALERTS{alertstate="firing"}')}

    def embed(self, texts: str | Sequence[str], model: str = "all-MiniLM-L6-v2") -> int:
        """The status; 0 for no reply."""
        with suppress(httpx.TransportError):
            body = {"model": model, "input": texts, "encoding_format": "base64"}
            return self.http.post(self.url("/v1/embeddings"), json=body).status_code
        return 0

    def keep_asking(self, stop: threading.Event) -> None:
        """Requests of all kinds, good and bad, until `stop`."""
        admin = {"Authorization": f"Bearer {self.keys.admin_key}"}
        while not stop.wait(0.05):
            for texts in ("Hello, world", ["some", "texts", "at once"], ""):
                self.embed(texts)
            self.embed("Hello", model="no-such-model")
            with suppress(httpx.TransportError):
                self.http.get(self.url("/v1/models"))
                self.http.get(self.url("/nothing/here"))
                self.http.get(self.url("/v1/admin/ledger"), headers=admin)

    def send_batch(self, lines: int = 200) -> None:
        def line(number: int) -> str:
            body = {"model": "all-MiniLM-L6-v2", "input": f"text {number}"}
            return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body})

        content = "\n".join(map(line, range(lines))).encode()
        files = {"file": ("lines.jsonl", content)}
        file = self.http.post(self.url("/v1/files"), files=files, data={"purpose": "batch"}).json()["id"]
        new = {"input_file_id": file, "endpoint": "/v1/embeddings", "completion_window": "24h"}
        self.http.post(self.url("/v1/batches"), json=new).raise_for_status()

    def _started(self, command: list[str], name: str) -> Process:
        environment = self.environment if name == "gateway" else {}
        process = Process(command, self.folder / f"{name}.log", environment=environment, stop_s=10.0)
        return self._running.enter_context(process)

    def _embedmesh(self, *words: str) -> str:
        environment = clean_environment(self.environment)
        return subprocess.run(
            [*EMBEDMESH, *words], env=environment, capture_output=True, check=True, text=True
        ).stdout.strip()


def panels() -> Iterator[tuple[str, str, bool]]:
    """Title and query of each curve of the dashboard, and whether it may be empty."""
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in VARIABLES.items():
                query = query.replace(name, value)
            title = f"{panel['title']}: {target['legendFormat']}".removesuffix(": ")
            yield title, query, "mpty" in panel.get("description", "")


def _check(rows: Checklist, watched: Watched, promtool: str, prometheus: str) -> None:
    log = watched.gateway.log_tail
    if not rows.check("the gateway is ready", wait_for(_slowly(watched.is_ready), START_S), log()):
        return
    watched.start_prometheus(prometheus)
    with meanwhile(*[watched.keep_asking] * CALLERS):
        watched.send_batch()
        time.sleep(LOAD_S)
        for name, pages in (
            ("gateway", watched.url("/metrics")),
            ("node", f"http://{HOST}:{watched.monitors[0]}/metrics"),
        ):
            page = watched.http.get(pages, headers={"Authorization": f"Bearer {watched.metrics_key}"}).content
            said = _lint(promtool, page)
            rows.check(f"promtool check metrics: {name}", said == [], "; ".join(said))
        shown = [(title, len(watched.ask(query)), may_be_empty) for title, query, may_be_empty in panels()]
        empty = [title for title, series, may_be_empty in shown if not series and not may_be_empty]
        must = sum(not may_be_empty for _, _, may_be_empty in shown)
        rows.check(f"each of {must} curves shows something", not empty, ", ".join(empty))
        said_so = [title for title, series, may_be_empty in shown if not series and may_be_empty]
        rows.check(
            f"{len(shown) - must} others say when they are empty", True, f"{len(said_so)} are: {', '.join(said_so)}"
        )
        firing = watched.firing()
        rows.check(
            "while all is well one alert fires: two days are left to the certificate",
            firing == {"EmbedmeshCertificateExpires"},
            firing,
        )
        _break(rows, watched)


def _break(rows: Checklist, watched: Watched) -> None:
    """One thing after the other. Alerts of what was broken before may still fire."""

    def fires(what: str, *alerts: str) -> None:
        begun = time.monotonic()
        found = wait_for(_slowly(lambda: set(alerts) <= watched.firing()), WITHIN_S)
        rows.check(
            f"{what}: {', '.join(alerts)}",
            found,
            f"after {time.monotonic() - begun:.0f} s" if found else watched.firing(),
        )

    with meanwhile(*[lambda _stop: watched.embed(LARGE)] * 3):
        fires("three requests of 200,000 tokens", "EmbedmeshQueueLong")
    watched.nodes[0].kill()
    fires("a node is killed", "EmbedmeshNodeEjected", "EmbedmeshTargetDown")
    watched.nodes[1].kill()
    fires("the other, too", "EmbedmeshNoNodeReady", "EmbedmeshErrorBudgetFast")
    watched.nodes = [watched.start_node(number) for number in range(2)]
    rows.check("nodes that come back are used", wait_for(_slowly(watched.is_ready), START_S))
    kill(watched.server.pid)
    fires("PostgreSQL is killed", "EmbedmeshStoreAway")
    watched.server.start_again()
    rows.check("a store that comes back is used", wait_for(_slowly(watched.is_ready), START_S))
    for _ in range(3):
        watched.gateway.popen.send_signal(signal.SIGKILL)
        watched.gateway.popen.wait()
        watched.gateway = watched.start_gateway()
        rows.check("a gateway that was killed serves again", wait_for(_slowly(watched.is_ready), START_S))
        time.sleep(3.0)  # some scrapes
    fires("a gateway was killed three times", "EmbedmeshGatewayRestarts")
    over = {
        "EmbedmeshNoNodeReady",
        "EmbedmeshStoreAway",
        "EmbedmeshNodeEjected",
        "EmbedmeshTargetDown",
        "EmbedmeshQueueLong",
    }
    ended = wait_for(_slowly(lambda: not over & watched.firing()), WITHIN_S)
    rows.check("alerts end with their cause", ended, watched.firing())


def _lint(promtool: str, page: bytes) -> list[str]:
    """What Prometheus' tool finds wrong with a page, but for the endpoint picker's names, which are not ours."""
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, timeout=60.0)
    lines = (done.stdout + done.stderr).decode().splitlines()
    return [line for line in lines if line.strip() and not line.startswith("vllm:")]


def _slowly(look: Callable[[], bool]) -> Callable[[], bool]:
    """The look, once in half a second: what is asked has other things to do."""

    def wait() -> bool:
        time.sleep(0.5)
        return look()

    return wait
