"""The machine's own limit: how many multiply-adds its cores do in registers, by precision.

A C loop (peak.c) is built where there is a `cc`; a matrix product, however good, is no limit, and the runtime's own
would flatter the runtime. The rate is checked against the clock: a core begins at most two multiply-adds in a cycle, so
a rate above that means that the compiler has left some out. The clock is that of a chain of integer products, three
cycles each on x86-64 CPUs with AVX2 (Fog, Instruction tables, IMUL r,r).
"""

import ctypes
import math
import platform
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from bench.rig.command import CannotRun
from bench.rig.install import HOME, NotInstalled, run_step

SOURCE = Path(__file__).with_name("peak.c")
ACCUMULATORS = 12
CHAIN_PRODUCTS, CHAIN_CYCLES = 10, 3  # products in a turn of the chain, cycles of each
MEASURE_S = 0.03  # of one loop: hundreds of times what it takes to start a thread
FIRST_TURNS = 100_000  # some hundred microseconds, to find out how many take MEASURE_S
PER_CYCLE_MAX = 2.15  # multiply-adds; two begin, and the clock may change between the two loops
REPEATS = 3  # of each loop in a round

State = npt.NDArray[np.float32]
"""The accumulators of one thread, and two factors."""


class Loop(NamedTuple):
    """A loop of peak.c: 32-bit numbers in its vectors, operations of one multiply-add, and the CPU's flags for it."""

    precision: str
    numbers: int
    operations: int
    flags: frozenset[str]


LOOPS = {
    "f32_256": Loop("f32", 8, 2 * 8, frozenset({"avx2", "fma"})),
    "f32_512": Loop("f32", 16, 2 * 16, frozenset({"avx512f"})),
    "bf16_512": Loop("bf16", 16, 2 * 32, frozenset({"avx512_bf16"})),
    "int8_512": Loop("int8", 16, 2 * 64, frozenset({"avx512_vnni"})),
}


class Rates(NamedTuple):
    """Turns a second: by the wall, of all threads together; and of processor time, which other work does not take."""

    wall: float
    busy: float


class Peak(msgspec.Struct, frozen=True):
    """The best of the run: GFLOP/s (GOP/s for int8) of all threads and of one; multiply-adds a cycle; the clock."""

    gflops: float
    one_gflops: float
    per_cycle: float
    clock_ghz: float


class Peaks:
    """Measured once a round; the best counts, since a limit is what was reached once: that counts against us."""

    def __init__(self, flags: frozenset[str], threads: int) -> None:
        """Builds the loops. Raises NotInstalled without a C compiler, or where the CPU is no x86-64 with AVX2."""
        self._threads = threads
        self._loops = {name: loop for name, loop in LOOPS.items() if loop.flags <= flags}
        if platform.machine() != "x86_64" or not self._loops:
            raise NotInstalled("no loop of peak.c is for this CPU")
        HOME.mkdir(exist_ok=True)
        library = HOME / "peak.so"
        run_step(["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)])
        self._library = ctypes.CDLL(str(library))
        self.found: dict[str, Peak] = {}

    def measure(self) -> None:
        """Once more. Raises CannotRun where a rate is none that a CPU can have."""
        for name, loop in self._loops.items():
            busy = self._turns_per_s(name, 1).busy * ACCUMULATORS
            clock = self._turns_per_s("multiply_chain", 1).busy * CHAIN_PRODUCTS * CHAIN_CYCLES
            per_cycle, all_ = busy / clock, self._turns_per_s(name, self._threads).wall * ACCUMULATORS
            if per_cycle > PER_CYCLE_MAX:
                raise CannotRun(f"{name} did {per_cycle:.1f} multiply-adds a cycle, which no CPU does: see peak.c")
            each = loop.operations / 1e9
            made = Peak(all_ * each, busy * each, per_cycle, clock / 1e9)
            best = self.found.get(name)
            if best is None or made.gflops > best.gflops:
                self.found[name] = made

    def gflops(self, precision: str) -> float | None:
        """Of the best loop of a precision; None where there is none."""
        return max(
            (peak.gflops for name, peak in self.found.items() if LOOPS[name].precision == precision), default=None
        )

    def loop(self, name: str) -> Callable[[int, int], None]:
        """A function of peak.c: turns, address of the state."""
        work = getattr(self._library, name)
        work.argtypes, work.restype = [ctypes.c_long, ctypes.c_void_p], None
        return work  # type: ignore[no-any-return]

    def _turns_per_s(self, name: str, threads: int) -> Rates:
        """The best of REPEATS runs of `threads` threads together."""
        turns = math.ceil(FIRST_TURNS * MEASURE_S / self._seconds(name, FIRST_TURNS, 1)[1])
        runs = [self._seconds(name, turns, threads) for _ in range(REPEATS)]
        walls, busies = zip(*runs, strict=True)
        return Rates(threads * turns / min(walls), threads * turns / min(busies))

    def _seconds(self, name: str, turns: int, threads: int) -> tuple[float, float]:
        """From the first thread's start to the last one's end, and of processor time in all."""
        work = self.loop(name)

        def run(state: State) -> float:
            begun = time.thread_time()
            work(turns, state.ctypes.data)
            return time.thread_time() - begun

        states = [start_state(name) for _ in range(threads)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(time.sleep, [0.001] * threads))  # so that all its threads are there
            begun = time.perf_counter()
            busy = sum(pool.map(run, states))
            return time.perf_counter() - begun, busy


def start_state(name: str) -> State:
    """Accumulators that all start differently, and factors with which they neither vanish nor overflow."""
    numbers = LOOPS[name].numbers if name in LOOPS else 1
    state = np.linspace(1.0, 2.0, (ACCUMULATORS + 2) * numbers, dtype=np.float32)
    state[-2 * numbers : -numbers], state[-numbers:] = 0.999, 0.001
    return state
