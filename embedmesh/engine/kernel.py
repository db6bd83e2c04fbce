"""What Linux says of a process: its threads' states, its CPU time, its group's quota, and kills for lack of memory.

Everything here is read from /proc and /sys, in some ten microseconds a file. Where these are missing (another system, a
sandbox) the answers are None and 0.
"""

import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from embedmesh.engine.watch import Sample

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
THREADS_MAX = 256  # of a process that are read: one a core, and a few
CGROUPS_MAX = 12  # a quota may be set on a group above: container, pod, slice
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
NS_PER_S = 1e9
OOM_FILES = ("memory.events", "memory.oom_control")  # of cgroup v2, and of v1
MEMORY_FILES = (  # of cgroup v2, and of v1: its limit, what is used, and which of that are pages of files
    ("memory.max", "memory.current", (b"active_file ", b"inactive_file ")),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", (b"total_active_file ", b"total_inactive_file ")),
)
STATE, USER_TICKS, SYSTEM_TICKS = 0, 11, 12  # fields of a `stat` after the name in brackets


def sample(pid: int) -> Sample | None:
    """The process now; None where the kernel does not say, or the process is gone."""
    try:
        fields = _fields(PROC / str(pid))
        ran_s = (int(fields[USER_TICKS]) + int(fields[SYSTEM_TICKS])) / TICKS_PER_S
        threads = list(islice((PROC / str(pid) / "task").iterdir(), THREADS_MAX))
        states = "".join(_state(thread) for thread in threads)
    except (OSError, ValueError, IndexError):
        return None
    if not states:
        return None
    waited_s = sum(_waited_ns(thread) for thread in threads) / NS_PER_S
    return Sample(time.monotonic(), states, ran_s, waited_s, throttled(PROC / str(pid)))


def killed_for_memory(proc: Path = PROC, groups: Path = CGROUPS) -> int:
    """Kills for lack of memory, in our groups plus in all. Only a change of the number means anything."""
    ours = _groups(proc / "self", "memory", groups)
    counts = [_number(group / name, b"oom_kill ") for group in ours for name in OOM_FILES]
    return sum(counts) + _number(proc / "vmstat", b"oom_kill ")


def available_bytes(proc: Path = PROC, groups: Path = CGROUPS) -> int | None:
    """Memory that could be had now without swapping: of the machine, or of our groups where they have less.

    What files take in a group counts as had: the kernel takes it back. None where nothing is said.
    """
    found = [kib * 1024 for kib in [_number(proc / "meminfo", b"MemAvailable:", b" kB")] if kib]
    for group in _groups(proc / "self", "memory", groups):
        for limit, used, files in MEMORY_FILES:
            most = _read_number(group / limit)
            if most is not None:
                cached = sum(_number(group / "memory.stat", name) for name in files)
                found.append(max(0, most - (_read_number(group / used) or 0) + cached))
    return min(found, default=None)


def throttled(process: Path, groups: Path = CGROUPS) -> int:
    """How often the CPU quota of a process's group, or of one above it, was used up and stopped it."""
    return sum(_number(group / "cpu.stat", b"nr_throttled ") for group in _groups(process, "cpu", groups))


def cpu_quota(process: Path, groups: Path = CGROUPS) -> float | None:
    """How many CPUs the quotas of a process's group and of those above it leave it, such as 1.5; None for no quota."""
    found = [quota for group in _groups(process, "cpu", groups) if (quota := _quota(group)) is not None]
    return min(found, default=None)


def _fields(folder: Path) -> list[bytes]:
    return (folder / "stat").read_bytes().rpartition(b")")[2].split()


def _state(thread: Path) -> str:
    try:
        return _fields(thread)[STATE].decode()
    except (OSError, IndexError):
        return ""  # it has just ended


def _waited_ns(thread: Path) -> int:
    try:
        return int((thread / "schedstat").read_bytes().split()[1])
    except (OSError, ValueError, IndexError):
        return 0  # not every kernel counts it


def _groups(process: Path, controller: str, mounts: Path) -> Iterator[Path]:
    """The control group of a process for a controller, and those above it: cgroup v1 or v2, whichever is mounted."""
    try:
        lines = (process / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        mounted = mounts / controllers if controllers else mounts
        group = mounted / path.lstrip("/")
        for one in [group, *group.parents][:CGROUPS_MAX]:
            if one == mounted.parent:
                break
            yield one


def _quota(group: Path) -> float | None:
    """Of one group: `cpu.max` has quota and period (cgroup v2), or each has a file (v1)."""
    try:
        words = (group / "cpu.max").read_text().split()
    except OSError:
        try:
            words = [(group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")]
        except OSError:
            return None
    try:
        quota, period = map(int, words)
    except ValueError:
        return None  # "max": none
    return quota / period if quota > 0 and period > 0 else None


def _read_number(file: Path) -> int | None:
    """The number that a file is; None for a word such as `max`, or no file."""
    try:
        return int(file.read_bytes())
    except (OSError, ValueError):
        return None


def _number(file: Path, name: bytes, unit: bytes = b"") -> int:
    """The number behind a name at a line's beginning; 0 where there is none."""
    try:
        lines = file.read_bytes().splitlines()
        return next((int(line[len(name) :].removesuffix(unit)) for line in lines if line.startswith(name)), 0)
    except (OSError, ValueError):
        return 0
