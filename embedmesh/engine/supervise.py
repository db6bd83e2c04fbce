"""Keeps one worker process alive and honest: each batch has bounds, and after any failure there is a new process.

A batch is bounded in CPU time and in how long it may do nothing, not in time on the clock. A worker that could run and
gets no CPU is *starved*, and waited for: another one would get no more (`watch` decides which it is). Where the kernel
says nothing there is only the clock: then all bounds double with every failed try, and the next batch is smaller.

A batch is tried on at most two processes. A vector that is not finite on the second either is its text's own fault, and
the others of the batch are good; if the second process breaks too, halves of the batch are tried, to find what broke it
(`isolate`). When no process will start, the model is *down* and its callers are told at once; `keep` goes on trying,
with pauses.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

from embedmesh.engine.digest import size_bytes
from embedmesh.engine.frames import LoadModel, RunBatch, Vectors
from embedmesh.engine.isolate import isolate
from embedmesh.engine.plan import pad_length
from embedmesh.engine.process import WORKER_END_S, Worker, WorkerBroke, WorkerProcess, WorkerStuck
from embedmesh.engine.watch import Starvation, TimeAllowed, Watch
from embedmesh.rules.errors import NodeBroke, SetupError
from embedmesh.rules.nodes import SHORTAGES, Shortage

log = logging.getLogger("embedmesh.engine")

LATE_FACTOR = 3.0  # a batch this much later than the last one's speed promises is no proof of life any more
SPEED_TOKENS_MIN = 128  # smaller batches are slower a token, and never take long
PROVED_S = 1.75  # a forward pass this young proves the model; `ready` is true to 2 s, probe and report included
IDLE_PROBE_S = 0.5  # an idle model is probed this often: 2 ms of work each
BATCH_CPU_S = 0.3  # for any batch: the process may have other work meanwhile
FLOPS_MIN = 25e9  # per second of CPU time: a seventh of what a core of our machines reaches
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
PAUSES_S = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # before the n-th start in a row without a good batch
DOWN_PAUSES_S = (*PAUSES_S, 5.0, 10.0, 30.0)  # no caller waits then; it may be for good, and each writes a line
FAILED_STARTS_MAX = 3  # in a row; then callers do not wait for the next
DYING_MAX = 2  # killed and not gone: each may hold the model's memory, and a third would only join them
ISOLATE_MAX_S = 5.0  # others wait meanwhile; one among 64 that crashes the worker at once took 3 s
BATCH_TRIES = 2  # the first may have met a worker that was already dying


class Supervisor:
    """One model's worker. `on_start` is called at every start of a process, the first included."""

    def __init__(
        self,
        load: LoadModel,
        *,
        on_start: Callable[[], None],
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        spawn: Callable[[], Awaitable[Worker]] = WorkerProcess.spawn,
    ) -> None:
        self._load = load
        self._spawn = spawn
        self._sleep = sleep
        self._monotonic = monotonic
        self._on_start = on_start
        self._name = Path(load.folder).name
        self._weights_bytes = size_bytes(Path(load.folder))
        self._worker: Worker | None = None
        self._turn = asyncio.Lock()
        self._numbers = itertools.count()
        self._proved_at = float("-inf")
        self._expected_s = 0.0  # of the batch that runs, by the speed of those before it
        self._tokens_per_s = float("inf")
        self._cpu_s: dict[tuple[int, int], float] = {}  # by shape (plan has few): what its last batch took
        self._run_before: set[tuple[int, int]] = set()  # shapes that this process has kernels for
        self._bounds_factor = 1.0
        self._starts_in_vain = 0  # since the last good batch
        self._failed_starts = 0  # since the last process that loaded
        self._dying: list[Worker] = []  # killed, and not gone
        self._was_blind = False  # at the last failure: only the clock said that it was late
        self._starvation = Starvation(monotonic, self._note_starved)
        self.down: bool = False

    async def start(self) -> None:
        """Start the first process, with a few tries. Raises SetupError when the folder cannot be served, WorkerBroke
        otherwise."""
        for left in reversed(range(FAILED_STARTS_MAX)):
            try:
                async with self._turn:
                    await self._ensure()
                    await self._try_once([[0]], 1, pad_length(1))
                return
            except WorkerBroke as error:
                if not left:
                    raise
                self._note_failure(error)

    @property
    def shortage(self) -> Shortage:
        """What the worker is short of, or was a moment ago; "" where it is not starved."""
        return self._starvation.shortage

    def ready(self) -> bool:
        """Whether a forward pass succeeded just now, or a long one is not late yet."""
        return self._monotonic() - self._proved_at <= max(PROVED_S, LATE_FACTOR * self._expected_s)

    async def run(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes | None]:
        """One little-endian float32 vector a sequence; None for one that breaks the engine, or is never finite.

        Raises NodeBroke when a lone sequence broke two processes, or the model is down.
        """
        try:
            return await self._run(sequences, rows, length)
        except NodeBroke:
            if len(sequences) == 1 or self.down:
                raise
        ends = self._fed_s() + ISOLATE_MAX_S
        run_once = functools.partial(self._run, tries_max=1)
        return await isolate(sequences, length, run_once, lambda: not self.down and self._fed_s() < ends)

    async def _run(
        self, sequences: list[list[int]], rows: int, length: int, *, tries_max: int = BATCH_TRIES
    ) -> list[bytes | None]:
        tries = 0
        while tries < tries_max:
            async with self._turn:
                try:
                    await self._ensure()
                    tries += 1
                    return await self._try_once(sequences, rows, length, last=tries == tries_max)
                except (WorkerBroke, SetupError) as error:
                    self._note_failure(error)
            if self.down or (self._was_blind and len(sequences) > 1):
                break  # only the clock says that it is late: halves are tried next
        raise NodeBroke("The node could not embed this: its engine failed and is being restarted.")

    async def keep(self) -> None:
        """Probe while idle, and so restart a worker that died. Runs until cancelled."""
        while True:
            await asyncio.sleep(IDLE_PROBE_S)
            await self._bury()
            if self._turn.locked() or self._monotonic() - self._proved_at < IDLE_PROBE_S:
                continue
            with contextlib.suppress(NodeBroke):
                await self.run([[0]], 1, pad_length(1))

    async def stop(self) -> None:
        """End the process, if there is one, and wait a moment until it is gone."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.kill()
            await worker.gone(WORKER_END_S)
        await self._bury()

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._worker.pid if self._worker else None

    async def _ensure(self) -> None:
        if self._worker is not None:
            return
        pauses_s = DOWN_PAUSES_S if self.down else PAUSES_S
        await self._sleep(pauses_s[min(self._starts_in_vain, len(pauses_s) - 1)])
        self._starts_in_vain += 1
        try:
            self._worker = await self._loaded_worker()
        except (WorkerBroke, SetupError) as error:
            self._failed_starts += 1
            self.down = isinstance(error, SetupError) or self._failed_starts >= FAILED_STARTS_MAX
            raise
        self._failed_starts = 0
        self.down = False

    async def _loaded_worker(self) -> Worker:
        await self._bury()
        if len(self._dying) >= DYING_MAX:
            raise WorkerBroke("cannot be started again: killed workers have not ended yet (does a disk hang?)")
        self._on_start()
        read_s = self._weights_bytes / START_BYTES_PER_S
        allowed = TimeAllowed(START_CPU_S + read_s, START_STILL_S + read_s, START_STILL_S + read_s)
        worker = await self._spawn()
        try:
            with self._watching(allowed) as watch:
                await worker.load(self._load, watch)
        except BaseException:
            await self._end(worker)
            raise
        self._run_before.clear()
        return worker

    @contextlib.contextmanager
    def _watching(self, allowed: TimeAllowed) -> Iterator[Watch]:
        """Watch one answer, and keep what it shows: starvation, and whether the kernel said anything."""
        watch = Watch(allowed.times(self._bounds_factor), self._starvation.note)
        self._was_blind = False
        try:
            yield watch
        except WorkerStuck:
            self._was_blind = watch.blind_looks > 0
            self._bounds_factor = min(2 * self._bounds_factor, BOUNDS_FACTOR_MAX)
            raise

    def _note_starved(self, shortage: Shortage) -> None:
        log.warning("the engine of %s is starved: %s; waiting for it", self._name, SHORTAGES[shortage])

    async def _end(self, worker: Worker) -> None:
        """Kill it, and wait a moment until it is gone."""
        worker.kill()
        self._dying.append(worker)
        await asyncio.shield(worker.gone(WORKER_END_S))

    async def _bury(self) -> None:
        self._dying = [worker for worker in self._dying if not await worker.gone(0.0)]

    def _fed_s(self) -> float:
        """A clock that stands still while the worker is starved."""
        return self._monotonic() - self._starvation.seconds

    async def _try_once(
        self, sequences: list[list[int]], rows: int, length: int, *, last: bool = False
    ) -> list[bytes | None]:
        """One attempt. Vectors that are not finite condemn the process, or on the `last` attempt their texts."""
        worker = self._worker
        if worker is None:
            raise WorkerBroke("is not there")
        batch = RunBatch(next(self._numbers), rows, length, sequences)
        begun = self._monotonic()
        self._expected_s = rows * length / self._tokens_per_s
        try:
            with self._watching(self._allowed(rows, length)) as watch:
                answer = await worker.run(batch, watch)
            vectors = _cut(answer, len(sequences), self._load.width)
            if answer.bad and not last:
                raise WorkerBroke("gave vectors that are not finite")
        except BaseException:
            self._worker = None
            await self._end(worker)
            raise
        finally:
            self._expected_s = 0.0
        if any(vector is not None for vector in vectors):
            self._proved_at = self._monotonic()
            self._starts_in_vain = 0
            self._cpu_s[rows, length] = answer.cpu_s
            self._run_before.add((rows, length))
            if not watch.blind_looks:
                self._bounds_factor = max(1.0, self._bounds_factor / 2)
            if rows * length >= SPEED_TOKENS_MIN:
                self._tokens_per_s = rows * length / max(self._proved_at - begun, 1e-6)
        return vectors

    def _note_failure(self, error: Exception) -> None:
        self._proved_at = float("-inf")
        log.error("the engine of %s %s; it is being restarted", self._name, error)

    def _allowed(self, rows: int, length: int) -> TimeAllowed:
        """The bounds of a batch of that shape: from what one like it took before, else from its size."""
        # Two operations a weight a token; the 4 bytes of each weight make that half a weights file.
        size_s = rows * length * self._weights_bytes / 2 / FLOPS_MIN
        before_s = self._cpu_s.get((rows, length))
        cpu_s = BATCH_CPU_S + (size_s if before_s is None else REPEAT_FACTOR * before_s)
        if (rows, length) not in self._run_before:
            cpu_s += SHAPE_CPU_S + self._weights_bytes / SHAPE_BYTES_PER_S
        return TimeAllowed(cpu_s, STILL_S, BLIND_S + size_s / BLIND_CORES)


def _cut(answer: Vectors, count: int, width: int) -> list[bytes | None]:
    """One vector a sequence; None for those that are not finite."""
    size = width * 4
    if len(answer.data) != count * size:
        raise WorkerBroke("answered with a wrong number of components")
    bad = set(answer.bad)
    return [None if at in bad else answer.data[at * size : (at + 1) * size] for at in range(count)]
