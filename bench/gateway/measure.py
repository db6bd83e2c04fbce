"""One gateway at a time under load, on a core of its own; those who ask and the node share another."""

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.gateway.material import Material

GATEWAY_CORE, OTHER_CORE = 0, 1
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
STOP_S = 40.0


class Load(msgspec.Struct):
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

    load: Load
    cpu_us: float  # of all its processes, per right answer
    rss_mb: float


@contextmanager
def running(
    command: Sequence[str], log: Path, *, core: int, env: dict[str, str] | None = None, pass_fds: tuple[int, ...] = ()
) -> Iterator[int]:
    """A program on one core; its process id. It ends with the block."""
    pinned = ["taskset", "--cpu-list", str(core), *command]
    with log.open("ab") as out:
        process = subprocess.Popen(
            pinned,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env=os.environ | (env or {}),
            start_new_session=True,
            pass_fds=pass_fds,
        )
    try:
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


class Ends:
    """The program `ends`: see ends.c."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process

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
        asked = (port, connections, warm_s, seconds, rate, requests, expected)
        self._process.stdin.write((" ".join(map(str, asked)) + "\n").encode())
        self._process.stdin.flush()
        time.sleep(warm_s)
        family = [one for pid in pids for one in family_of(pid)]
        before, begun = cpu_s(family), time.monotonic()
        time.sleep(seconds)
        used, took = cpu_s(family) - before, time.monotonic() - begun
        rss = sum(map(rss_bytes, family))
        load = msgspec.json.decode(self._process.stdout.readline(), type=Load)
        return Measured(load, used / took * load.seconds / max(1, load.right) * 1e6, rss / 1e6)


@contextmanager
def ends(program: Path, place: int | Path, material: Material, inputs: int = 1) -> Iterator[Ends]:
    """Started, with its node at a port or a path; peers are answered with so many vectors."""
    files = (material.folder / "vector", material.folder / "models", material.reply(inputs))
    command = ["taskset", "--cpu-list", str(OTHER_CORE), str(program), str(place), *map(str, files)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Ends(process)
        process.kill()


def cpu_s(pids: Sequence[int]) -> float:
    """Processor seconds that processes have used: their own, user and system."""
    total = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / TICKS


def family_of(pid: int) -> list[int]:
    """A process and all that descend from it."""
    below = [one for child in _children(pid) for one in family_of(child)]
    return [pid, *below]


def _children(pid: int) -> list[int]:
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in found for child in text.split()]


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE_BYTES
