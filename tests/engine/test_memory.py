"""A model that will not fit is refused before it is loaded; one that waits for others is not."""

import asyncio
import mmap
from pathlib import Path

import pytest

from embedmesh.engine.kernel import available_bytes
from embedmesh.engine.memory import MemoryRoom, file_pages_bytes
from embedmesh.rules.errors import SetupError

GIB = 1024**3
MEMINFO = "MemTotal:       16777216 kB\nMemFree:         1048576 kB\nMemAvailable:    4194304 kB\n"


def machine(root: Path, meminfo: str = MEMINFO, cgroup: str = "0::/pod/app\n") -> tuple[Path, Path]:
    """Its /proc and control groups."""
    proc, groups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(meminfo)
    (proc / "self" / "cgroup").write_text(cgroup)
    (groups / "pod" / "app").mkdir(parents=True)
    return proc, groups


def limit(group: Path, most: object, used: int, *, file: int = 0, v1: bool = False) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
    total = "total_" if v1 else ""
    group.mkdir(parents=True, exist_ok=True)
    (group / names[0]).write_text(f"{most}\n")
    (group / names[1]).write_text(f"{used}\n")
    (group / "memory.stat").write_text(f"anon {used - file}\n{total}inactive_file {file}\n{total}active_file 0\n")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path)
    limit(groups / "pod" / "app", "max", 3 * GIB)
    assert available_bytes(proc, groups) == 4 * GIB


def test_pages_of_files_can_be_had_again(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path)
    limit(groups / "pod" / "app", 3 * GIB, 2 * GIB, file=GIB)
    assert available_bytes(proc, groups) == 2 * GIB


def test_a_group_above_may_have_less(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path)
    limit(groups / "pod" / "app", 3 * GIB, GIB)
    limit(groups / "pod", 3 * GIB, 3 * GIB)
    assert available_bytes(proc, groups) == 0


def test_old_control_groups_say_it_too(tmp_path: Path) -> None:
    proc, groups = machine(tmp_path, cgroup="9:memory:/app\n1:cpu:/other\n")
    limit(groups / "memory" / "app", 3 * GIB, GIB, v1=True)
    assert available_bytes(proc, groups) == 2 * GIB


def test_a_system_that_says_nothing_is_not_judged(tmp_path: Path) -> None:
    assert available_bytes(tmp_path, tmp_path) is None


def test_mapped_pages_of_files_are_counted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(32 * 1024 * 1024))
    before = file_pages_bytes()
    with (tmp_path / "file").open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        assert file_pages_bytes() - before > 24 * 1024 * 1024
    assert file_pages_bytes(tmp_path / "absent") == 0


async def test_what_does_not_fit_is_refused_with_what_to_do() -> None:
    room = MemoryRoom(lambda: 2 * GIB)
    with pytest.raises(SetupError) as refused:
        async with room.taken(3 * GIB, "large"):
            raise AssertionError("it was let in")
    for words in ("large needs about 3.2 GB", "2.1 GB are left", "Unload another", "--memory-check ignore"):
        assert words in str(refused.value)
    async with room.taken(2 * GIB, "small"):
        pass


async def test_who_insists_is_let_in() -> None:
    async with MemoryRoom(lambda: 0, insist=True).taken(GIB, "large"):
        pass


async def test_one_of_two_that_load_at_once_waits_and_is_judged_by_what_is_left_then() -> None:
    left = [4 * GIB]
    room = MemoryRoom(lambda: left[0])
    started, go_on, events = asyncio.Event(), asyncio.Event(), []

    async def load(name: str, need: int) -> None:
        async with room.taken(need, name):
            events.append(f"{name} loads")
            started.set()
            await go_on.wait()
            left[0] -= need

    first = asyncio.create_task(load("first", 2 * GIB))
    await started.wait()
    fits, too_large = asyncio.create_task(load("fits", 2 * GIB)), asyncio.create_task(load("too large", 3 * GIB))
    other = asyncio.create_task(load("small", GIB))
    for _ in range(10):
        await asyncio.sleep(0)
    assert events == ["first loads", "fits loads"]  # they fit together; the others wait
    go_on.set()
    outcomes = await asyncio.gather(first, fits, too_large, other, return_exceptions=True)
    assert [type(each) for each in outcomes] == [type(None), type(None), SetupError, SetupError]
