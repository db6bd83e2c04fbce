"""A real `embedmesh serve` for benches and tests: start it, talk to it, look at its processes, stop it."""

import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import msgspec

from bench.rig.command import CannotRun
from bench.rig.http import MODEL, REPLY_S, Wire, http_request
from bench.rig.processes import EMBEDMESH, Process, children_of, clean_environment, rss_mb
from embedmesh.credentials import Credentials
from embedmesh.settings import store_path

START_S = 60.0  # a warm start takes one; a busy machine and a cold disk some more
STOP_S = 50.0  # the gateway may drain for 35 s and the node for 10 s; then the supervisor kills them


@dataclass(frozen=True)
class Live:
    """A running `serve`. `process.log` is what it and its children wrote to standard error."""

    process: Process
    base_url: str
    credentials: Credentials
    data_dir: Path
    environment: Mapping[str, str]

    @property
    def store(self) -> str | Path:
        """The DSN or the path of its store."""
        return self.environment.get("EMBEDMESH_STORE") or store_path(self.data_dir)

    @property
    def api_key(self) -> str:
        """A key that may embed."""
        return self.credentials.api_key

    @property
    def address(self) -> tuple[str, int]:
        """Where the gateway listens."""
        host, _, port = self.base_url.removeprefix("http://").removesuffix("/v1").rpartition(":")
        return host, int(port)

    @property
    def node_socket(self) -> Path:
        """Where its node listens."""
        return self.data_dir / "run" / "node.sock"

    def embed(self, request: Mapping[str, Any], **headers: str) -> bytes:
        """`POST /v1/embeddings` with this JSON, as bytes; the default model unless it names one."""
        body = msgspec.json.encode({"model": MODEL, **request})
        return http_request("POST", "/v1/embeddings", body, key=self.api_key, headers=headers)

    def wire(self, timeout_s: float = REPLY_S) -> Wire:
        """A new connection to the gateway."""
        return Wire(self.address, timeout_s)

    def command(self, *arguments: str) -> "subprocess.CompletedProcess[bytes]":
        """Run `embedmesh ARGUMENTS --json` on its data directory."""
        return embedmesh(self.data_dir, *arguments, environment=self.environment)

    def gateways(self) -> list[int]:
        """The process ids of the gateways that live now: one for each of `--workers`."""
        return self._children("gateway")

    def pids(self) -> dict[str, int]:
        """The process ids of `gateway` (one of them), `node` and `worker` that live now."""
        found = {name: pids[-1] for name in ("gateway", "node") if (pids := self._children(name))}
        workers = [pid for pid in _children(found["node"]) if _name(pid) == "worker"] if "node" in found else []
        return found | ({"worker": workers[-1]} if workers else {})

    def resident_mb(self) -> dict[str, float]:
        """Resident memory in MB (1e6 bytes) by process; a moment between two processes' lives leaves one out."""
        found = {}
        for name, pid in self.pids().items():
            with suppress(OSError):
                found[name] = rss_mb([pid])
        return found

    def stop(self) -> int:
        """SIGTERM, then wait until it has drained; its exit code. Raises TimeoutExpired. May be called twice."""
        self.process.popen.terminate()
        return self.process.popen.wait(STOP_S)

    def _children(self, name: str) -> list[int]:
        return [pid for pid in _children(self.process.pid) if _name(pid) == name]


@contextmanager
def serving(
    arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, *, start_s: float = START_S
) -> Iterator[Live]:
    """A `serve` on a free port, with a new data directory that is removed in the end. Raises CannotRun."""
    environment = environment or {}
    with tempfile.TemporaryDirectory(prefix="embedmesh-live-") as folder:
        data_dir = Path(folder) / "data"
        command = [*EMBEDMESH, "serve", "--json", "--port", "0", "--data-dir", str(data_dir), *arguments]
        process = Process(
            command,
            Path(folder) / "log",
            environment=environment,
            own_session=False,
            stdout=subprocess.PIPE,
        )
        watchdog = Timer(start_s, process.popen.kill)  # so that waiting for the first line ends
        watchdog.daemon = True
        watchdog.start()
        try:
            assert process.popen.stdout is not None
            line = process.popen.stdout.readline()
            watchdog.cancel()
            if not line:
                raise CannotRun(f"serve did not become ready: {process.log_tail()}")
            ready = msgspec.json.decode(line)
            credentials = msgspec.json.decode(Path(ready["bootstrap"]).read_bytes(), type=Credentials)
            live = Live(process, ready["base_url"], credentials, data_dir, environment)
            yield live
            live.stop()
        finally:
            watchdog.cancel()
            process.kill()
            if process.popen.stdout is not None:
                process.popen.stdout.close()


def embedmesh(
    data_dir: Path, *arguments: str, environment: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[bytes]":
    """Run `embedmesh ARGUMENTS --json` on a data directory, as an operator would."""
    command = [*EMBEDMESH, *arguments, "--data-dir", str(data_dir), "--json"]
    options: dict[str, Any] = {"capture_output": True, "stdin": subprocess.DEVNULL, "check": False}
    return subprocess.run(command, env=clean_environment(environment), **options)


def _children(pid: int) -> list[int]:
    with suppress(OSError):
        return children_of(pid)
    return []


def _name(pid: int) -> str:
    """`gateway`, `node` or `worker` by its command line, else another word or nothing."""
    with suppress(OSError):  # it has just ended
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        if "embedmesh.engine.worker" in words:
            return "worker"
        after = words[words.index("embedmesh") + 1 :] if "embedmesh" in words else []
        return after[0] if after else ""
    return ""
