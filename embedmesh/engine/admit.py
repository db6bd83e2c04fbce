"""The bounded queue in front of a model: refuses early, runs at once when free, drops the work of who has gone.

A call's life here: admitted (or Overloaded), planned batch by batch, answered when its last vector is there. A caller
who is cancelled leaves the line at once; rows of its that are already running are computed and thrown away.
"""

import asyncio
from collections.abc import Awaitable, Callable

from embedmesh.engine.plan import Plan, Work, next_batch
from embedmesh.rules.errors import NodeBroke, NodeFailure, Overloaded

Run = Callable[[list[list[int]], int, int], Awaitable[list[bytes | None]]]
"""Token ids of some sequences, and the shape (rows, length) they run in -> one float32 vector each, or NodeFailure.

None in place of a vector: this sequence broke the engine.
"""

RETRY_AFTER_MAX_S = 30.0  # by then another node has surely taken it
SPEED_START = 5_000.0  # tokens a second, until something was measured
FORGET = 0.9  # of what the batches before took, at each new one: a node that is starved is slow at once


class Call:
    """One admitted call."""

    def __init__(self, sequences: list[list[int]]) -> None:
        self.sequences = sequences
        self.work = Work([len(sequence) for sequence in sequences])
        self.vectors: list[bytes | None] = [None] * len(sequences)
        self.missing = len(sequences)
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def put(self, place: int, vector: bytes) -> None:
        """Keep one vector; the call ends with its last."""
        self.vectors[place] = vector
        self.missing -= 1
        if not self.missing and not self.done.done():
            self.done.set_result(None)

    def fail(self, failure: NodeFailure) -> None:
        """End the call without vectors."""
        if not self.done.done():
            self.done.set_exception(failure)


class Admission:
    """The queue of one model. `tokens_max` bounds what waits, in padded tokens.

    A call that finds nothing waiting is always taken, so that a bound below the largest call refuses nobody forever.
    """

    def __init__(self, run: Run, *, tokens_max: int, on_batch: Callable[[Plan, float], None]) -> None:
        """`on_batch` is told of each batch that succeeded, and its seconds."""
        self._run = run
        self._tokens_max = tokens_max
        self._on_batch = on_batch
        self._line: list[Call] = []
        self._arrived = asyncio.Event()
        self._last_was_bulk = False
        self._tokens, self._seconds = SPEED_START * 1e-3, 1e-3  # of late
        self.waiting_tokens: int = 0
        self._open: set[Call] = set()  # not answered yet, waiting or running
        self._idle = asyncio.Event()
        self._idle.set()

    async def embed(self, sequences: list[list[int]]) -> list[bytes]:
        """One vector a sequence, in order. Raises Overloaded at once, or NodeFailure.

        `sequences` are token ids with special tokens, at least one each.
        """
        call = Call(sequences)
        if self._line and self.waiting_tokens + call.work.tokens > self._tokens_max:
            wait_s = min(self.expected_s(0), RETRY_AFTER_MAX_S)
            raise Overloaded("More text is waiting here than may wait. Try again shortly.", retry_after_s=wait_s)
        self._line.append(call)
        self._open.add(call)
        self._idle.clear()
        self.waiting_tokens += call.work.tokens
        self._arrived.set()
        try:
            await call.done
        finally:
            self._leave(call)
            self._open.remove(call)
            if not self._open:
                self._idle.set()
        return [vector for vector in call.vectors if vector is not None]

    async def idle(self) -> None:
        """Wait until every call is answered."""
        await self._idle.wait()

    @property
    def tokens_per_s(self) -> float:
        """Padded tokens a second, of late."""
        return self._tokens / self._seconds

    def expected_s(self, tokens: int) -> float:
        """Seconds until a call of so many tokens would be done, behind all that waits."""
        return (self.waiting_tokens + tokens) / self.tokens_per_s

    async def dispatch(self) -> None:
        """Run batch after batch until cancelled."""
        while True:
            plan = next_batch([call.work for call in self._line], last_was_bulk=self._last_was_bulk)
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
        members = self._take(plan)
        sequences = [call.sequences[place] for call, place in members]
        begun = asyncio.get_running_loop().time()
        try:
            vectors = await self._run(sequences, plan.rows, plan.length)
        except NodeFailure as failure:
            for call, _ in members:
                call.fail(NodeBroke(failure.message))
            return
        seconds = asyncio.get_running_loop().time() - begun
        self._tokens = FORGET * self._tokens + plan.rows * plan.length
        self._seconds = FORGET * self._seconds + max(seconds, 1e-6)
        self._on_batch(plan, seconds)
        for (call, place), vector in zip(members, vectors, strict=True):
            if vector is None:
                call.fail(NodeBroke("The node could not embed this: it breaks the engine."))
            else:
                call.put(place, vector)

    def _take(self, plan: Plan) -> list[tuple[Call, int]]:
        """Take a batch out of the line; who has more to run keeps its place."""
        members = [(self._line[at], place) for at, place in plan.members]
        places: dict[Call, set[int]] = {}
        for call, place in members:
            places.setdefault(call, set()).add(place)
        for call, taken in places.items():
            self.waiting_tokens -= call.work.tokens
            call.work.remove(taken)
            self.waiting_tokens += call.work.tokens
        self._line = [call for call in self._line if call.work.rows]
        self._last_was_bulk = plan.bulk
        return members

    def _leave(self, call: Call) -> None:
        if call in self._line:
            self._line.remove(call)
            self.waiting_tokens -= call.work.tokens
