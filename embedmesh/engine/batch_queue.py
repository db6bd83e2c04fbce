"""The bounded queue in front of a model: refuses early, runs at once when free, drops the work of callers that left.

A call is admitted (or Overloaded), planned batch by batch, and answered when its last vector is there. A call that is
cancelled leaves the queue at once; those of its rows that are already running are computed and thrown away.
"""

import asyncio
from collections.abc import Callable

from embedmesh.engine.isolate import RunRows
from embedmesh.engine.plan import CallRows, Plan, next_batch
from embedmesh.rules.errors import NodeBroke, NodeFailure, Overloaded

QUEUE_RETRY_AFTER_MAX_S = 30.0  # by then another node has surely taken it
SPEED_START = 5_000.0  # tokens a second, until something was measured
SPEED_DECAY = 0.9  # weight of earlier batches at each new one: a node that is starved is slow at once


class EmbedCall:
    """One admitted call."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.rows = CallRows([len(sequence) for sequence in sequences])
        self.vectors: list[bytes | None] = [None] * len(sequences)
        self.missing = len(sequences)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, index: int, vector: bytes) -> None:
        """Keep one vector; the call ends with its last."""
        self.vectors[index] = vector
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, failure: NodeFailure) -> None:
        """End the call without vectors."""
        if not self.done.done():
            self.done.set_exception(failure)


class BatchQueue:
    """The queue of one model. `tokens_max` bounds what waits, in padded tokens.

    A call that finds nothing waiting is always taken, so that a bound below the largest call refuses nobody forever.
    """

    def __init__(self, run: RunRows, *, tokens_max: int, on_batch: Callable[[Plan, float], None]) -> None:
        """`on_batch` is called with each batch that succeeded, and its seconds."""
        self._run = run
        self._tokens_max = tokens_max
        self._on_batch = on_batch
        self._queue: list[EmbedCall] = []
        self._arrived = asyncio.Event()
        self._last_was_bulk = False
        self._tokens, self._seconds = SPEED_START * 1e-3, 1e-3  # of the last batches
        self.waiting_tokens: int = 0
        self._open: set[EmbedCall] = set()  # not answered yet, waiting or running

    async def embed(self, sequences: list[list[int]]) -> list[bytes]:
        """One vector a sequence, in order. Raises Overloaded at once, or NodeFailure.

        `sequences` are token ids with special tokens, at least one each.
        """
        call = EmbedCall(sequences)
        if self._queue and self.waiting_tokens + call.rows.tokens > self._tokens_max:
            wait_s = min(self.expected_s(0), QUEUE_RETRY_AFTER_MAX_S)
            raise Overloaded("This node's queue is full. Try again shortly.", retry_after_s=wait_s)
        self._queue.append(call)
        self._open.add(call)
        self.waiting_tokens += call.rows.tokens
        self._arrived.set()
        try:
            await call.done
        finally:
            if call in self._queue:
                self._queue.remove(call)
                self.waiting_tokens -= call.rows.tokens
            self._open.remove(call)
        return [vector for vector in call.vectors if vector is not None]

    async def idle(self) -> None:
        """Wait until every call that is there now is answered."""
        if self._open:
            await asyncio.wait([call.done for call in self._open])

    @property
    def tokens_per_s(self) -> float:
        """Padded tokens a second, over the last batches."""
        return self._tokens / self._seconds

    def expected_s(self, tokens: int) -> float:
        """Seconds until a call of `tokens` tokens would be done, behind all that waits."""
        return (self.waiting_tokens + tokens) / self.tokens_per_s

    async def dispatch(self) -> None:
        """Run batch after batch until cancelled."""
        while True:
            plan = next_batch([call.rows for call in self._queue], last_was_bulk=self._last_was_bulk)
            if plan is None:
                self._arrived.clear()
                await self._arrived.wait()
            else:
                await self._run_one(plan)

    def fail_all(self, failure: NodeFailure) -> None:
        """End every call that is not answered: the model will not be back soon."""
        for call in self._open:
            call.fail(failure)

    async def _run_one(self, plan: Plan) -> None:
        picked = self._take(plan)
        begun = asyncio.get_running_loop().time()
        try:
            vectors = await self._run([call.sequences[at] for call, at in picked], plan.rows, plan.length)
        except NodeFailure as failure:
            for call, _ in picked:
                call.fail(NodeBroke(failure.message))
            return
        seconds = asyncio.get_running_loop().time() - begun
        self._tokens = SPEED_DECAY * self._tokens + plan.rows * plan.length
        self._seconds = SPEED_DECAY * self._seconds + max(seconds, 1e-6)
        self._on_batch(plan, seconds)
        for (call, at), vector in zip(picked, vectors, strict=True):
            if vector is None:
                call.fail(NodeBroke("The node could not embed this: it breaks the engine."))
            else:
                call.put(at, vector)

    def _take(self, plan: Plan) -> list[tuple[EmbedCall, int]]:
        """Take a batch's rows out of the queue; a call with more rows keeps its position."""
        picked = [(self._queue[call], at) for call, at in plan.picks]
        taken: dict[EmbedCall, set[int]] = {}
        for call, at in picked:
            taken.setdefault(call, set()).add(at)
        for call, indexes in taken.items():
            self.waiting_tokens -= call.rows.tokens
            call.rows.remove(indexes)
            self.waiting_tokens += call.rows.tokens
        self._queue = [call for call in self._queue if call.rows.rows]
        self._last_was_bulk = plan.bulk
        return picked
