"""The bounded queue in front of a model: refuses early, runs at once when free, drops the work of callers that left.

A call is admitted (or Overloaded), planned batch by batch, and answered when its last vector is there. A call that is
dropped leaves the queue at once; those of its rows that are already running are computed and thrown away. Nothing here
is a coroutine: a call begins its batch where the engine is free, and each batch that ends begins the next.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic

from embedmesh.engine.isolate import BeginRows, Rows
from embedmesh.engine.plan import CallRows, Plan, next_batch
from embedmesh.rules.errors import NodeBroke, NodeFailure, Overloaded

QUEUE_RETRY_AFTER_MAX_S = 30.0  # by then another node has surely taken it
SPEED_START = 5_000.0  # tokens a second, until something was measured
SPEED_DECAY = 0.9  # weight of earlier batches at each new one: a node that is starved is slow at once

OnEnd = Callable[[list[bytes] | NodeFailure], None]
"""Called once, later, with one vector a sequence, in order, or with why there are none."""


class EmbedCall:
    """One admitted call."""

    __slots__ = ("_on_end", "missing", "over", "rows", "sequences", "vectors")

    def __init__(self, sequences: list[list[int]], on_end: OnEnd, *, alone: bool = False) -> None:
        self.sequences = sequences
        self.rows = CallRows([len(sequence) for sequence in sequences], alone=alone)
        self.vectors: list[bytes] = [b""] * len(sequences)
        self.missing = len(sequences)
        self.over = False  # answered, failed or dropped
        self._on_end = on_end

    def end(self, outcome: list[bytes] | NodeFailure) -> None:
        """Answer it."""
        self.over = True
        self._on_end(outcome)


class BatchQueue:
    """The queue of one model. `tokens_max` bounds what waits, in padded tokens.

    A call that finds nothing waiting is always taken, so that a bound below the largest call refuses nobody forever.
    """

    def __init__(
        self,
        begin: BeginRows,
        *,
        tokens_max: int,
        on_batch: Callable[[Plan, float], None],
        on_failure: Callable[[NodeBroke], None] = lambda failure: None,
    ) -> None:
        """`on_batch` is called with each batch that succeeded, and its seconds; `on_failure` when one has failed."""
        self._begin = begin
        self._on_failure = on_failure
        self._tokens_max = tokens_max
        self._on_batch = on_batch
        self._queue: list[EmbedCall] = []
        self._running = False  # a batch
        self._last_was_bulk = False
        self._tokens, self._seconds = SPEED_START * 1e-3, 1e-3  # of the last batches
        self.waiting_tokens: int = 0
        self.batch_began = 0.0  # of the batch whose calls are being answered, on the monotonic clock
        self._open: dict[EmbedCall, None] = {}  # not answered yet, waiting or running
        self._idle: list[asyncio.Future[None]] = []  # who waits until there are none

    def submit(self, sequences: list[list[int]], on_end: OnEnd, *, alone: bool = False) -> EmbedCall:
        """Take a call: token ids with special tokens, at least one sequence. Raises Overloaded at once.

        No batch of a call that runs `alone` has rows of others.
        """
        call = EmbedCall(sequences, on_end, alone=alone)
        if self._queue and self.waiting_tokens + call.rows.tokens > self._tokens_max:
            wait_s = min(self.expected_s(0), QUEUE_RETRY_AFTER_MAX_S)
            raise Overloaded("This node's queue is full. Try again shortly.", retry_after_s=wait_s)
        self._queue.append(call)
        self._open[call] = None
        self.waiting_tokens += call.rows.tokens
        if not self._running:
            self._run_next()
        return call

    def drop(self, call: EmbedCall) -> None:
        """Its caller has gone: it is not answered any more."""
        call.over = True
        self._forget(call)

    async def embed(self, sequences: list[list[int]], *, alone: bool = False) -> list[bytes]:
        """One vector a sequence, in order. Raises Overloaded at once, or NodeFailure."""
        ended: asyncio.Future[list[bytes] | NodeFailure] = asyncio.get_running_loop().create_future()
        call = self.submit(sequences, lambda outcome: None if ended.done() else ended.set_result(outcome), alone=alone)
        try:
            outcome = await ended
        finally:
            self.drop(call)
        if isinstance(outcome, NodeFailure):
            raise outcome
        return outcome

    async def idle(self) -> None:
        """Wait until every call is answered."""
        if self._open:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._idle.append(waiter)
            await waiter

    @property
    def calls(self) -> tuple[int, int]:
        """Calls of which something waits for its batch, and calls whose last batch runs."""
        return len(self._queue), len(self._open) - len(self._queue)

    @property
    def tokens_per_s(self) -> float:
        """Padded tokens a second, over the last batches."""
        return self._tokens / self._seconds

    def expected_s(self, tokens: int) -> float:
        """Seconds until a call of `tokens` tokens would be done, behind all that waits."""
        return (self.waiting_tokens + tokens) / self.tokens_per_s

    def fail_all(self, failure: NodeFailure) -> None:
        """End every call that is not answered: the model will not be back soon."""
        for call in list(self._open):
            self._end(call, failure)

    def _run_next(self) -> None:
        plan = None
        if self._queue:
            plan = next_batch([call.rows for call in self._queue], last_was_bulk=self._last_was_bulk)
        self._running = plan is not None
        if plan is not None:
            picked = self._take(plan)
            sequences = [call.sequences[at] for call, at in picked]
            self._begin(sequences, plan.rows, plan.length, partial(self._ran, plan, picked, monotonic()))

    def _ran(self, plan: Plan, picked: list[tuple[EmbedCall, int]], begun: float, outcome: Rows | NodeBroke) -> None:
        seconds, self.batch_began = monotonic() - begun, begun
        if isinstance(outcome, NodeBroke):
            for call, _ in picked:
                self._end(call, NodeBroke(outcome.message))
            self._on_failure(outcome)
            self._run_next()
            return
        self._tokens = SPEED_DECAY * self._tokens + plan.rows * plan.length
        self._seconds = SPEED_DECAY * self._seconds + max(seconds, 1e-6)
        if None in outcome:  # these first, so that nothing more of theirs is run
            for (call, _), vector in zip(picked, outcome, strict=True):
                if vector is None:
                    self._end(call, NodeBroke("The node could not embed this: it breaks the engine."))
        self._run_next()  # before the others are answered: the engine has waited long enough
        for (call, at), vector in zip(picked, outcome, strict=True):
            if vector is not None:
                call.vectors[at] = vector
                call.missing -= 1
                if not call.missing:
                    self._end(call, call.vectors)
        self._on_batch(plan, seconds)

    def _end(self, call: EmbedCall, outcome: list[bytes] | NodeFailure) -> None:
        if call.over:
            return
        self._forget(call)
        call.end(outcome)

    def _forget(self, call: EmbedCall) -> None:
        if call not in self._open:
            return
        del self._open[call]
        if call.rows.rows:
            self._queue.remove(call)
            self.waiting_tokens -= call.rows.tokens
        if not self._open:
            for waiter in self._idle:
                if not waiter.done():
                    waiter.set_result(None)
            self._idle.clear()

    def _take(self, plan: Plan) -> list[tuple[EmbedCall, int]]:
        """Take a batch's rows out of the queue; a call with more rows keeps its position."""
        self._last_was_bulk = plan.bulk
        picked = [(self._queue[call], at) for call, at in plan.picks]
        if len(picked) == len(picked[0][0].rows.rows) == 1:  # all of a call of one row
            call, at = picked[0]
            self.waiting_tokens -= call.rows.tokens
            call.rows.remove({at})
            self._queue.remove(call)
            return picked
        taken: dict[EmbedCall, set[int]] = {}
        for call, at in picked:
            taken.setdefault(call, set()).add(at)
        for call, indexes in taken.items():
            self.waiting_tokens -= call.rows.tokens
            call.rows.remove(indexes)
            self.waiting_tokens += call.rows.tokens
        self._queue = [call for call in self._queue if call.rows.rows]
        return picked
