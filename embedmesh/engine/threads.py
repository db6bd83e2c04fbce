"""How many threads an engine computes with: as many as it may run at one time, and no more.

What counts is which CPUs this process may run on, which of them are one core (SMT) or slower than the others, and the
CPU quota of its control group. OpenVINO heeds the first by itself, and knows nothing of a quota. Linux tells all of
that, in files; elsewhere there is the number of CPUs. It is looked at whenever an engine starts: a quota that changes
later counts from the next start on.

Why one thread a core: the threads of a layer wait for the slowest of them. Two on one core share its arithmetic, so
both are slow. The same holds for the small cores of a hybrid CPU.
"""

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from embedmesh.engine import kernel
from embedmesh.system import usable_cpus

CPUS_FOLDER = Path("/sys/devices/system/cpu")
FAST_CPUS_FILE = Path("/sys/devices/cpu_core/cpus")  # Intel's hybrid CPUs: which are not the small ones
ROUND_UP_MIN = 1.2  # times the whole CPUs of a quota; measured: a thread more gained 39 to 54 % at 1.5 CPUs, 14 to 22 %
# at 1.25, lost 2 to 9 % at 1.1 and 5 to 15 % at 1.0, and made one short text in a hundred wait 30 to 50 ms
CPUS_MAX = 8_192  # of a list of CPUs: Linux knows no more


class CpuShare(NamedTuple):
    """What of a machine's CPUs a process may use. None where the system does not tell."""

    cpus: int
    cores: int | None = None
    fast_cores: int | None = None  # of a hybrid CPU: those that are not small ones
    quota: float | None = None  # in CPUs, such as 1.5


class EngineThreads(NamedTuple):
    """How many threads, and why, in words."""

    number: int
    why: str

    def __str__(self) -> str:
        return f"{self.number} thread{'s' * (self.number != 1)}: {self.why}"


def engine_threads(asked: int = 0) -> EngineThreads:
    """The threads of an engine that starts now in this process, or in a child of it; `asked` wins, unless it is 0."""
    return EngineThreads(asked, "as --threads says") if asked else choose_threads(cpu_share())


def threads_here() -> int:
    """Their number where nobody has asked for one."""
    return engine_threads().number


def choose_threads(share: CpuShare) -> EngineThreads:
    """One thread a core, and no more than the quota feeds.

    One more than the quota feeds uses it up before its period ends, and then all of them are stopped: worth it where
    the rest of the quota is large (see ROUND_UP_MIN).
    """
    number = share.fast_cores or share.cores or share.cpus
    if share.quota is not None:
        whole = max(1, int(share.quota))
        number = min(number, math.ceil(share.quota) if share.quota >= ROUND_UP_MIN * whole else whole)
    return EngineThreads(number, in_words(share))


def in_words(share: CpuShare) -> str:
    """Such as "2 cores of 4 CPUs, quota 1.5"."""
    words = _count(share.cpus, "CPU") if share.cores is None else _count(share.cores, "core")
    if share.cores is not None and share.cores != share.cpus:
        words += f" of {_count(share.cpus, 'CPU')}"
    if share.fast_cores is not None and share.fast_cores != share.cores:
        words += f", {share.fast_cores} of them fast"
    return words if share.quota is None else f"{words}, quota {share.quota:.3g}"


def cpu_share(
    cpus: Collection[int] | None = None,
    *,
    folder: Path = CPUS_FOLDER,
    fast: Path = FAST_CPUS_FILE,
    process: Path = kernel.PROC / "self",
    groups: Path = kernel.CGROUPS,
) -> CpuShare:
    """What this process may use now. `cpus` are the numbers of those that it may run on; the system's word else."""
    mine = usable_cpus() if cpus is None else cpus
    quota = kernel.cpu_quota(process, groups)
    if mine is None:
        return CpuShare(os.cpu_count() or 1, quota=quota)
    fast_ones = _read_cpus(fast) & set(mine)
    return CpuShare(
        max(1, len(mine)), _cores(mine, folder), _cores(fast_ones, folder) if fast_ones else None, quota=quota
    )


def _cores(cpus: Collection[int], folder: Path) -> int | None:
    """On how many cores these CPUs are."""
    siblings = [_read_cpus(folder / f"cpu{cpu}" / "topology" / "thread_siblings_list") for cpu in cpus]
    return len({min(each) for each in siblings}) if siblings and all(siblings) else None


def _read_cpus(file: Path) -> set[int]:
    """The numbers in a list such as "0-3,8"; none where there is no such file."""
    try:
        ranges = [part.partition("-") for part in file.read_text().split(",")]
        spans = [(int(first), int(last or first)) for first, _, last in ranges]
    except (OSError, ValueError):
        return set()
    return {cpu for first, last in spans for cpu in range(first, min(last, CPUS_MAX) + 1)}


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"
