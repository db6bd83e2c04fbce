"""compose.cluster.yaml without compose: its own commands in containers of the image, on the loopback network.

Two gateways of one PostgreSQL, two nodes that dial both by one name. Proxy, Prometheus and Grafana are other images,
which a registry would have to give.
"""

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx
import yaml

from bench.rig.install import NotInstalled
from bench.rig.postgres import serving
from bench.rig.processes import Process, free_port, wait_for
from bench.ships.image import DEPLOY, Container
from bench.ships.tools import Checklist, system_tool
from embedmesh.node.metrics import PICKER_GAUGES

ADDRESSES = {"gateway-1": "127.0.0.1", "gateway-2": "127.0.0.2"}
READY_S = 120.0  # a node loads its model, at the side of another that does


class Cluster:
    """The services of the file; `port` stands for 8080."""

    def __init__(self, folder: Path, dsn: str) -> None:
        self.folder, self.port = folder, free_port()
        self.services = yaml.safe_load((DEPLOY / "compose.cluster.yaml").read_text())["services"]
        self.environment = {"EMBEDMESH_STORE": dsn, "EMBEDMESH_PORT": str(self.port)}
        names = [*ADDRESSES.items(), *(("gateways", address) for address in ADDRESSES.values())]
        self.hosts = folder / "hosts"
        self.hosts.write_text("".join(f"{address} {name}\n" for name, address in names) + "127.0.0.1 localhost\n")
        self.monitors = {name: free_port() for name in ("node-1", "node-2")}

    def start(self, name: str) -> Container:
        """A service, by the command that the file gives it."""
        service = self.services[name]
        command = [str(each).replace("$$", "$").replace(":8080", f":{self.port}") for each in service["command"]]
        volumes = dict(str(each).removesuffix(":ro").split(":") for each in service["volumes"])
        data = next((volume for volume, path in volumes.items() if path == "/data"), name)
        options = ["--volume", f"{self.hosts}:/etc/hosts:ro"]
        for volume, path in volumes.items():
            if path != "/data":
                shared = self.folder / volume
                shared.mkdir(exist_ok=True)
                shared.chmod(0o777)
                options += ["--volume", f"{shared}:{path}"]
        if "entrypoint" in service:
            options += ["--entrypoint", json.dumps(service["entrypoint"])]
        environment = dict(self.environment)
        if name in ADDRESSES:
            environment["EMBEDMESH_HOST"] = ADDRESSES[name]
        if name in self.monitors:
            environment = {"HOSTNAME": name, "EMBEDMESH_MONITOR": f"127.0.0.1:{self.monitors[name]}"}
        return Container(*command, data=self.folder / data, environment=environment, options=options)

    def once(self, name: str) -> None:
        """A service that does its work and ends. Raises ToolFailed."""
        with self.start(name) as container:
            container.wait()

    def root(self, name: str) -> str:
        return f"http://{ADDRESSES[name]}:{self.port}"

    def is_ready(self, name: str) -> Callable[[], bool]:
        """Whether a gateway can serve."""

        def look() -> bool:
            with suppress(httpx.TransportError):
                return httpx.get(f"{self.root(name)}/readyz", timeout=10.0).status_code == 200
            return False

        return look


def check_cluster(rows: Checklist) -> None:
    """All that the file starts of ours. Raises ToolFailed."""
    try:
        system_tool("socat")
        with tempfile.TemporaryDirectory() as folder, store(Path(folder)) as dsn, ExitStack() as running:
            _check(rows, Cluster(Path(folder), dsn), running)
    except NotInstalled as why:
        rows.skip("two gateways, two nodes, PostgreSQL", why)


@contextmanager
def store(folder: Path) -> Iterator[str]:
    """A PostgreSQL that any user of this machine reaches over TCP, as in compose."""
    with serving() as server:
        url = server.new()
        port = free_port()
        socket = url.partition("host=")[2].partition("&")[0] + "/.s.PGSQL.5432"
        command = ["socat", f"TCP-LISTEN:{port},bind=127.0.0.1,fork,reuseaddr", f"UNIX-CONNECT:{socket}"]
        with Process(command, folder / "socat.log", stop_s=5.0):
            yield f"postgresql://postgres@127.0.0.1:{port}/{url.partition('?')[0].rpartition('/')[2]}"


def _check(rows: Checklist, cluster: Cluster, running: ExitStack) -> None:
    cluster.once("setup")
    gateways = {name: running.enter_context(cluster.start(name)) for name in ADDRESSES}
    for name in ADDRESSES:
        wait_for(lambda name=name: _answers(f"{cluster.root(name)}/health"), READY_S)  # type: ignore[misc]
    cluster.once("invite")
    nodes = [running.enter_context(cluster.start(name)) for name in cluster.monitors]
    ready = all(wait_for(cluster.is_ready(name), READY_S) for name in ADDRESSES)
    if not rows.check(
        "both gateways have nodes", ready, "ready" if ready else nodes[0].log() + gateways["gateway-1"].log()
    ):
        return
    keys = json.loads((cluster.folder / "gateway" / "bootstrap.json").read_text())
    vectors = [_embed(cluster.root(name), keys["api_key"]) for name in ADDRESSES]
    rows.check("each embeds, and alike", vectors[0] == vectors[1] and len(vectors[0]) == 384)
    metrics_key = (cluster.folder / "keys" / "metrics.key").read_text().strip()
    page = httpx.get(f"{cluster.root('gateway-2')}/metrics", headers={"Authorization": f"Bearer {metrics_key}"}).text
    rows.check("Prometheus' key reads a gateway's metrics", "\nembedmesh_nodes_ready 2.0\n" in page, len(page))
    pages = [httpx.get(f"http://127.0.0.1:{port}/metrics").text for port in cluster.monitors.values()]
    named = all(f"\n{name} " in page for name, page in itertools.product(PICKER_GAUGES, pages))
    rows.check("nodes have the endpoint picker's metrics", named, ", ".join(PICKER_GAUGES))
    code, took_s = gateways["gateway-2"].stop()
    rows.check("a gateway ends well", code == 0, f"exit code {code} after {took_s:.1f} s")
    begun = time.monotonic()
    running.enter_context(cluster.start("gateway-2"))
    back = wait_for(cluster.is_ready("gateway-2"), READY_S)
    rows.check("it has its nodes back when it is started again", back, f"after {time.monotonic() - begun:.1f} s")
    said = gateways["gateway-1"].says("embedmesh", "ledger", "check", "--offline")
    rows.check("the ledger adds up", True, said.splitlines()[-1])  # or the command had failed
    codes = [node.stop()[0] for node in nodes]
    rows.check("nodes end well", codes == [0, 0], codes)


def _answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, timeout=10.0).status_code == 200
    return False


def _embed(root: str, key: str) -> Sequence[float]:
    body = {"model": "all-MiniLM-L6-v2", "input": "Hello, world", "encoding_format": "float"}
    reply = httpx.post(f"{root}/v1/embeddings", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60.0)
    found: list[float] = reply.json()["data"][0]["embedding"] if reply.status_code == 200 else []
    return found
