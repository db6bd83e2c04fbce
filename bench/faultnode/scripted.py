"""A scripted model: a vector for any token ids, the same in every process, and the time that it takes."""

import asyncio
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from bench.rig.http import Vectors
from embedmesh.engine.plan import BATCH_TOKENS_MAX
from embedmesh.rules.errors import Overloaded

SEED = 20_261_125  # of the right vectors; another seed is another model
ROWS = 8_192  # different vectors: two texts share one by chance once in ROWS pairs
WIDTH = 384  # of the default model
QUEUE_TOKENS_MAX = 600_000  # a node's default


@cache
def _table(seed: int, width: int) -> Vectors:
    rows: Vectors = np.random.default_rng([seed, width]).standard_normal((ROWS, width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype("<f4")


def _row(ids: Sequence[int]) -> int:
    """Which row of the table. `array` writes as this machine does; all that we run on is little-endian."""
    return zlib.crc32(array("I", ids).tobytes()) % ROWS


def vector(ids: Sequence[int], *, seed: int = SEED, width: int = WIDTH) -> Vectors:
    """The one right vector of these token ids, special tokens not added."""
    found: Vectors = _table(seed, width)[_row(ids)]
    return found


def vectors(inputs: Sequence[Sequence[int]], *, seed: int = SEED, width: int = WIDTH) -> Vectors:
    """The vectors of several inputs; a few microseconds each."""
    found: Vectors = _table(seed, width)[[_row(ids) for ids in inputs]]
    return found


@dataclass(eq=False, slots=True)
class _Job:
    left: int  # tokens that no batch has taken yet
    slowness: float
    done: asyncio.Future[None]


class Pace:
    """One worker that takes `fixed_s` for a batch and its tokens' time besides.

    Like our node it runs short calls together, and in turns with batches of long ones; with `fifo` it runs one call
    after another, each as one batch. Time is counted exactly: a timer that fires late makes nothing slower.
    """

    def __init__(self, tokens_per_s: float, fixed_s: float, *, fifo: bool = False) -> None:
        """Without a speed, 0, everything is done at once."""
        self.tokens_per_s = tokens_per_s
        self.waiting_tokens = 0
        self._fixed_s = fixed_s
        self._fifo = fifo
        self._short: deque[_Job] = deque()
        self._long: deque[_Job] = deque()
        self._batch: list[_Job] = []  # those of them that end with the running one
        self._running = False
        self._last_was_long = False

    async def work(self, tokens: int, slowness: float = 1.0) -> None:
        """Returns when a call of `tokens` is done. Raises Overloaded. Cancelled, it gives up what has not run."""
        if not self.tokens_per_s and not self._fixed_s:
            return
        if self.waiting_tokens + tokens > QUEUE_TOKENS_MAX:
            raise Overloaded("More tokens are waiting here than may wait.")
        loop = asyncio.get_running_loop()
        job = _Job(tokens, slowness, loop.create_future())
        (self._long if tokens > BATCH_TOKENS_MAX and not self._fifo else self._short).append(job)
        self.waiting_tokens += tokens
        if not self._running:
            self._next(loop.time())
        try:
            await job.done
        finally:
            self.waiting_tokens -= job.left
            job.left = 0

    def _next(self, at: float) -> None:
        """Begin a batch at a moment which may just have passed."""
        for queue in (self._short, self._long):
            while queue and queue[0].done.cancelled():
                queue.popleft()
        queue, other = self._long, self._short
        if other and (not queue or self._last_was_long):
            queue, other = other, queue
        self._running = bool(queue)
        if not queue:
            return
        self._last_was_long = queue is self._long
        tokens, slowness, room = 0, queue[0].slowness, BATCH_TOKENS_MAX
        while queue and (not tokens or (not self._fifo and queue[0].left <= room)):
            job = queue[0]
            some = job.left if self._fifo else min(job.left, room)
            job.left -= some
            self.waiting_tokens -= some
            tokens += some
            room -= some
            if job.left:
                break
            self._batch.append(queue.popleft())
        seconds = self._fixed_s + (tokens / self.tokens_per_s if self.tokens_per_s else 0.0)
        ends = at + seconds * slowness
        asyncio.get_running_loop().call_at(ends, self._ended, ends)

    def _ended(self, at: float) -> None:
        for job in self._batch:
            if not job.done.done():
                job.done.set_result(None)
        self._batch.clear()
        self._next(at)
