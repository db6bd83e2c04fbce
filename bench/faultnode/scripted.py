"""A scripted model: a vector for any token ids, the same in every process, and the time that it says it takes."""

import asyncio
import zlib
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from embedmesh.engine.plan import BATCH_TOKENS_MAX
from embedmesh.rules.errors import Overloaded

SEED = 20_261_125  # of the right vectors; another seed is another model
ROWS = 8_192  # different vectors: two texts share one by chance once in so many pairs
WIDTH = 384  # of the default model
QUEUE_TOKENS_MAX = 600_000  # a node's default

Vectors = np.ndarray  # float32, [inputs, width], rows of unit length


@cache
def _table(seed: int, width: int) -> Vectors:
    rows = np.random.default_rng([seed, width]).standard_normal((ROWS, width), np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype("<f4")


def _row(ids: Sequence[int]) -> int:
    """Which row of the table. `array` writes as this machine does; all that we run on is little-endian."""
    return zlib.crc32(array("I", ids).tobytes()) % ROWS


def vector(ids: Sequence[int], *, seed: int = SEED, width: int = WIDTH) -> np.ndarray:
    """The one right vector of these token ids, special tokens not added."""
    return _table(seed, width)[_row(ids)]


def vectors(inputs: Sequence[Sequence[int]], *, seed: int = SEED, width: int = WIDTH) -> Vectors:
    """The vectors of several inputs; a few microseconds each."""
    return _table(seed, width)[[_row(ids) for ids in inputs]]


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
        """Returns when a call of so many tokens is done. Raises Overloaded. Cancelled, it gives up what has not run."""
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
        line, other = self._long, self._short
        if other and (not line or self._last_was_long):
            line, other = other, line
        self._running = bool(line)
        if not line:
            return
        self._last_was_long = line is self._long
        tokens, slowness, room = 0, line[0].slowness, BATCH_TOKENS_MAX
        while line and (not tokens or (not self._fifo and line[0].left <= room)):
            job = line[0]
            some = job.left if self._fifo else min(job.left, room)
            job.left -= some
            self.waiting_tokens -= some
            tokens += some
            room -= some
            if job.left:
                break
            self._batch.append(line.popleft())
        seconds = self._fixed_s + (tokens / self.tokens_per_s if self.tokens_per_s else 0.0)
        ends = at + seconds * slowness
        asyncio.get_running_loop().call_at(ends, self._ended, ends)

    def _ended(self, at: float) -> None:
        for job in self._batch:
            if not job.done.done():
                job.done.set_result(None)
        self._batch.clear()
        self._next(at)
