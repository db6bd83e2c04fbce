"""Keeps one worker process alive and honest: each batch has bounds, and after any failure there is a new process.

A batch is bounded in CPU time and in how long it may do nothing, not in time on the clock. A worker that could run and
gets no CPU is *starved*, and waited for: another one would get no more (`watch` decides which it is). Where the kernel
says nothing there is only the clock: then all bounds double with every failed try, and the next batch is smaller.

The ordinary batch begins and ends without a coroutine (`begin`); what goes wrong is mended by one, from the state
reached. A batch is tried on at most two processes. A vector that is not finite on the second either is its text's own
fault, and the others of the batch are good; if the second process breaks too, halves of the batch are tried, to find
what broke it (`isolate`). When no process will start, the model is *down* and its callers are told at once; `keep` goes
on trying, with pauses.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path

from embedmesh.engine.bounds import Bounds
from embedmesh.engine.digest import size_bytes
from embedmesh.engine.estimate import estimate, measure
from embedmesh.engine.folder import read_folder
from embedmesh.engine.frames import Failed, FromWorker, LoadModel, RunBatch, Vectors
from embedmesh.engine.isolate import Rows, RowsDone, isolate
from embedmesh.engine.memory import MemoryRoom
from embedmesh.engine.plan import pad_length
from embedmesh.engine.process import WORKER_END_S, Worker, WorkerBroke, WorkerProcess, rows_of
from embedmesh.engine.progress import LoadProgress
from embedmesh.engine.turn import Turn
from embedmesh.engine.watch import LazyWatch, Starvation
from embedmesh.rules.errors import NodeBroke, SetupError
from embedmesh.rules.nodes import SHORTAGES, Shortage

log = logging.getLogger("embedmesh.engine")

LATE_FACTOR = 3.0  # a batch this much later than the last one's speed promises is no proof of life any more
SPEED_TOKENS_MIN = 128  # smaller batches are slower a token, and never take long
PROVED_S = 1.75  # a forward pass this young proves the model; `ready` is true to 2 s, probe and report included
IDLE_PROBE_S = 0.5  # an idle model is probed this often: 2 ms of work each
PAUSES_S = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # before the n-th start in a row without a good batch
DOWN_PAUSES_S = (*PAUSES_S, 5.0, 10.0, 30.0)  # no caller waits then; it may be for good, and each writes a line
FAILED_STARTS_MAX = 3  # in a row; then callers do not wait for the next
DYING_MAX = 2  # killed and not gone: each may hold the model's memory, and a third would only join them
ISOLATE_MAX_S = 5.0  # others wait meanwhile; one among 64 that crashes the worker at once took 3 s
BATCH_TRIES = 2  # the first may have met a worker that was already dying


class Supervisor:
    """One model's worker. `on_start` is called at every start of a process. `memory` is shared with other models."""

    def __init__(
        self,
        load: LoadModel,
        *,
        on_start: Callable[[], None],
        memory: MemoryRoom | None = None,
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
        self.progress = LoadProgress(self._name)
        self._worker: Worker | None = None
        self._turn = Turn()
        self._numbers = itertools.count()
        self._proved_at = float("-inf")
        self._expected_s = 0.0  # of the batch that runs, by the speed of those before it
        self._tokens_per_s = float("inf")
        self._starts_in_vain = 0  # since the last good batch
        self._failed_starts = 0  # since the last process that loaded
        self._dying: list[Worker] = []  # killed, and not gone
        self._starvation = Starvation(monotonic, self._note_starved)
        self._memory = memory or MemoryRoom()
        folder = read_folder(Path(load.folder))
        self._need_bytes = estimate(folder, load.tier).peak_bytes
        self._bounds = Bounds(size_bytes(folder.path), measure(folder), self._starvation.note)
        self.down: bool = False
        self._mending: set[asyncio.Task[None]] = set()  # batches that need more than one answer of one process
        self._stopped = False
        self._bug: BaseException | None = None  # of ours, on a way that nobody waits for

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

    def begin(self, sequences: list[list[int]], rows: int, length: int, done: RowsDone) -> None:
        """As `run`; `done` is called later with what that returns, or with the NodeBroke that it raises."""
        worker = self._worker
        if worker is None or not self._turn.take():
            self._mend(self._run_for(done, sequences, rows, length))
            return

        def ended(outcome: Rows | WorkerBroke) -> None:
            if isinstance(outcome, WorkerBroke):
                self._mend(self._go_on(outcome, worker, done, sequences, rows, length))
            else:
                self._turn.give_back()
                done(outcome)

        self._begin_once(worker, sequences, rows, length, ended)

    async def run(self, sequences: list[list[int]], rows: int, length: int, *, tried: int = 0) -> Rows:
        """One little-endian float32 vector a sequence; None for one that breaks the engine, or is never finite.

        Raises NodeBroke when a lone sequence broke two processes, or the model is down. `tried` on as many already.
        """
        try:
            return await self._run(sequences, rows, length, tried=tried)
        except NodeBroke:
            if len(sequences) == 1 or self.down:
                raise
        ends = self._fed_s() + ISOLATE_MAX_S
        run_once = functools.partial(self._run, tries_max=1)
        return await isolate(sequences, length, run_once, lambda: not self.down and self._fed_s() < ends)

    async def _run(
        self, sequences: list[list[int]], rows: int, length: int, *, tried: int = 0, tries_max: int = BATCH_TRIES
    ) -> Rows:
        failed = tried > 0
        # Where only the clock says that it is late, halves are tried next.
        while tried < tries_max and not (failed and (self.down or (self._bounds.was_blind and len(sequences) > 1))):
            async with self._turn:
                try:
                    await self._ensure()
                    tried += 1
                    return await self._try_once(sequences, rows, length, last=tried == tries_max)
                except (WorkerBroke, SetupError) as error:
                    self._note_failure(error)
                    failed = True
        raise NodeBroke("The node could not embed this: its engine failed and is being restarted.")

    async def _go_on(
        self, error: WorkerBroke, worker: Worker, done: RowsDone, sequences: list[list[int]], rows: int, length: int
    ) -> None:
        """What `_run` does when the first try has failed; the turn is still ours."""
        try:
            await self._end(worker)
            self._note_failure(error)
        finally:
            self._turn.give_back()
        await self._run_for(done, sequences, rows, length, tried=1)

    async def _run_for(
        self, done: RowsDone, sequences: list[list[int]], rows: int, length: int, *, tried: int = 0
    ) -> None:
        try:
            outcome: Rows | NodeBroke = await self.run(sequences, rows, length, tried=tried)
        except NodeBroke as failure:
            outcome = failure
        done(outcome)

    def _mend(self, work: Coroutine[None, None, None]) -> None:
        if self._stopped:
            work.close()
            return
        task = asyncio.get_running_loop().create_task(work)
        self._mending.add(task)
        task.add_done_callback(self._mended)

    def _mended(self, task: asyncio.Task[None]) -> None:
        self._mending.discard(task)
        if not task.cancelled():
            self._bug = self._bug or task.exception()

    async def keep(self) -> None:
        """Probe while idle, and so restart a worker that died. Runs until cancelled."""
        while True:
            await asyncio.sleep(IDLE_PROBE_S)
            await self._bury()
            if self._bug is not None:
                raise self._bug
            if self._turn.taken or self._monotonic() - self._proved_at < IDLE_PROBE_S:
                continue
            with contextlib.suppress(NodeBroke):
                await self.run([[0]], 1, pad_length(1))

    async def stop(self) -> None:
        """End the process, if there is one, and wait a moment until it is gone. Batches that run are not answered."""
        self._stopped = True
        for task in self._mending:
            task.cancel()
        await asyncio.gather(*self._mending, return_exceptions=True)
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
            async with self._memory.taken(self._need_bytes, self._name):
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
        worker = await self._spawn()
        watch = self._bounds.watch_start()
        try:
            await worker.load(self._load, watch.look, self.progress.note)
        except BaseException as error:
            self._bounds.failed(error, watch)
            await self._end(worker)
            raise
        return worker

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

    async def _try_once(self, sequences: list[list[int]], rows: int, length: int, *, last: bool = False) -> Rows:
        """One attempt. Vectors that are not finite condemn the process, or on the `last` attempt their texts."""
        worker = self._worker
        if worker is None:
            raise WorkerBroke("is not there")
        ended: asyncio.Future[Rows | WorkerBroke] = asyncio.get_running_loop().create_future()

        def end(outcome: Rows | WorkerBroke) -> None:
            if not ended.done():
                ended.set_result(outcome)

        try:
            self._begin_once(worker, sequences, rows, length, end, last=last)
            outcome = await ended
            if isinstance(outcome, WorkerBroke):
                raise outcome
        except BaseException:
            self._worker = None
            await self._end(worker)
            raise
        return outcome

    def _begin_once(
        self,
        worker: Worker,
        sequences: list[list[int]],
        rows: int,
        length: int,
        ended: Callable[[Rows | WorkerBroke], None],
        *,
        last: bool = False,
    ) -> None:
        """Begin one attempt; `ended` is called later. After a WorkerBroke the worker is still to be ended."""
        batch = RunBatch(next(self._numbers), rows, length, sequences)
        watch = self._bounds.watch_batch(rows, length)
        begun = self._monotonic()
        self._expected_s = rows * length / self._tokens_per_s

        def answered(answer: FromWorker | WorkerBroke) -> None:
            self._expected_s = 0.0
            try:
                try:
                    vectors = self._judge(batch, answer, last=last)
                except WorkerBroke as broke:
                    self._worker = None
                    self._bounds.failed(broke, watch)
                    ended(broke)
                else:
                    now = self._monotonic()
                    ended(vectors)  # first: somebody waits for it
                    if isinstance(answer, Vectors) and len(answer.bad) < len(vectors):
                        self._note_good(batch, answer, watch, now - begun)
            except Exception as bug:
                self._bug = bug
                raise

        worker.begin(batch, watch.look, answered)

    def _judge(self, batch: RunBatch, answer: FromWorker | WorkerBroke, *, last: bool) -> Rows:
        """The vectors of an answer. Raises WorkerBroke where it condemns the process."""
        if isinstance(answer, WorkerBroke):
            raise answer
        if not isinstance(answer, Vectors) or answer.number != batch.number:
            raise WorkerBroke(f"failed ({answer.why})" if isinstance(answer, Failed) else "answered out of turn")
        vectors = rows_of(answer, len(batch.sequences), self._load.width)
        if answer.bad and not last:
            raise WorkerBroke("gave vectors that are not finite")
        return vectors

    def _note_good(self, batch: RunBatch, answer: Vectors, watch: LazyWatch, seconds: float) -> None:
        """A forward pass has succeeded, and how fast."""
        tokens = batch.rows * batch.length
        self._proved_at = self._monotonic()
        self._starts_in_vain = 0
        self._bounds.passed((batch.rows, batch.length), answer.cpu_s, watch)
        if tokens >= SPEED_TOKENS_MIN:
            self._tokens_per_s = tokens / max(seconds, 1e-6)

    def _note_failure(self, error: Exception) -> None:
        self._proved_at = float("-inf")
        log.error("the engine of %s %s; it is being restarted", self._name, error)
