"""The contenders: each in its own process, with the same threads and the same work.

A `Runner` has the texts in its process (runner.py); a `Server` gets them over HTTP, CALL_TEXTS a call and CALLS_AT_ONCE
calls at once, as a bulk client would send them. A server's requests are written before the clock starts and its replies
are read to the last byte but not decoded: the client's work is not the server's.
"""

import base64
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import numpy as np

from bench.rig.command import CannotRun
from bench.rig.http import MODEL, Address, Reply, Vectors, Wire, embedding_request
from bench.rig.processes import QUIET, Process, wait_for

START_S = 120.0  # a cold import of torch on a busy disk
ANSWER_S = 120.0  # of one corpus; the slowest peer needs ten seconds
CALL_TEXTS = 64
CALLS_AT_ONCE = 4  # as many as `embedmesh embed` keeps in flight
STOP_S = 15.0
LOG_WORDS_MAX = 300
FIRST = "How long does it take from nothing to a first vector?"


class Broke(CannotRun):
    """A contender did not start, or stopped answering; in words."""


class Contender:
    """What can be measured, in a process of its own. All methods may raise Broke.

    `takes_tokens`: what its model takes of a text; longer ones it is not asked for. `answer_s`: for one piece of work.
    """

    takes_tokens = 512
    answer_s = ANSWER_S

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        threads: int,
        environment: Mapping[str, str],
        **pipes: Any,
    ) -> None:
        """Starts it, and waits for its first vector. `folder` is for its log."""
        self.name = name
        counts = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        self._process = Process(
            command, folder / f"{name}.log", environment={**QUIET, **counts, **environment}, stop_s=STOP_S, **pipes
        )
        self.memory_mb, self.stop, self.pid = self._process.memory_mb, self._process.stop, self._process.pid
        try:
            self.version = self._wait()
        except BaseException:
            self.stop()
            raise
        self.start_s = time.perf_counter() - self._process.begun  # to its first vector

    def seconds(self, texts: Sequence[str]) -> float:
        """From texts to vectors."""
        raise NotImplementedError

    def singles(self, texts: Sequence[str]) -> list[float]:
        """Seconds of each text alone, one after the other."""
        raise NotImplementedError

    def vectors(self, texts: Sequence[str]) -> Vectors:
        """[len(texts), width], in order."""
        raise NotImplementedError

    def _wait(self) -> str:
        """Until its first vector; its version."""
        raise NotImplementedError

    def _broke(self, what: str) -> NoReturn:
        lines = self._process.log_tail().strip().splitlines()
        raise Broke(f"{what}; its log ends: {lines[-1][:LOG_WORDS_MAX] if lines else 'nothing'}")


class Runner(Contender):
    """A contender that is given texts in its own process."""

    def __init__(
        self,
        name: str,
        python: Path,
        kind: str,
        model: Path,
        folder: Path,
        threads: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts it, and waits for its first vector. `folder` is for its log."""
        script = str(Path(__file__).with_name("runner.py"))
        command = [str(python), "-P", script, kind, str(model), str(threads)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        super().__init__(name, command, folder, threads, environment or {}, **pipes)

    def seconds(self, texts: Sequence[str]) -> float:
        return float(self._ask(texts=texts)["seconds"])

    def singles(self, texts: Sequence[str]) -> list[float]:
        return [float(each) for each in self._ask(texts=texts, each=True)["seconds"]]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        data = base64.b64decode(self._ask(texts=texts, vectors=True)["vectors"])
        return np.frombuffer(data, "<f4").reshape(len(texts), -1)

    def _wait(self) -> str:
        return str(self._receive(START_S)["version"])

    def _ask(self, **work: Any) -> dict[str, Any]:
        stdin = self._process.popen.stdin
        assert stdin is not None
        try:
            stdin.write(msgspec.json.encode(work) + b"\n")
            stdin.flush()
        except OSError:
            self._broke("it has ended")
        return self._receive(self.answer_s)

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
            self._broke("it has ended or was too slow")
        answer: dict[str, Any] = msgspec.json.decode(line)
        return answer


class Server(Contender):
    """A contender that gets requests over HTTP, in the OpenAI form."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        address: Address,
        folder: Path,
        threads: int,
        path: str = "/v1/embeddings",
    ) -> None:
        """Starts it, and waits for its first vector. `folder` is for its log, `path` that of its embeddings."""
        self.address, self._path = address, path
        super().__init__(name, command, folder, threads, {}, stdout=subprocess.DEVNULL)

    def request(self, texts: Sequence[str]) -> bytes:
        """One call, as bytes."""
        return embedding_request(list(texts), path=self._path, model=MODEL)

    def ask(self, wire: Wire, request: bytes) -> tuple[float, Reply]:
        """Seconds, and the reply. Raises Broke unless it is a 200."""
        try:
            seconds, reply = wire.timed(request)
        except (OSError, EOFError) as error:
            self._broke(f"it does not answer ({type(error).__name__})")
        if reply.status != 200:
            self._broke(f"it answered {reply.status}")
        return seconds, reply

    def seconds(self, texts: Sequence[str]) -> float:
        return self._calls(texts)[0]

    def singles(self, texts: Sequence[str]) -> list[float]:
        requests = [self.request([text]) for text in texts]
        with Wire(self.address, self.answer_s) as wire:
            return [self.ask(wire, request)[0] for request in requests]

    def vectors(self, texts: Sequence[str]) -> Vectors:
        return np.concatenate([reply.vectors() for reply in self._calls(texts)[1]])

    def _calls(self, texts: Sequence[str]) -> tuple[float, list[Reply]]:
        """All texts, over several connections at once: seconds, and the replies in order.

        The connections are new, because some servers close those that were idle for some seconds.
        """
        requests = [self.request(texts[at : at + CALL_TEXTS]) for at in range(0, len(texts), CALL_TEXTS)]
        wires = [Wire(self.address, self.answer_s) for _ in range(CALLS_AT_ONCE)]
        try:
            with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
                free = wires.copy()

                def call(request: bytes) -> Reply:
                    wire = free.pop()
                    reply = self.ask(wire, request)[1]
                    free.append(wire)
                    return reply

                begun = time.perf_counter()
                replies = list(pool.map(call, requests))
                return time.perf_counter() - begun, replies
        finally:
            for wire in wires:
                wire.close()

    def _wait(self) -> str:
        request = self.request([FIRST])

        def answers() -> bool:
            with Wire(self.address, START_S) as wire:
                return wire.ask(request).status == 200

        if not wait_for(answers, START_S, lambda: self._process.lives):
            self._broke("it did not become ready")
        return ""
