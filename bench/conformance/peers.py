"""The gateways: each with the best configuration that its documentation has for two nodes that may fail.

All are told to wait five seconds for a node, to try the other one, and to leave one that fails alone for five seconds.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.conformance.bed import Bed, settle
from bench.conformance.caller import Target
from bench.conformance.node import ConformanceNode, Truth
from bench.gateway.peers import KEY, Started, portkey
from bench.rig.command import CannotRun
from bench.rig.http import MODEL
from bench.rig.install import NotInstalled, install, python_router, system_program
from bench.rig.processes import EMBEDMESH, HOST, Process, free_port, wait_for
from embedmesh.provision.bootstrap import bootstrap

OURS, NOTHING = "embedmesh", "no gateway"
START_S = 120.0  # LiteLLM takes ten to forty on a quiet machine
SETTLE_S = 60.0  # until both nodes get work again, after one has failed
NODE_S = 5  # that a gateway waits for a node
AGAIN_S = 5  # until it looks again at a node that has failed
POLL_S = 0.2
ADDED_S = 30.0

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_max_body_size 16m; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream nodes {{ zone nodes 64k; {servers} keepalive 16; }}
  server {{
    listen {host}:{port};
    location / {{
      proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_set_header Cookie "";
      proxy_set_header X-Request-ID $request_id; add_header X-Request-ID $request_id always;
      proxy_connect_timeout 1s; proxy_read_timeout {node_s}s; proxy_buffers 64 64k; proxy_buffer_size 64k;
      proxy_next_upstream error timeout http_500 http_502 http_503 http_504 http_429 non_idempotent;
      proxy_next_upstream_tries 2;
    }}
  }}
}}
"""
LITELLM = """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://{host}:{first}/v1", api_key: none, timeout: {node_s}}}
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://{host}:{second}/v1", api_key: none, timeout: {node_s}}}
router_settings: {{num_retries: 2, timeout: {node_s}, cooldown_time: {again_s}, routing_strategy: simple-shuffle}}
litellm_settings: {{telemetry: false, drop_params: false, request_timeout: {node_s}}}
"""
RETRIED = [408, 429, 500, 502, 503, 504]
ROUTER = {
    "--request-timeout-secs": NODE_S,
    "--cb-failure-threshold": 3,
    "--cb-timeout-duration-secs": AGAIN_S,
    "--health-check-interval-secs": AGAIN_S,
}


@dataclass
class Peer:
    """How a gateway is started in front of nodes at these ports, and what it claims."""

    start: Callable[[Path, Sequence[int]], Started]
    version: str
    keys: bool = False  # whether it checks keys
    hides_key: bool = True  # whether the caller's key is not the nodes' own
    lists: bool = True  # whether it lists models


def nginx(folder: Path, nodes: Sequence[int]) -> Started:
    """As a plain proxy, told of every failure that it can see."""
    system_program("nginx")
    port = free_port()
    servers = " ".join(f"server {HOST}:{node} max_fails=1 fail_timeout={AGAIN_S}s;" for node in nodes)
    config = NGINX.format(folder=folder, servers=servers, host=HOST, port=port, node_s=NODE_S)
    (folder / "nginx.conf").write_text(config)
    return Started(port, ["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")])


def litellm(folder: Path, nodes: Sequence[int]) -> Started:
    """Two deployments of one model, retries, a key."""
    python = install("litellm")
    port, config = free_port(), folder / "litellm.yaml"
    first, second = nodes
    config.write_text(
        LITELLM.format(model=MODEL, host=HOST, first=first, second=second, node_s=NODE_S, again_s=AGAIN_S)
    )
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": KEY}
    command = [str(python.with_name("litellm")), "--config", str(config), "--host", HOST, "--port", str(port)]
    return Started(port, [*command, "--telemetry", "False"], environment=offline, key=KEY)


def portkey_of_two(folder: Path, nodes: Sequence[int]) -> Started:
    """Load balanced over two orders of the same two targets, each falling back on the other."""
    started = portkey(folder, nodes[:1])
    targets = [
        {
            "provider": "openai",
            "custom_host": f"http://{HOST}:{node}/v1",
            "api_key": "none",
            "request_timeout": 1000 * NODE_S,
        }
        for node in nodes
    ]
    fallback = {"mode": "fallback", "on_status_codes": RETRIED}
    orders = [{"strategy": fallback, "targets": order, "weight": 1} for order in (targets, targets[::-1])]
    config = {"strategy": {"mode": "loadbalance"}, "targets": orders}
    return started._replace(headers={"x-portkey-config": json.dumps(config)}, key=None)


def router(name: str, key: str | None) -> Callable[[Path, Sequence[int]], Started]:
    """vllm-router or sglang-router, in turns; the latter checks a key, which is that of the nodes, too."""

    def start(folder: Path, nodes: Sequence[int]) -> Started:
        port = free_port()
        options = [str(word) for pair in ROUTER.items() for word in pair]
        options += ["--api-key", key] if key is not None else []
        return Started(port, python_router(name, "round_robin", nodes, port, *options), key=key)

    return start


