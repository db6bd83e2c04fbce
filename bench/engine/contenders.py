"""Who is measured: each in its own process, with the same threads, asked in the same way.

A `Runner` has the texts in its process (runner.py); a `Server` gets them over HTTP, CALL_TEXTS a call and CALLS_AT_ONCE
calls at once, as a bulk client would send them. A server's requests are written before the clock starts and its replies
are read to the last byte but not decoded: the client's work is not the server's.
"""

import base64
import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from bench.live import Address, Reply, Wire, http_request

Vectors = npt.NDArray[np.float32]

START_S = 120.0  # a cold import of torch on a busy disk
ANSWER_S = 120.0  # of one corpus; the slowest peer needs ten seconds
POLL_S = 0.002  # between two looks whether a server is there
CALL_TEXTS = 64
CALLS_AT_ONCE = 4  # as many as `embedmesh embed` keeps in flight
STOP_S = 15.0
LOG_WORDS_MAX = 300
FIRST = "How long does it take from nothing to a first vector?"
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}


class Broke(Exception):
    """A contender did not start, or stopped answering; in words."""


class Contender(Protocol):
    """What can be measured. All may raise Broke."""

    name: str
    start_s: float  # from the start of its process to a first vector
    version: str

    def seconds(self, texts: Sequence[str]) -> float:
        """From texts to vectors."""

    def singles(self, texts: Sequence[str]) -> list[float]:
        """Seconds of each text alone, one after the other."""

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), width], in order."""

    def memory_mb(self) -> tuple[float, float]:
        """Memory of all its processes, and how much of it is anonymous, in MB (1e6 bytes)."""

    def stop(self) -> None:
        """End its processes."""


class Process:
    """A child and its children, with what they say on standard error kept for when they break."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str], threads: int, **pipes: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self.begun = time.perf_counter()
        self.popen = subprocess.Popen(
            command, env={**os.environ, **QUIET, **counts, **environ}, stderr=self._log, start_new_session=True, **pipes
        )

    def broke(self, what: str) -> Broke:
        """The exception to raise, with the last line of the log."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return Broke(f"{what}; it said: {lines[-1][:LOG_WORDS_MAX] if lines else 'nothing'}")

    def memory_mb(self) -> tuple[float, float]:
        """Resident, and of that anonymous, of the child and whatever it started, in MB (1e6 bytes).

        A page that several processes share counts once: each has its part of it (PSS).
        """
        resident = anonymous = 0
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError):  # no process, or it has just ended
                if os.getsid(int(folder.name)) == self.popen.pid:
                    lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
                    kb = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
                    resident, anonymous = resident + kb["Pss"], anonymous + kb["Pss_Anon"]
        return resident * 1.024e-3, anonymous * 1.024e-3

    def stop(self) -> None:
        """Ask it to end, then make it."""
        self.popen.terminate()
        try:
            self.popen.wait(STOP_S)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)  # its own group: start_new_session
            self.popen.wait()
        self._log.close()


class Runner:
    """A contender that is given texts in its own process."""

    def __init__(
        self, name: str, python: Path, kind: str, folder: Path, threads: int, environ: Mapping[str, str] | None = None
    ) -> None:
        """Starts it, and waits for its first vector."""
        self.name = name
        script = str(Path(__file__).with_name("runner.py"))
        command = [str(python), "-P", script, kind, str(folder), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._process = Process(command, environ or {}, threads, **pipes)
        try:
            self.version: str = self._receive(START_S)["version"]
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - self._process.begun

    def seconds(self, texts: Sequence[str]) -> float:
        return float(self._ask(texts=texts)["seconds"])

    def singles(self, texts: Sequence[str]) -> list[float]:
        return [float(each) for each in self._ask(texts=texts, each=True)["seconds"]]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        data = base64.b64decode(self._ask(texts=texts, vectors=True)["vectors"])
        return np.frombuffer(data, "<f4").reshape(len(texts), -1)

    def memory_mb(self) -> tuple[float, float]:
        return self._process.memory_mb()

    def stop(self) -> None:
        self._process.stop()

    def _ask(self, **asked: Any) -> dict[str, Any]:
        stdin = self._process.popen.stdin
        assert stdin is not None
        try:
            stdin.write(msgspec.json.encode(asked) + b"\n")
            stdin.flush()
        except OSError:
            raise self._process.broke("it has ended") from None
        return self._receive(ANSWER_S)

    def _receive(self, within_s: float) -> dict[str, Any]:
        stdout = self._process.popen.stdout
        assert stdout is not None
        watchdog = threading.Timer(within_s, self._process.popen.kill)
        watchdog.start()
        try:
            line = stdout.readline()
        finally:
            watchdog.cancel()
        if not line:
            raise self._process.broke("it has ended or was too slow")
        answer: dict[str, Any] = msgspec.json.decode(line)
        return answer


class Server:
    """A contender that is asked over HTTP, in the OpenAI form."""

    def __init__(
        self, name: str, version: str, command: Sequence[str], address: Address, path: str, model: str, threads: int
    ) -> None:
        """Starts it, and waits for its first vector. `path` is that of its embeddings."""
        self.name, self.version, self.address = name, version, address
        self._path, self._model = path, model
        self._process = Process(command, {}, threads, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - self._process.begun

    def request(self, texts: Sequence[str]) -> bytes:
        """One call, as bytes."""
        body = msgspec.json.encode({"model": self._model, "input": list(texts), "encoding_format": "base64"})
        return http_request("POST", self._path, body)

    def ask(self, wire: Wire, request: bytes) -> Reply:
        """One reply. Raises Broke unless it is a 200."""
        try:
            reply = wire.ask(request)
        except (OSError, EOFError) as error:
            raise self._process.broke(f"it does not answer ({type(error).__name__})") from None
        if reply.status != 200:
            raise self._process.broke(f"it answered {reply.status}")
        return reply

    def seconds(self, texts: Sequence[str]) -> float:
        return self._calls(texts)[0]

    def singles(self, texts: Sequence[str]) -> list[float]:
        times = []
        with Wire(self.address, ANSWER_S) as wire:
            for request in [self.request([text]) for text in texts]:
                begun = time.perf_counter()
                self.ask(wire, request)
                times.append(time.perf_counter() - begun)
        return times

    def vectors(self, texts: Sequence[str]) -> Vectors:
        items = [item for reply in self._calls(texts)[1] for item in reply.json()["data"]]
        return np.array([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in items])

    def memory_mb(self) -> tuple[float, float]:
        return self._process.memory_mb()

    def stop(self) -> None:
        self._process.stop()

    def _calls(self, texts: Sequence[str]) -> tuple[float, list[Reply]]:
        """All texts, over several connections at once: seconds, and the replies in order.

        The connections are new, because some servers close those that were idle for some seconds.
        """
        requests = [self.request(texts[at : at + CALL_TEXTS]) for at in range(0, len(texts), CALL_TEXTS)]
        replies: list[Reply | None] = [None] * len(requests)
        left = iter(range(len(requests)))
        failed: list[Broke] = []

        def work(wire: Wire) -> None:
            with suppress(StopIteration):
                while True:
                    at = next(left)
                    try:
                        replies[at] = self.ask(wire, requests[at])
                    except Broke as broke:
                        failed.append(broke)
                        return

        with contextlib.ExitStack() as ending:
            wires = [ending.enter_context(Wire(self.address, ANSWER_S)) for _ in range(CALLS_AT_ONCE)]
            threads = [threading.Thread(target=work, args=(wire,)) for wire in wires]
            begun = time.perf_counter()
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            seconds = time.perf_counter() - begun
        if failed:
            raise failed[0]
        return seconds, [reply for reply in replies if reply is not None]

    def _wait(self) -> None:
        """Until a first text was answered."""
        request, until = self.request([FIRST]), time.monotonic() + START_S
        while time.monotonic() < until and self._process.popen.poll() is None:
            with suppress(OSError, EOFError), Wire(self.address, START_S) as wire:
                if wire.ask(request).status == 200:
                    return
            time.sleep(POLL_S)
        raise self._process.broke("it did not become ready")


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
