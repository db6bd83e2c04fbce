"""Keeps one worker process alive and honest: a deadline for each batch, a new process after any failure.

A batch is tried on at most two processes. What is not a finite vector on the second either is its text's own fault, and
the others of the batch are good; if the second process breaks too, halves of the batch are tried, to find what broke it
(isolate). When no process will start, the model is *down* and says so at once, so that nobody waits for what does not
come; `keep` goes on trying, with pauses.
"""

import asyncio
import contextlib
import functools
import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path

from embedmesh.engine.frames import Batch, Load, Vectors
from embedmesh.engine.isolate import isolate
from embedmesh.engine.plan import pad_length
from embedmesh.engine.process import WorkerBroke, WorkerProcess
from embedmesh.rules.errors import NodeBroke, SetupError

log = logging.getLogger("embedmesh.engine")

LATE = 3.0  # a batch that takes so many times what the last one's speed promises is no proof of life any more
SPEED_TOKENS_MIN = 128  # smaller batches are slower a token, and never take long
READY_S = 1.75  # a forward pass this young proves the model; "the truth within 2 s" leaves the rest for the asking
PROBE_S = 0.5  # an idle model is probed this often: 2 ms of work each
DEADLINE_BASE_S = 2.0  # first kernels of a shape, and a machine that is busy with other things
FLOPS_MIN = 50e9  # per second: a seventh of what two cores of our machines reach
START_BASE_S = 10.0  # half a second here; ten on a cold disk and a busy machine
START_BYTES_PER_S = 50e6  # weights are read and hashed from a slow network disk
PAUSES_S = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0)  # before the n-th start in a row without a good batch; "back within 3 s"
STARTS_MAX = 3  # failed in a row; then callers are not made to wait for the next
ISOLATE_S_MAX = 5.0  # others wait meanwhile; one among 64 that crashes the worker at once took 3 s
TRIES = 2  # the first may have met a worker that was already dying


class Supervisor:
    """One model's worker. `on_start` is called at every start of a process, the first included."""

    def __init__(
        self, load: Load, *, monotonic: Callable[[], float] = time.monotonic, on_start: Callable[[], None]
    ) -> None:
        self._load = load
        self._monotonic = monotonic
        self._on_start = on_start
        self._weights_bytes = _weights_bytes(Path(load.folder))
        self._worker: WorkerProcess | None = None
        self._turn = asyncio.Lock()
        self._numbers = itertools.count()
        self._proved_at = float("-inf")
        self._expected_s = 0.0  # of the batch that runs, by the speed of those before it
        self._tokens_per_s = float("inf")
        self._starts_in_vain = 0  # since the last good batch
        self._failed_starts = 0  # since the last process that loaded
        self.down: bool = False

    async def start(self) -> None:
        """Start the first process. Raises SetupError when the folder cannot be served, WorkerBroke otherwise."""
        async with self._turn:
            await self._ensure()
            await self._try_once([[0]], 1, pad_length(1))

    def ready(self) -> bool:
        """Whether a forward pass succeeded just now, or one that takes long is still in its time."""
        return self._monotonic() - self._proved_at <= max(READY_S, LATE * self._expected_s)

    async def run_each(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes | None]:
        """Like `run`, but a sequence that breaks the engine gives None, and the others their vectors.

        Raises NodeBroke when it is the only one and broke the process, or the model is down.
        """
        try:
            return await self._run(sequences, rows, length)
        except NodeBroke:
            if len(sequences) == 1 or self.down:
                raise
        ends = self._monotonic() + ISOLATE_S_MAX
        run_once = functools.partial(self._run, tries_max=1)
        return await isolate(sequences, length, run_once, lambda: not self.down and self._monotonic() < ends)

    async def run(self, sequences: list[list[int]], rows: int, length: int) -> list[bytes]:
        """One little-endian float32 vector a sequence. Raises NodeBroke after two processes failed on it."""
        vectors = await self._run(sequences, rows, length)
        good = [vector for vector in vectors if vector is not None]
        if len(good) < len(vectors):
            raise NodeBroke("The node could not embed this: what comes out is not a finite vector.")
        return good

    async def _run(
        self, sequences: list[list[int]], rows: int, length: int, *, tries_max: int = TRIES
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
            if self.down:
                break
        raise NodeBroke("The node could not embed this: its engine failed and is being restarted.")

    async def keep(self) -> None:
        """Probe while idle, and so restart what has died. Runs until cancelled."""
        while True:
            await asyncio.sleep(PROBE_S)
            if self._turn.locked() or self._monotonic() - self._proved_at < PROBE_S:
                continue
            with contextlib.suppress(NodeBroke):
                await self.run([[0]], 1, pad_length(1))

    async def stop(self) -> None:
        """End the process, if there is one, and wait until it is gone."""
        if self._worker is not None:
            worker, self._worker = self._worker, None
            worker.kill()
            await worker.gone()

    @property
    def pid(self) -> int | None:
        """The worker's process id, while there is one."""
        return self._worker.pid if self._worker else None

    async def _ensure(self) -> None:
        if self._worker is not None:
            return
        await asyncio.sleep(PAUSES_S[min(self._starts_in_vain, len(PAUSES_S) - 1)])
        self._starts_in_vain += 1
        self._on_start()
        deadline_s = START_BASE_S + self._weights_bytes / START_BYTES_PER_S
        try:
            self._worker = await WorkerProcess.start(self._load, deadline_s)
        except (WorkerBroke, SetupError) as error:
            self._failed_starts += 1
            self.down = isinstance(error, SetupError) or self._failed_starts >= STARTS_MAX
            raise
        self._failed_starts = 0
        self.down = False

    async def _try_once(
        self, sequences: list[list[int]], rows: int, length: int, *, last: bool = False
    ) -> list[bytes | None]:
        """One attempt. Vectors that are not finite condemn the process, or on the `last` attempt their texts."""
        worker = self._worker
        if worker is None:
            raise WorkerBroke("is not there")
        batch = Batch(next(self._numbers), rows, length, sequences)
        begun = self._monotonic()
        self._expected_s = rows * length / self._tokens_per_s
        try:
            answer = await worker.run(batch, self._deadline_s(rows * length))
            vectors = _cut(answer, len(sequences), self._load.width)
            if answer.bad and not last:
                raise WorkerBroke("gave vectors that are not finite")
        except BaseException:
            self._worker = None
            worker.kill()
            await asyncio.shield(worker.gone())
            raise
        finally:
            self._expected_s = 0.0
        if any(vector is not None for vector in vectors):
            self._proved_at = self._monotonic()
            self._starts_in_vain = 0
            if rows * length >= SPEED_TOKENS_MIN:
                self._tokens_per_s = rows * length / max(self._proved_at - begun, 1e-6)
        return vectors

    def _note_failure(self, error: Exception) -> None:
        self._proved_at = float("-inf")
        log.error("the engine of %s %s; it is being restarted", Path(self._load.folder).name, error)

    def _deadline_s(self, tokens: int) -> float:
        # Two operations a weight a token; the 4 bytes of each weight make that half a weights file.
        return DEADLINE_BASE_S + tokens * self._weights_bytes / 2 / FLOPS_MIN


def _cut(answer: Vectors, count: int, width: int) -> list[bytes | None]:
    """One vector a sequence; None for those that are not finite."""
    size = width * 4
    if len(answer.data) != count * size:
        raise WorkerBroke("answered with another number of components than asked")
    bad = set(answer.bad)
    return [None if at in bad else answer.data[at * size : (at + 1) * size] for at in range(count)]


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