PEERS: dict[str, Peer] = {
    "nginx": Peer(nginx, "1.22"),
    "vllm-router": Peer(router("vllm-router", None), "0.1.17"),
    "sglang-router": Peer(router("sglang-router", KEY), "0.3.2", keys=True, hides_key=False, lists=False),
    "LiteLLM": Peer(litellm, "1.108.7", keys=True),
    "Portkey": Peer(portkey_of_two, "1.9.8"),
}
"""What sglang-router lists it learns from an API of SGLang's own, which these nodes do not have."""


class Ours:
    """Our gateway, with a store and money; both nodes are servers of another make, and the second one is trusted."""

    def __init__(self, folder: Path, first: ConformanceNode, second: ConformanceNode) -> None:
        self._first, self._second, self._joined = first, second, 0
        self.port = free_port()
        self.data_dir = folder / "data"
        self.credentials = bootstrap(self.data_dir, f"http://{HOST}:{self.port}/v1")
        self.command = [*EMBEDMESH, "gateway", "--data-dir", str(self.data_dir), "--port", str(self.port)]
        self._admin = Target(self.port, self.credentials.admin_key)

    def begin(self) -> None:
        """Once it answers: add the nodes."""
        self._add(self._second, "second", trusted=True)
        self.rejoin()

    def rejoin(self) -> None:
        """The first node joins, as one that was not there before."""
        if self._joined:
            self._admin.ask(path=f"/v1/admin/nodes/first-{self._joined}/remove")
        self._joined += 1
        self._add(self._first, f"first-{self._joined}")

    def mend(self) -> None:
        """As an operator who has mended his nodes: the first one is another one, and has no past."""
        self._admin.ask(path="/v1/admin/nodes/second/readmit")
        self.rejoin()

    def money(self) -> tuple[int, int]:
        """Requests and tokens that were charged, once all is written."""
        last, found = (-1, -1), self._charged()
        while found != last:
            time.sleep(2 * POLL_S)
            last, found = found, self._charged()
        return found

    def _charged(self) -> tuple[int, int]:
        rows = Target(self.port, self.credentials.api_key).ask(method="GET", path="/v1/account/usage").json()["data"]
        return sum(row["requests"] for row in rows), sum(row["tokens"] for row in rows)

    def _add(self, node: ConformanceNode, name: str, *, trusted: bool = False) -> None:
        body = {"address": f"http://{HOST}:{node.port}", "models": [{"id": MODEL}], "name": name, "trusted": trusted}
        answer = self._admin.ask(body, path="/v1/admin/nodes", within_s=ADDED_S)
        if answer.status != 200:
            raise CannotRun(f"a node was not added: {answer.words} {answer.body[:200]!r}")


def three_nodes(stack: ExitStack, truth: Truth) -> tuple[ConformanceNode, ConformanceNode, ConformanceNode]:
    """Two that a gateway may ask, and one that it may not."""
    first, second, third = (stack.enter_context(ConformanceNode(name, truth)) for name in ("first", "second", "third"))
    return first, second, third


@contextmanager
def gateway(name: str, folder: Path, truth: Truth) -> Iterator[tuple[Bed, Callable[[], bool]]]:
    """A gateway in front of two nodes, and what waits until both get work again. Raises NotInstalled."""
    folder.mkdir()
    with ExitStack() as stack:
        first, second, third = three_nodes(stack, truth)
        if name == NOTHING:
            yield Bed(Target(first.port), first, first, third, truth), lambda: True
        elif name == OURS:
            yield _ours(stack, folder, first, second, third, truth)
        else:
            peer = PEERS[name]
            started = peer.start(folder, [first.port, second.port])
            target = Target(started.port, started.key, started.headers)
            bed = Bed(target, first, second, third, truth, peer.keys, peer.hides_key, peer.lists)
            process = Process(started.command, folder / "log", environment=started.environment, stop_s=5.0)
            stack.enter_context(process)
            if not wait_for(lambda: target.embed("ready?").status == 200, START_S, lambda: process.lives):
                raise NotInstalled(f"it does not start: {process.log_tail()[-300:]}")
            yield bed, lambda: settle(bed, SETTLE_S)


def _ours(stack: ExitStack, folder: Path, *nodes_and_truth: Any) -> tuple[Bed, Callable[[], bool]]:
    first, second, third, truth = nodes_and_truth
    ours = Ours(folder, first, second)
    process = stack.enter_context(Process(ours.command, folder / "log"))
    target = Target(ours.port, ours.credentials.api_key)
    if not wait_for(lambda: target.ask(method="GET", path="/health").status == 200, START_S, lambda: process.lives):
        raise CannotRun(f"the gateway does not start: {process.log_tail()}")
    ours.begin()
    bed = Bed(target, first, second, third, truth, keys=True, money=ours.money, rejoin=ours.rejoin, repeats=True)

    def settled() -> bool:
        ours.mend()
        return settle(bed, SETTLE_S)

    return bed, settled
