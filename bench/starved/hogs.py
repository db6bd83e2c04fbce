"""Busy loops that take the CPU from us, and quotas that do the same. Whatever happens to us, they end with us."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# PR_SET_PDEATHSIG is 1: the kernel kills a loop whose parent is gone, also where that was killed itself.
LOOP = "import ctypes; ctypes.CDLL(None).prctl(1, 9)\nwhile True: pass"
PERIOD_US = 100_000
V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")


@contextmanager
def hogs(count: int) -> Iterator[None]:
    """`count` busy loops, each in a session of its own: the scheduler shares the CPU out among sessions."""
    loops: list[subprocess.Popen[bytes]] = []
    try:
        while len(loops) < count:
            loops.append(subprocess.Popen([sys.executable, "-I", "-S", "-c", LOOP], start_new_session=True))
        yield
    finally:
        for loop in loops:
            loop.kill()
        for loop in loops:
            loop.wait()


class NoQuota(Exception):
    """This machine does not let us set one. The text says why."""


@contextmanager
def quota(pids: list[int], share: float) -> Iterator[None]:
    """These processes, and those that they start, together get a share of one CPU. Raises NoQuota."""
    v2 = (V2 / "cgroup.controllers").exists()
    group = (V2 if v2 else V1) / f"embedmesh-starved-{os.getpid()}"
    settings = (
        {"cpu.max": f"{round(share * PERIOD_US)} {PERIOD_US}"}
        if v2
        else {"cpu.cfs_period_us": str(PERIOD_US), "cpu.cfs_quota_us": str(round(share * PERIOD_US))}
    )
    try:
        if v2:
            (V2 / "cgroup.subtree_control").write_text("+cpu")
        group.mkdir()
    except OSError as error:
        raise NoQuota(f"no group can be made under {group.parent} ({error.strerror})") from None
    try:
        try:
            for name, value in settings.items():
                (group / name).write_text(value)
            for pid in pids:
                (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            raise NoQuota(f"no quota can be set in {group.parent} ({error.strerror})") from None
        yield
    finally:
        for line in (group / "cgroup.procs").read_text().split():
            (group.parent / "cgroup.procs").write_text(line)
        group.rmdir()
