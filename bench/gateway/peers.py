"""The other gateways, each in front of the same cheap node: how to install, start and call them.

None counts tokens or holds money here: nginx and the routers cannot, LiteLLM runs without its database and checks its
one key, and Portkey takes its settings from the request. Bifrost and GoModel are not here: no registry of packages has
their programs (the package of the one fetches its program from elsewhere).
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from bench.rig import install
from bench.rig.http import MODEL
from bench.rig.install import HOME, LOCKS, python_router, run_step, system_program
from bench.rig.processes import HOST, free_port

KEY = "sk-bench"
PORTKEY = HOME / "portkey"
START_S = 90.0  # LiteLLM takes ten to forty
LITELLM = """
model_list:
  - model_name: {model}
    litellm_params: {{model: openai/{model}, api_base: "http://{host}:{node}/v1", api_key: none}}
litellm_settings: {{telemetry: false, drop_params: false}}
"""


class Started(NamedTuple):
    """How to start a gateway that listens on `port`, and what requests to it need."""

    port: int
    command: Sequence[str]
    headers: Mapping[str, str] = {}
    environment: Mapping[str, str] = {}
    key: str | None = None


def nginx(folder: Path, nodes: Sequence[int]) -> Started:
    """One worker, connections to the nodes kept."""
    port = free_port()
    return Started(port, install.nginx("", nodes, folder, port))


def vllm_router(folder: Path, nodes: Sequence[int]) -> Started:
    """On one core as all others."""
    port = free_port()
    return Started(port, python_router("vllm-router", "round_robin", nodes, port))


def sglang_router(folder: Path, nodes: Sequence[int]) -> Started:
    """Its successor, also for other engines."""
    port = free_port()
    return Started(port, python_router("sglang-router", "round_robin", nodes, port))


def litellm(folder: Path, nodes: Sequence[int]) -> Started:
    """One worker, no database, one key."""
    (node,) = nodes
    python = install.install("litellm")
    port, config = free_port(), folder / "litellm.yaml"
    config.write_text(LITELLM.format(model=MODEL, host=HOST, node=node))
    program = str(python.with_name("litellm"))
    offline = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "LITELLM_MASTER_KEY": KEY}
    options = ["--config", str(config), "--host", HOST, "--port", str(port), "--telemetry", "False"]
    return Started(port, [program, *options], environment=offline, key=KEY)


def portkey(folder: Path, nodes: Sequence[int]) -> Started:
    """Without its console."""
    (node,) = nodes
    system_program("npm")
    lock = LOCKS / "portkey" / "package-lock.json"
    stamp = PORTKEY / lock.name
    if not stamp.exists() or stamp.read_bytes() != lock.read_bytes() or not (PORTKEY / "node_modules").exists():
        PORTKEY.mkdir(parents=True, exist_ok=True)
        shutil.copy(LOCKS / "portkey" / "package.json", PORTKEY)
        shutil.copy(lock, PORTKEY)
        run_step(["npm", "ci", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(PORTKEY)])
    port = free_port()
    program = PORTKEY / "node_modules" / "@portkey-ai" / "gateway" / "build" / "start-server.js"
    headers = {"x-portkey-provider": "openai", "x-portkey-custom-host": f"http://{HOST}:{node}/v1"}
    environment = {"TRUSTED_CUSTOM_HOSTS": HOST}
    return Started(port, ["node", str(program), f"--port={port}", "--headless"], headers, environment, KEY)


PEERS = {
    "nginx": nginx,
    "vllm-router": vllm_router,
    "sglang-router": sglang_router,
    "LiteLLM": litellm,
    "Portkey": portkey,
}
"""By the name that is shown."""
