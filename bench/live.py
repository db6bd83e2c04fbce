"""A real `embedmesh serve` for benches and tests: start it, talk to it, look at its processes, stop it.

The client is a blocking socket and a hundred lines, so that its own cost is small beside what it measures, and so that
it can say anything at all, HTTP or not.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any, NamedTuple

import msgspec

from embedmesh.settings import Credentials, store_path

MODEL = "all-MiniLM-L6-v2"
START_S = 60.0  # a warm start takes one; a busy machine and a cold disk some more
STOP_S = 50.0  # the gateway may drain for 35 s and the node for 10 s; then the supervisor kills them
REPLY_S = 30.0  # as long as the gateway gives an ordinary request
RECV_BYTES = 256 * 1024  # of one read: a hundred vectors
HEAD_END = b"\r\n\r\n"

Address = tuple[str, int] | Path
"""Host and port, or the path of a Unix socket."""


class Reply(NamedTuple):
    """What came back. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str | None:
        """The `code` of the error envelope; None for a success."""
        return None if self.status == 200 else self.json()["error"]["code"]


class Wire:
    """One keep-alive connection. Raises OSError (TimeoutError when late), EOFError when the other side closes."""

    def __init__(self, address: Address, timeout_s: float = REPLY_S) -> None:
        self._timeout_s = timeout_s
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            self._socket.close()
            raise
        if family == socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> Reply:
        """Send all, read one reply; the deadline is for both together."""
        return self.receive(self.send(request))

    def send(self, data: bytes) -> float:
        """Send bytes of any kind. Returns the deadline of their reply, on the monotonic clock."""
        deadline = time.monotonic() + self._timeout_s
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(data)
        return deadline

    def receive(self, deadline: float) -> Reply:
        """One whole reply with a Content-Length. Raises EOFError if the connection ends before its last byte."""
        data = b""
        while (end := data.find(HEAD_END)) < 0:
            data += self._read(deadline)
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        chunks, missing = [data[end + 4 :]], int(headers["content-length"]) - (len(data) - end - 4)
        while missing > 0:
            chunks.append(self._read(deadline))
            missing -= len(chunks[-1])
        return Reply(int(first.split(" ", 2)[1]), headers, b"".join(chunks))

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, deadline: float) -> bytes:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the reply is late")
        self._socket.settimeout(remaining_s)
        data = self._socket.recv(RECV_BYTES)
        if not data:
            raise EOFError("the connection was closed before the reply's last byte")
        return data


def http_request(
    method: str, path: str, body: bytes = b"", *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A whole HTTP/1.1 request; a body is said to be JSON unless `headers` says otherwise."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), "Content-Type": "application/json"}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    fields |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + HEAD_END + body


@dataclass(frozen=True)
class Live:
    """A running `serve`. `log` is what it and its children wrote to standard error."""

    process: "subprocess.Popen[bytes]"
    base_url: str
    credentials: Credentials
    data_dir: Path
    log: Path
    environment: Mapping[str, str]

    @property
    def store(self) -> str | Path:
        """Where its store is."""
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

    def gateways(self) -> list[int]:
        """The process ids of those that live now: one for each of `--workers`."""
        return [pid for pid, (parent, name) in _processes().items() if (parent, name) == (self.process.pid, "gateway")]

    def pids(self) -> dict[str, int]:
        """Those of `gateway` (one of them), `node` and `worker` that live now."""
        table = _processes()
        children = {name: pid for pid, (parent, name) in table.items() if parent == self.process.pid}
        workers = {name: pid for pid, (parent, name) in table.items() if parent == children.get("node")}
        return {name: pid for name, pid in (children | workers).items() if name in ("gateway", "node", "worker")}

    def resident_mb(self) -> dict[str, float]:
        """Resident memory in MB (1e6 bytes) by process; a moment between two processes' lives leaves one out."""
        found = {}
        for name, pid in self.pids().items():
            with suppress(OSError):
                pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
                found[name] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6
        return found

    def stop(self) -> int:
        """SIGTERM, then wait until it has drained; its exit code. Raises TimeoutExpired. May be called twice."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_S)


@contextmanager
def serving(
    arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None, *, start_s: float = START_S
) -> Iterator[Live]:
    """A `serve` on a free port, with a new data directory that is removed in the end. Raises RuntimeError."""
    environment = environment or {}
    with tempfile.TemporaryDirectory(prefix="embedmesh-live-") as folder:
        data_dir, log = Path(folder) / "data", Path(folder) / "log"
        command = [sys.executable, "-m", "embedmesh", "serve", "--json", "--port", "0", "--data-dir", str(data_dir)]
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMESH_")}
        kept |= {name: value for name, value in os.environ.items() if name == "EMBEDMESH_ASSETS_DIR"}
        kept |= environment
        with log.open("wb") as errors:
            process = subprocess.Popen([*command, *arguments], env=kept, stdout=subprocess.PIPE, stderr=errors)
        watchdog = _kill_after(process, start_s)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            watchdog.cancel()
            if not line:
                raise RuntimeError(f"serve did not become ready: {log.read_text(errors='replace')[-2000:]}")
            ready = msgspec.json.decode(line)
            credentials = msgspec.json.decode(Path(ready["bootstrap"]).read_bytes(), type=Credentials)
            live = Live(process, ready["base_url"], credentials, data_dir, log, environment)
            yield live
            live.stop()
        finally:
            watchdog.cancel()
            if process.poll() is None:
                process.kill()  # its children end by themselves: their lifeline closes
                process.wait(STOP_S)
            if process.stdout is not None:
                process.stdout.close()


def _kill_after(process: "subprocess.Popen[bytes]", seconds: float) -> Timer:
    """So that waiting for its first line ends even if it never writes one."""
    timer = Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _processes() -> dict[int, tuple[int, str]]:
    """Process id -> its parent's, and `gateway`, `node` or `worker` by its command line (else an empty name)."""
    table = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        with suppress(OSError):  # it has just ended
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            table[int(folder.name)] = (parent, _name(words))
    return table


def _name(words: Sequence[str]) -> str:
    if "embedmesh.engine.worker" in words:
        return "worker"
    after = words[words.index("embedmesh") + 1 :] if "embedmesh" in words else []
    return after[0] if after else ""
