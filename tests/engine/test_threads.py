"""How many threads an engine has: by the CPUs that it may run on, their cores, and the quota of its control group."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedmesh.engine import kernel
from embedmesh.engine.threads import CpuShare, choose_threads, cpu_share, engine_threads, threads_here
from tests.data import CHECKOUT

SMT = ["0,4", "1,5", "2,6", "3,7"] * 2  # four cores with two CPUs each, as Linux numbers them
GROUP = Path("/sys/fs/cgroup/cpu")  # of cgroup v1, which a quota can be tried in for real


def machine(folder: Path, siblings: list[str], fast: str = "") -> dict[str, Path]:
    """The files of a machine without control groups."""
    for cpu, text in enumerate(siblings):
        topology = folder / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(text + "\n")
    if fast:
        (folder / "fast").write_text(fast + "\n")
    return {"folder": folder, "fast": folder / "fast", "process": folder / "proc", "groups": folder / "groups"}


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (CpuShare(2, 2), "2 threads: 2 cores"),
        (CpuShare(1, 1), "1 thread: 1 core"),
        (CpuShare(8, 4), "4 threads: 4 cores of 8 CPUs"),
        (CpuShare(8), "8 threads: 8 CPUs"),
        (CpuShare(20, 14, 6), "6 threads: 14 cores of 20 CPUs, 6 of them fast"),
        (CpuShare(2, 2, quota=1.5), "2 threads: 2 cores, quota 1.5"),
        (CpuShare(2, 2, quota=1.25), "2 threads: 2 cores, quota 1.25"),
        (CpuShare(2, 2, quota=1.1), "1 thread: 2 cores, quota 1.1"),
        (CpuShare(8, 8, quota=2.5), "3 threads: 8 cores, quota 2.5"),
        (CpuShare(8, 8, quota=5.5), "5 threads: 8 cores, quota 5.5"),
        (CpuShare(2, 2, quota=1.0), "1 thread: 2 cores, quota 1"),
        (CpuShare(2, 2, quota=0.2), "1 thread: 2 cores, quota 0.2"),
        (CpuShare(64, 32, quota=4.0), "4 threads: 32 cores of 64 CPUs, quota 4"),
        (CpuShare(2, 2, quota=16.0), "2 threads: 2 cores, quota 16"),
    ],
)
def test_the_number_and_the_words(share: CpuShare, said: str) -> None:
    """One a core, the fast ones where a CPU has slow ones, and what the quota feeds; never none."""
    assert str(choose_threads(share)) == said


def test_who_asks_for_a_number_gets_it() -> None:
    assert str(engine_threads(7)) == "7 threads: as --threads says"


@pytest.mark.parametrize(
    ("cpus", "fast", "share"),
    [
        (range(8), "", CpuShare(8, 4)),
        ([0, 4], "", CpuShare(2, 1)),
        ([0, 1, 4], "", CpuShare(3, 2)),
        (range(8), "0-1,4-5", CpuShare(8, 4, 2)),
        ([2, 3], "0-1", CpuShare(2, 2)),  # it may run on the slow ones only
        ([0, 9], "", CpuShare(2)),  # of one CPU nothing is told
    ],
)
def test_cpus_of_one_core_count_once(tmp_path: Path, cpus: list[int], fast: str, share: CpuShare) -> None:
    assert cpu_share(cpus, **machine(tmp_path, SMT, fast)) == share


@pytest.mark.parametrize("text", ["", "nonsense", "0-", "0-99999999999"])
def test_files_that_say_nothing_are_no_failure(tmp_path: Path, text: str) -> None:
    found = cpu_share([0], **machine(tmp_path, [text]))
    assert found.cpus == 1 and found.cores in (None, 1)


@pytest.mark.parametrize(
    ("membership", "files", "quota"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n", "pod/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/pod/box\n", {"pod/box/cpu.max": "300000 100000\n", "pod/cpu.max": "200000 100000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "100000 50000\n"}, 2.0),  # in a container that sees itself as the root
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000\n"}, None),
        ("0::/pod/box\n", {}, None),
        ("0::/pod/box\n", {"pod/box/cpu.max": "a b c"}, None),
        ("4:cpu,x:/box\n", {"cpu,x/box/cpu.cfs_quota_us": "150000", "cpu,x/box/cpu.cfs_period_us": "100000"}, 1.5),
        ("4:cpu:/box\n", {"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.7),
        ("4:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "-1\n", "cpu/box/cpu.cfs_period_us": "100000\n"}, None),
        ("4:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "5\n", "cpu/box/cpu.cfs_period_us": "0\n"}, None),
        ("nonsense", {}, None),
    ],
)  # fmt: skip
def test_the_smallest_quota_of_the_groups_counts(
    tmp_path: Path, membership: str, files: dict[str, str], quota: float | None
) -> None:
    """Of either kind of control groups; those above count, too."""
    process, groups = tmp_path / "self", tmp_path / "groups"
    for file, text in {process / "cgroup": membership, **{groups / name: text for name, text in files.items()}}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert kernel.cpu_quota(process, groups) == quota


def test_a_system_that_tells_nothing_has_its_number_of_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No affinity, no /proc, no /sys: such as macOS."""
    monkeypatch.delattr(os, "sched_getaffinity")
    found = cpu_share(folder=tmp_path, fast=tmp_path, process=tmp_path, groups=tmp_path)
    assert found == CpuShare(os.cpu_count() or 1)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to cores")
def test_only_the_cores_that_we_may_run_on_count() -> None:
    """A process bound to one core has one, whatever the machine has."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert cpu_share().cpus == threads_here() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert cpu_share().cpus == len(before)


@contextmanager
def quota_group(quota_us: int) -> Iterator[Path]:
    """A real control group with this quota in a tenth of a second; skips where we may make none."""
    group = GROUP / f"embedmesh-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("this system lets us make no control group")
    try:
        (group / "cpu.cfs_quota_us").write_text(str(quota_us))
        yield group
    finally:
        group.rmdir()


@pytest.mark.parametrize("quota", [0.5, 1.5])
def test_a_real_quota_is_seen(quota: float) -> None:
    """By a process in the group; and its threads are those of the rule."""
    program = (
        "from embedmesh.engine.threads import cpu_share, engine_threads; print(cpu_share().quota, engine_threads())"
    )
    with quota_group(round(quota * 100_000)) as group:
        joined = f"echo $$ > {group}/cgroup.procs && exec {sys.executable} -c '{program}'"
        ran = subprocess.run(["/bin/sh", "-c", joined], capture_output=True, text=True, cwd=CHECKOUT, check=True)
    seen, _, threads = ran.stdout.partition(" ")
    assert float(seen) == quota
    assert threads.strip() == str(choose_threads(cpu_share()._replace(quota=quota)))
