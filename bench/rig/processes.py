"""Child processes: start them, wait for them, look at them, end them; and threads that work meanwhile."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
STOP_S = 40.0  # a gateway drains for 30
POLL_S = 0.005
LOG_SHOWN_CHARS = 2_000  # the end of a log, where something did not start
TICKS = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
EMBEDMESH = (sys.executable, "-m", "embedmesh")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "CUDA_VISIBLE_DEVICES": "",
}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port


def clean_environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Ours without embedmesh's settings, but for where its assets are."""
    names = (name for name in os.environ if not name.startswith("EMBEDMESH_") or name == "EMBEDMESH_ASSETS_DIR")
    return {name: os.environ[name] for name in names} | dict(more or {})


class Process:
    """A child, in a session of its own. Use it as a context manager: it ends with the block.

    What it says goes to the file `log`. `environment` is added to ours, in which nothing is about embedmesh. `core` is
    the one core that it runs on.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        core: int | None = None,
        stop_s: float = STOP_S,
        own_session: bool = True,
        **popen: Any,
    ) -> None:
        pinned = ["taskset", "--cpu-list", str(core)] if core is not None else []
        self.log, self._stop_s, self._own_session = log, stop_s, own_session
        self.begun = time.perf_counter()
        with log.open("ab") as out:
            defaults: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
            self.popen: subprocess.Popen[bytes] = subprocess.Popen(
                [*pinned, *command],
                env=clean_environment(environment),
                start_new_session=own_session,
                **(defaults | popen),
            )
        self.pid = self.popen.pid

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.popen.poll() is None

    def log_tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-LOG_SHOWN_CHARS:]

    def memory_mb(self) -> tuple[float, float]:
        """As `memory_mb_of`, of all processes of its session."""
        found = []
        for folder in Path("/proc").iterdir():
            with suppress(OSError, ValueError):  # no process, or it has just ended
                if os.getsid(int(folder.name)) == self.pid:
                    found.append(int(folder.name))
        return memory_mb_of(found)

    def kill(self) -> None:
        """kill -9, with all that is in its session."""
        if self._own_session:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self.popen.kill()
        self.popen.wait()

    def stop(self) -> None:
        """SIGTERM; kill -9 if it does not end in time."""
        self.popen.terminate()
        try:
            self.popen.wait(self._stop_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_for(ready: Callable[[], Any], within_s: float, lives: Callable[[], bool] = lambda: True) -> bool:
    """Poll until `ready` is true, without OSError or EOFError; False where it is late, or the process has ended."""
    until = time.monotonic() + within_s
    while time.monotonic() < until and lives():
        with suppress(OSError, EOFError):
            if ready():
                return True
        time.sleep(POLL_S)
    return False


@contextmanager
def meanwhile(*works: Callable[[threading.Event], object]) -> Iterator[threading.Event]:
    """A thread for each of `works`. At the end of the block the event is set, and they are waited for."""
    stop = threading.Event()
    threads = [threading.Thread(target=work, args=(stop,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    try:
        yield stop
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: the state, the parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def is_alive(pid: int) -> bool:
    """Whether a process runs, and is not merely waiting to be reaped."""
    try:
        return _stat(pid)[0] not in "ZX"
    except (OSError, IndexError):
        return False


def kill(pid: int) -> None:
    """kill -9; returns when the process is dead."""
    os.kill(pid, signal.SIGKILL)
    while is_alive(pid):
        time.sleep(POLL_S)


def children_of(pid: int) -> list[int]:
    """Of all its threads."""
    found = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for text in found for child in text.split()]


def family_of(*pids: int) -> list[int]:
    """Processes and all their descendants."""
    return [one for pid in pids for one in (pid, *family_of(*children_of(pid)))]


@contextmanager
def before_others(*pids: int) -> Iterator[None]:
    """Processes, their descendants and this one run before all other work of the machine. Raises PermissionError."""
    threads = [
        int(path.name) for pid in (os.getpid(), *family_of(*pids)) for path in Path(f"/proc/{pid}/task").iterdir()
    ]
    _set_policy(threads, os.SCHED_RR, 1)
    try:
        yield
    finally:
        _set_policy(threads, os.SCHED_OTHER, 0)


def _set_policy(threads: Iterable[int], policy: int, priority: int) -> None:
    for thread in threads:
        with suppress(ProcessLookupError):
            os.sched_setscheduler(thread, policy, os.sched_param(priority))


def cpu_s(pids: Iterable[int]) -> float:
    """Processor seconds that processes have used: their own, user and system."""
    return sum(int(ticks) for pid in pids for ticks in _stat(pid)[11:13]) / TICKS


class OtherWork:
    """What processes other than this one and its descendants have worked since it was made, on the whole machine."""

    def __init__(self) -> None:
        self._begun, self._ours_s, self._all_s = time.perf_counter(), _our_cpu_s(), _machine_cpu_s()

    def seconds(self) -> tuple[float, float]:
        """Of processor time: ours, and others'. In clock ticks, so that of a short time it says little.

        A descendant that has ended since counts as another.
        """
        ours_s = _our_cpu_s() - self._ours_s
        return ours_s, max(0.0, _machine_cpu_s() - self._all_s - ours_s)

    def share(self) -> float:
        """Others' share of all cores' time, 0 to 1."""
        return self.seconds()[1] / ((time.perf_counter() - self._begun) * (os.cpu_count() or 1))


def _our_cpu_s() -> float:
    return cpu_s(set(family_of(os.getpid())))


def _machine_cpu_s() -> float:
    """Processor seconds since the machine started that were not idle: user, nice, system, irq, softirq, steal."""
    ticks = [int(each) for each in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / TICKS


def memory_mb_of(pids: Iterable[int]) -> tuple[float, float]:
    """Resident, and of that anonymous, of processes together, in MB (1e6 bytes).

    A page that several processes share counts once: each has its part of it (PSS). One that has ended has none.
    """
    resident = anonymous = 0
    for pid in pids:
        with suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
            kb = {name: int(value.split()[0]) for name, value in (line.split(":") for line in lines)}
            resident, anonymous = resident + kb["Pss"], anonymous + kb["Pss_Anon"]
    return resident * 1.024e-3, anonymous * 1.024e-3


def rss_mb(pids: Iterable[int]) -> float:
    """Resident memory of processes together, in MB (1e6 bytes)."""
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * PAGE_BYTES / 1e6


def open_files(pids: Iterable[int]) -> int:
    """How many files processes have open."""
    return sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in pids)
