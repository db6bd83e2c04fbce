"""One gateway at a time under load, on a core of its own; the clients and the node share another."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path

import msgspec

from bench.gateway.material import Material
from bench.rig.processes import cpu_s, family_of, rss_mb

GATEWAY_CORE, OTHER_CORE = 0, 1


class EndsReport(msgspec.Struct):
    """What `ends` says of one load."""

    right: int
    wrong: int
    refused: int
    broken: int
    seconds: float
    p50_us: float
    p90_us: float
    p99_us: float
    p999_us: float
    max_us: float

    @property
    def per_s(self) -> float:
        """Right answers a second."""
        return self.right / self.seconds

    @property
    def bad(self) -> int:
        """Answers that were not right."""
        return self.wrong + self.refused + self.broken


class Measured(msgspec.Struct):
    """One run against one program."""

    load: EndsReport
    cpu_us: float  # of all its processes, per right answer; infinite where there was none
    rss_mb: float


class Ends:
    """The program `ends`: see ends.c."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.pid = process.pid

    def ask(
        self,
        port: int,
        requests: Path,
        expected: Path,
        pids: Sequence[int],
        *,
        connections: int = 32,
        warm_s: float = 1.0,
        seconds: float = 4.0,
        rate: float = 0.0,
    ) -> Measured:
        """Load one port, and read what the processes `pids` and their children used meanwhile."""
        assert self._process.stdin is not None and self._process.stdout is not None
        options = (port, connections, warm_s, seconds, rate, requests, expected)
        self._process.stdin.write((" ".join(map(str, options)) + "\n").encode())
        self._process.stdin.flush()
        time.sleep(warm_s)
        family = family_of(*pids)
        before, begun = cpu_s(family), time.monotonic()
        time.sleep(seconds)
        used, took = cpu_s(family) - before, time.monotonic() - begun
        resident_mb = rss_mb(family)
        load = msgspec.json.decode(self._process.stdout.readline(), type=EndsReport)
        cpu_us = used / took * load.seconds / load.right * 1e6 if load.right else inf
        return Measured(load, cpu_us, resident_mb)


@contextmanager
def ends(nodes: Sequence[int | Path], material: Material, inputs: int = 1, *, floats: bool = False) -> Iterator[Ends]:
    """Started, with nodes at these ports or paths; peers are answered with `inputs` vectors."""
    files = (material.folder / "vector", material.folder / "models", material.reply(inputs, floats=floats))
    places = ",".join(map(str, nodes))
    command = ["taskset", "--cpu-list", str(OTHER_CORE), str(material.program), places, *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Ends(process)
        process.kill()
