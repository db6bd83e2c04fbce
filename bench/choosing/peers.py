"""The other routers, each in front of the same nodes: nginx (the system's) and sglang-router (its own environment)."""

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from bench.engine.install import HOME, NotInstalled, install_one
from bench.fault.rig import HOST, free_port
from bench.health import healthy

ROUTER = "sglang-router==0.3.2"
START_S = 30.0
BODY_MB_MAX = 16

NGINX = """
daemon off; master_process off; worker_processes 1; pid {folder}/pid; error_log {folder}/error.log crit;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size {body}m; client_body_buffer_size {body}m; client_body_temp_path {folder}/body;
  proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  upstream nodes {{ zone nodes 64k; {method} {servers} keepalive 64; keepalive_requests 1000000000; }}
  server {{
    listen {host}:{port}; keepalive_requests 1000000000;
    location / {{
      proxy_pass http://nodes; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_read_timeout 600s; proxy_send_timeout 600s; proxy_buffers 64 64k; proxy_buffer_size 64k;
    }}
  }}
}}
"""


class Peer(NamedTuple):
    """One way to choose, and whose it is."""

    name: str
    program: str  # nginx or sglang-router
    option: str  # its policy


PEERS = (
    Peer("nginx, round robin", "nginx", ""),
    Peer("nginx, two choices", "nginx", "random two least_conn;"),
    Peer("nginx, least requests", "nginx", "least_conn;"),
    Peer("sglang-router, round robin", "sglang-router", "round_robin"),
    Peer("sglang-router, two choices", "sglang-router", "power_of_two"),
)


def install(program: str) -> None:
    """Make sure that it is there. Raises NotInstalled, in words."""
    if program == "nginx":
        if shutil.which("nginx") is None:
            raise NotInstalled("there is no nginx here: install your system's package")
        return
    install_one("sglang-router", ROUTER)


@asynccontextmanager
async def running(peer: Peer, nodes: Sequence[int], folder: Path) -> AsyncIterator[int]:
    """The peer in front of nodes at these ports; the port that it listens on. Raises NotInstalled."""
    install(peer.program)
    port = free_port()
    folder.mkdir()
    command = nginx_config(peer.option, nodes, folder, port) if peer.program == "nginx" else _router(peer, nodes, port)
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        await healthy(port, process, START_S)
        yield port
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


def nginx_config(method: str, nodes: Sequence[int], folder: Path, port: int) -> list[str]:
    """Write nginx's configuration into `folder`; the command that runs it in the foreground, with one worker."""
    servers = " ".join(f"server {HOST}:{node} max_fails=0;" for node in nodes)
    config = NGINX.format(folder=folder, method=method, servers=servers, host=HOST, port=port, body=BODY_MB_MAX)
    (folder / "nginx.conf").write_text(config)
    return ["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]


def _router(peer: Peer, nodes: Sequence[int], port: int) -> list[str]:
    workers = [f"http://{HOST}:{node}" for node in nodes]
    python = str(HOME / "sglang-router" / "bin" / "python")
    command = [
        python,
        "-m",
        "sglang_router.launch_router",
        "--host",
        HOST,
        "--port",
        str(port),
        "--policy",
        peer.option,
    ]
    command += ["--prometheus-port", str(free_port()), "--log-level", "error", "--request-timeout-secs", "600"]
    return [*command, "--worker-urls", *workers]
