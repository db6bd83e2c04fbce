"""How long a start or a batch may take: from what one like it took before, else from the model's size.

A batch is bounded in CPU time and in how long it may do nothing; where the kernel says nothing there is only the clock.
"""

from collections.abc import Callable

from embedmesh.engine.estimate import Sizes
from embedmesh.engine.process import WorkerStuck
from embedmesh.engine.watch import LazyWatch, TimeAllowed, Watch
from embedmesh.rules.nodes import Shortage

BATCH_CPU_S = 0.3  # for any batch: the process may have other work meanwhile
FLOPS_MIN = 10e9  # per second of CPU time: a quarter of what a core with AVX2 reaches
REPEAT_FACTOR = 2.5  # a shape takes as much CPU time as before, on a busy machine a fifth more
SHAPE_CPU_S = 0.25  # the first kernels of a shape in a process, here 0.02
SHAPE_BYTES_PER_S = 1e9  # larger models have more of them
BLIND_S = 2.0  # on the clock, where the kernel says nothing
STILL_S = 1.5  # a batch computes all the time: while it lasts, some thread runs, or could
START_CPU_S = 10.0  # half a second here, where little is to be compiled
START_STILL_S = 10.0  # a cold disk
START_BYTES_PER_S = 50e6  # weights are read and hashed from a slow network disk
BLIND_CORES = 2  # that a batch has, as far as the clock goes
BOUNDS_FACTOR_MAX = 32.0  # after five failures in a row


class Bounds:
    """The bounds of one model's worker. They double with each answer that is late, and halve with each that is good."""

    def __init__(self, weights_bytes: int, sizes: Sizes, on_starved: Callable[[float, Shortage], None]) -> None:
        self._weights_bytes = weights_bytes
        self._sizes = sizes
        self._on_starved = on_starved
        self._cpu_s: dict[tuple[int, int], float] = {}  # by shape (plan has few): what its last batch took
        self._run_before: set[tuple[int, int]] = set()  # shapes that this process has kernels for
        self._factor = 1.0
        self.was_blind: bool = False  # at the last failure: only the clock said that it was late

    def watch_start(self) -> Watch:
        """For a process that loads its model."""
        self._run_before.clear()
        read_s = self._weights_bytes / START_BYTES_PER_S
        allowed = TimeAllowed(START_CPU_S + read_s, START_STILL_S + read_s, START_STILL_S + read_s)
        return Watch(allowed.times(self._factor), self._on_starved)

    def watch_batch(self, rows: int, length: int) -> LazyWatch:
        """For a batch of that shape."""
        return LazyWatch(lambda: Watch(self._allowed(rows, length).times(self._factor), self._on_starved))

    def passed(self, shape: tuple[int, int], cpu_s: float, watch: LazyWatch) -> None:
        """A batch has given good vectors."""
        self._cpu_s[shape] = cpu_s
        self._run_before.add(shape)
        self.was_blind = False
        if not watch.blind_looks:
            self._factor = max(1.0, self._factor / 2)

    def failed(self, error: BaseException, watch: Watch | LazyWatch) -> None:
        """There was no good answer."""
        self.was_blind = False
        if isinstance(error, WorkerStuck):
            self.was_blind = watch.blind_looks > 0
            self._factor = min(2 * self._factor, BOUNDS_FACTOR_MAX)

    def _allowed(self, rows: int, length: int) -> TimeAllowed:
        size_s = rows * length * self._sizes.flops(length) / FLOPS_MIN
        before_s = self._cpu_s.get((rows, length))
        cpu_s = BATCH_CPU_S + (size_s if before_s is None else REPEAT_FACTOR * before_s)
        if (rows, length) not in self._run_before:
            cpu_s += SHAPE_CPU_S + self._weights_bytes / SHAPE_BYTES_PER_S
        return TimeAllowed(cpu_s, STILL_S, BLIND_S + size_s / BLIND_CORES)
