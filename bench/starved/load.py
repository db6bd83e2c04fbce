"""Callers that send 64 texts a request and check every vector, and faults of the engine that are timed."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from random import Random

import msgspec
import numpy as np

from bench.rig.http import Reply, Wire, http_request
from bench.rig.live import Live
from bench.rig.processes import is_alive, wait_for
from embedmesh.rules.limits import REQUEST_MAX_S, REQUEST_MIN_S

TEXTS, REQUESTS = 64, 8  # of a request, and how many requests are different
WORDS = ("a", "river", "runs", "through", "the", "old", "town", "where", "people", "sell", "bread", "fish", "apples")
SAME = 1e-5  # between two batches with other neighbours
WORKER_S = 60.0  # until an engine that is being replaced has a process
SEED = 20_261_129


class Answers(msgspec.Struct):
    """What callers got."""

    right: int = 0
    late: int = 0  # 504, once the request's own time had passed
    wrong: int = 0  # vectors that are not those of a quiet machine
    refused: Counter[str] = msgspec.field(default_factory=Counter)  # anything else, by status and code
    slowest_s: float = 0.0


class BulkCallers:
    """Send requests to a live endpoint. The right vectors are those that it gives when nothing disturbs it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        dice = Random(SEED)
        texts = [[" ".join(dice.choices(WORDS, k=dice.randint(3, 9))) for _ in range(TEXTS)] for _ in range(REQUESTS)]
        self._requests = [live.embed({"input": each, "encoding_format": "base64"}) for each in texts]
        self._right = [self._ask(request)[1].vectors() for request in self._requests]

    def run(self, callers: int, seconds: float) -> Answers:
        """`callers` at once, each sends request after request until `seconds` have passed; at least one."""
        answers = Answers()
        ends = time.monotonic() + seconds
        with ThreadPoolExecutor(callers) as threads:
            for future in [threads.submit(self._call, number, ends, answers) for number in range(callers)]:
                future.result()
        return answers

    def _call(self, number: int, ends: float, answers: Answers) -> None:
        while True:
            which = number % len(self._requests)
            try:
                spent_s, reply = self._ask(self._requests[which])
            except (OSError, EOFError) as error:
                answers.refused[type(error).__name__] += 1
            else:
                answers.slowest_s = max(answers.slowest_s, spent_s)
                self._note(answers, which, reply, spent_s)
            number += 1
            if time.monotonic() >= ends:
                return

    def _ask(self, request: bytes) -> tuple[float, Reply]:
        with Wire(self._live.address, REQUEST_MAX_S) as wire:
            return wire.timed(request)

    def _note(self, answers: Answers, which: int, reply: Reply, spent_s: float) -> None:
        if reply.status == 200:
            right = bool(np.abs(reply.vectors() - self._right[which]).max() <= SAME)
            answers.right += right
            answers.wrong += not right
        elif reply.status == 504 and spent_s >= REQUEST_MIN_S:
            answers.late += 1
        else:
            answers.refused[reply.outcome] += 1


FAULTS = {"SIGSTOP": signal.SIGSTOP, "endless loop": signal.SIGUSR1, "hang": signal.SIGUSR2}
STARTS = "embedmesh_node_engine_starts_total{"


def found_s(live: Live, fault: str, within_s: float) -> float:
    """Break the engine's process: seconds until it is ended, or more than `within_s` where it was not by then."""
    wait_for(lambda: "worker" in live.pids(), WORKER_S)  # while it is being replaced
    pid = live.pids()["worker"]
    began = time.monotonic()
    os.kill(pid, FAULTS[fault])
    wait_for(lambda: not is_alive(pid), within_s)
    return time.monotonic() - began


def starts(live: Live) -> int:
    """How often the node has started its engine."""
    with Wire(live.node_socket, REQUEST_MAX_S) as wire:
        page = wire.ask(http_request("GET", "/metrics")).body.decode()
    return sum(int(float(line.split()[-1])) for line in page.splitlines() if line.startswith(STARTS))


def reasons(live: Live) -> list[str]:
    """Why /readyz does not say 200."""
    with live.wire(REQUEST_MAX_S) as wire:
        return list(wire.ask(http_request("GET", "/readyz")).json()["reasons"])
