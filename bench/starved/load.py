"""Callers of 64 texts a request who check every vector, and faults of the engine that are timed."""

import base64
import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import msgspec
import numpy as np

from bench.live import Live, Wire, http_request
from embedmesh.rules.limits import REQUEST_MAX_S, REQUEST_MIN_S

TEXTS, REQUESTS = 64, 8  # of a request, and how many requests are different
WORDS = ("a", "river", "runs", "through", "the", "old", "town", "where", "people", "sell", "bread", "fish", "apples")
SAME = 1e-5  # between two batches with other neighbours
LOOK_S = 0.02
SEED = 20_261_129


class Told(msgspec.Struct):
    """What callers were told."""

    answered: int = 0
    late: int = 0  # 504, once the request's own time had passed
    wrong: int = 0  # vectors that are not those of a quiet machine
    refused: Counter[str] = msgspec.field(default_factory=Counter)  # anything else, by status and code
    slowest_s: float = 0.0


class Callers:
    """Ask a live endpoint. The right vectors are those that it gives when nothing disturbs it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        dice = Random(SEED)
        texts = [[" ".join(dice.choices(WORDS, k=dice.randint(3, 9))) for _ in range(TEXTS)] for _ in range(REQUESTS)]
        self._requests = [live.embed({"input": each, "encoding_format": "base64"}) for each in texts]
        self._right = [_vectors(self._ask(request)[1]) for request in self._requests]

    def run(self, callers: int, seconds: float) -> Told:
        """So many at once, each request after request until so much time has passed."""
        told = Told()
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(callers) as threads:
            for future in [threads.submit(self._call, number, ends, told) for number in range(callers)]:
                future.result()
        return told

    def once(self) -> Told:
        """One request."""
        return self.run(1, 0.0)

    def _call(self, number: int, ends: float, told: Told) -> None:
        while True:
            which = number % len(self._requests)
            began = time.monotonic()
            try:
                status, body = self._ask(self._requests[which])
            except (OSError, EOFError) as error:
                told.refused[type(error).__name__] += 1
            else:
                spent_s = time.monotonic() - began
                told.slowest_s = max(told.slowest_s, spent_s)
                self._note(told, which, status, body, spent_s)
            number += 1
            if time.monotonic() >= ends:
                return

    def _ask(self, request: bytes) -> tuple[int, bytes]:
        with Wire(self._live.address, REQUEST_MAX_S) as wire:
            reply = wire.ask(request)
            return reply.status, reply.body

    def _note(self, told: Told, which: int, status: int, body: bytes, spent_s: float) -> None:
        if status == 200:
            right = bool(np.abs(_vectors(body) - self._right[which]).max() <= SAME)
            told.answered += right
            told.wrong += not right
        elif status == 504 and spent_s >= REQUEST_MIN_S:
            told.late += 1
        else:
            told.refused[f"{status} {msgspec.json.decode(body)['error']['code']}"] += 1


def _vectors(body: bytes) -> np.ndarray:
    """[TEXTS, width]."""
    rows = [base64.b64decode(item["embedding"]) for item in msgspec.json.decode(body)["data"]]
    return np.frombuffer(b"".join(rows), "<f4").reshape(TEXTS, -1)


FAULTS = {"SIGSTOP": signal.SIGSTOP, "endless loop": signal.SIGUSR1, "hang": signal.SIGUSR2}


def found_s(live: Live, fault: str, within_s: float) -> float:
    """Break the engine's process: seconds until it is ended, or `within_s` where it was not by then."""
    pid = worker(live)
    began = time.monotonic()
    os.kill(pid, FAULTS[fault])
    while time.monotonic() - began < within_s and _lives(pid):
        time.sleep(LOOK_S)
    return time.monotonic() - began


def worker(live: Live) -> int:
    """The engine's process id; waits for it while it is being replaced."""
    while (pid := live.pids().get("worker")) is None:
        time.sleep(LOOK_S)
    return pid


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def starts(live: Live) -> int:
    """How often the node has started its engine."""
    with Wire(live.node_socket, REQUEST_MAX_S) as wire:
        page = wire.ask(http_request("GET", "/metrics")).body.decode()
    return sum(int(float(line.split()[-1])) for line in page.splitlines() if line.startswith(STARTS))


STARTS = "embedmesh_node_engine_starts_total{"


def reasons(live: Live) -> list[str]:
    """What /readyz gives."""
    with live.wire(REQUEST_MAX_S) as wire:
        return list(msgspec.json.decode(wire.ask(http_request("GET", "/readyz")).body)["reasons"])
