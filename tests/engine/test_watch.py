"""Who works, who waits for a CPU and who is stuck: a rule over scripted samples, a reading of real processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedmesh.engine import kernel
from embedmesh.engine.watch import STARVED_FOR_S, WATCH_LOOK_S, Doing, Sample, Starvation, TimeAllowed, Watch, judge
from embedmesh.rules.nodes import Shortage

ALLOWED = TimeAllowed(cpu_s=1.0, still_s=1.0, clock_s=2.0)
LOOKS_MAX = 2_000  # of a real process: minutes, on any machine


@pytest.mark.parametrize(
    ("states", "ran_s", "waited_s", "doing"),
    [
        ("S", 0.0, 0.0, Doing.STILL),
        ("SSS", 0.009, 0.0, Doing.STILL),  # a hang that polls
        ("S", 0.03, 0.0, Doing.WORKING),
        ("R", 0.1, 0.0, Doing.WORKING),
        ("RR", 0.19, 0.2, Doing.WORKING),
        ("R", 0.0, 0.0, Doing.STARVED),
        ("SSR", 0.01, 0.0, Doing.STARVED),  # its threads wait for the one that gets no CPU
        ("SS", 0.01, 0.03, Doing.STARVED),  # just now it sleeps; most of the time it could have run
        ("D", 0.0, 0.0, Doing.AT_DISK),
        ("SD", 0.01, 0.0, Doing.WORKING),  # it swaps, and goes on
        ("DR", 0.0, 0.0, Doing.STARVED),
        ("TT", 0.0, 0.0, Doing.STOPPED),
        ("tS", 0.0, 0.0, Doing.STOPPED),
        ("Z", 0.0, 0.0, Doing.STILL),
    ],
)
def test_what_a_process_did_between_two_looks(states: str, ran_s: float, waited_s: float, doing: Doing) -> None:
    before = Sample(10.0, "R", 5.0, 7.0)
    assert judge(before, Sample(10.0 + WATCH_LOOK_S, states, 5.0 + ran_s, 7.0 + waited_s)) is doing


def test_what_counts_is_a_share_of_the_time_between_the_looks() -> None:
    """When we come late to look, what was much is little."""
    assert judge(Sample(0.0, "R", 0.0), Sample(4 * WATCH_LOOK_S, "R", 0.1)) is Doing.STARVED


def watch(
    steps: Iterable[tuple[str, float]], allowed: TimeAllowed = ALLOWED, late: float = 1.0
) -> tuple[int, str] | None:
    """The number of the look at which something was wrong, and what. A step: states, CPU time since the last."""
    watching = Watch(allowed, lambda seconds, shortage: None)
    at = ran = 0.0
    for number, (states, ran_s) in enumerate(steps):
        at += WATCH_LOOK_S * late
        ran += ran_s
        if wrong := watching.look(Sample(at, states, ran)):
            return number, wrong
    return None


@pytest.mark.parametrize(
    ("step", "looks", "words"),
    [
        (("S", 0.0), 5, "hangs: it sleeps"),
        (("T", 0.0), 5, "was stopped from outside"),
        (("R", 0.2), 6, "spins: it used 1.2 s of CPU time for what may take 1.0 s"),
        (("R", 0.011), 91, "spins"),
        (("D", 0.0), 150, "hangs: it waits for a disk"),
    ],
)
def test_who_is_stuck_is_found_by_its_kind(step: tuple[str, float], looks: int, words: str) -> None:
    found = watch([step] * 1_000)
    assert found is not None
    assert (found[0], words in found[1]) == (looks, True), found[1]


@pytest.mark.parametrize("late", [1.0, 50.0])
@pytest.mark.parametrize(
    "steps",
    [
        [("R", 0.0)] * 1_000,  # no CPU at all, for minutes
        [("R", 0.01)] * 90,
        [("S", 0.0), ("S", 0.0), ("S", 0.0), ("S", 0.0), ("R", 0.01)] * 90,
        [("D", 0.0), ("D", 0.01)] * 90,
        [("S", 0.0)] * 4,
    ],
)
def test_who_is_slow_is_waited_for_and_our_own_lateness_is_no_evidence(
    steps: list[tuple[str, float]], late: float
) -> None:
    assert watch(steps, late=late) is None


def test_a_factor_multiplies_all_bounds() -> None:
    assert watch([("S", 0.0)] * 1_000, ALLOWED.times(4)) == (20, "hangs: it sleeps, and uses no CPU time")


def test_where_the_kernel_tells_nothing_there_is_the_clock() -> None:
    """Ours: ten looks of a fifth of a second."""
    watching = Watch(ALLOWED, lambda seconds, shortage: None)
    said = [watching.look(None) for _ in range(11)]
    assert said == [None] * 10 + ["did not answer in time"]
    assert watching.blind_looks == 11


def test_a_second_of_starving_is_told_once_and_holds_for_a_while() -> None:
    now, told = 0.0, list[Shortage]()
    starvation = Starvation(lambda: now, told.append)
    watching = Watch(ALLOWED, starvation.note)
    throttled = 0
    for look in range(12):
        now, throttled = look * WATCH_LOOK_S, throttled + (look > 5)
        watching.look(Sample(now, "R", 0.0, 0.0, throttled))
    assert told == ["cpu"]
    found: list[Shortage] = [starvation.shortage]
    assert found == ["quota"], "its group was throttled between the last two looks"
    assert starvation.seconds == pytest.approx(11 * WATCH_LOOK_S)
    now += STARVED_FOR_S
    assert starvation.shortage == ""
    shortage: Shortage = "cpu"
    starvation.note(0.2, shortage)
    assert starvation.shortage == "", "a moment is not worth a word"


# -- real processes


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program that has said that it begins."""
    process = subprocess.Popen([sys.executable, "-c", f"print(flush=True)\n{program}"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


RUNS = (Doing.WORKING, Doing.STARVED)  # which of both is the machine's affair


def until(pid: int, *wanted: Doing) -> Sample:
    """Look until it is seen to do one of these."""
    before = kernel.sample(pid)
    for _ in range(LOOKS_MAX):
        time.sleep(WATCH_LOOK_S / 4)
        now = kernel.sample(pid)
        assert before is not None and now is not None
        if judge(before, now) in wanted:
            return now
        before = now
    raise AssertionError(f"never seen {wanted}")


LOOP = "while True: pass"
HANG = "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()"
POOL = "import threading, time\nthreading.Thread(target=lambda: [None for _ in iter(int, 1)]).start()\ntime.sleep(99)"


@pytest.mark.parametrize(
    ("program", "doing"),
    [
        (LOOP, RUNS),
        (POOL, RUNS),  # the first thread sleeps while another works
        (HANG, (Doing.STILL,)),
        ("import time; time.sleep(99)", (Doing.STILL,)),
    ],
)
def test_a_real_process_is_seen_as_what_it_does(program: str, doing: tuple[Doing, ...]) -> None:
    with running(program) as process:
        until(process.pid, *doing)


def test_a_real_process_that_is_stopped_is_seen_so_and_continued_it_works() -> None:
    with running(LOOP) as process:
        process.send_signal(signal.SIGSTOP)
        until(process.pid, Doing.STOPPED)
        process.send_signal(signal.SIGCONT)
        until(process.pid, *RUNS)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system cannot bind a process to a core")
def test_a_real_process_beside_busy_loops_is_starved() -> None:
    """On one core with another that has all the weight."""
    core = min(os.sched_getaffinity(0))
    with running(LOOP) as one, running(LOOP) as other:
        for process in (one, other):
            os.sched_setaffinity(process.pid, {core})
        os.setpriority(os.PRIO_PROCESS, one.pid, 19)
        assert until(one.pid, Doing.STARVED).waited_s > 0


@pytest.mark.parametrize(
    ("membership", "files", "throttled", "killed"),
    [
        ("0::/pod/box\n", {"pod/box/cpu.stat": "nr_throttled 3", "pod/cpu.stat": "x 1\nnr_throttled 4"}, 7, 5),
        ("0::/pod/box\n", {"pod/box/memory.events": "oom 9\noom_kill 2\noom_group_kill 1"}, 0, 7),
        ("4:cpu,cpuacct:/box\n2:memory:/\n", {"cpu,cpuacct/box/cpu.stat": "nr_throttled 3"}, 3, 5),
        ("4:cpu:/\n2:memory:/box\n", {"memory/box/memory.oom_control": "under_oom 0\noom_kill 2"}, 0, 7),
        ("0::/../../box\n", {}, 0, 5),  # in a container whose group has no name here
        ("nonsense", {"cpu.stat": "nr_throttled many"}, 0, 5),
    ],
)
def test_quotas_and_memory_are_read_of_either_kind_of_groups(
    tmp_path: Path, membership: str, files: dict[str, str], throttled: int, killed: int
) -> None:
    """Those above count, too; and where nothing can be read, nothing is told."""
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    for name, text in {"proc/self/cgroup": membership, "proc/vmstat": "oom_kill 5\n"}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    assert kernel.throttled(proc / "self", groups) == throttled
    assert kernel.killed_for_memory(proc, groups) == killed


def test_of_a_process_that_is_not_there_nothing_is_told() -> None:
    with running(LOOP) as process:
        pass
    assert kernel.sample(process.pid) is None
