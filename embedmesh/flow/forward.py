"""Ask nodes until every input has its vector. The caller's hold covers all attempts, and is charged once.

The scheduler says which inputs go to which node, and when. Here the nodes are asked; failed parts go back to the queue.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from functools import partial

from embedmesh.deadline import within
from embedmesh.rules.deadlines import LOOK_AGAIN_S, attempt_s, request_s
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import (
    BadNodeResponse,
    ContextLengthExceeded,
    DeadlineExceeded,
    Failure,
    InvalidValue,
    NodeBusy,
    NodeFailure,
    NodeRefused,
    NodeTooSlow,
    NoNodeAvailable,
    Overloaded,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.forwarding import Answer, Attempt, Fleet, NodeClient, Observer, Part, Share, Ticket, Verify
from embedmesh.rules.holds import Hold
from embedmesh.rules.models import Model
from embedmesh.rules.request_record import CURRENT

log = logging.getLogger("embedmesh.flow")

RETRY_AFTER_MAX_S = 60.0  # the most that one node's Retry-After counts: others may be free before


class Begun:
    """An attempt that was begun without a coroutine, from when on one waits for it."""

    def __init__(self, part: Part, attempt: Attempt, spent_s: float) -> None:
        """It has taken `spent_s` until now."""
        loop = asyncio.get_running_loop()
        self.part = part
        self.at = loop.time() - spent_s  # when it began
        self._attempt = attempt
        self.outcome: asyncio.Future[EmbedVectors] = loop.create_future()
        self.outcome.add_done_callback(lambda outcome: outcome.cancelled() or outcome.exception())  # it is not awaited

    async def reply(self) -> EmbedVectors:
        """The node's answer, not yet checked. Raises a NodeFailure. Cancelling it breaks the attempt off."""
        try:
            return await self.outcome
        except asyncio.CancelledError:
            self._attempt.cancel()
            raise

    def answered(self, vectors: EmbedVectors) -> None:
        if not self.outcome.done():  # else it was cancelled a moment ago
            self.outcome.set_result(vectors)

    def failed(self, failure: NodeFailure) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(failure)


def time_allowed_s(model: Model, tokens: int, fleet: Fleet) -> float:
    """Seconds that a request may take from now on, all attempts together. Decided once: its hold lasts as long.

    Raises NoNodeAvailable if there is no node.
    """
    expected_s = fleet.expected_s(model, tokens)
    if expected_s is None:
        raise caller_failure(None)
    return request_s(expected_s)


async def forward(
    model: Model,
    counted: Counted,
    held: Hold,
    within_s: float,
    fleet: Fleet,
    client: NodeClient,
    verify: Verify,
    observer: Observer,
    begun: Begun | None = None,
) -> Answer:
    """Get right answers to all inputs from the nodes that would be done first, or else from others.

    `begun` is an attempt for all inputs that is under way. Raises NoNodeAvailable, Overloaded, BadNodeResponse or
    DeadlineExceeded.
    """
    asking = Asking(model, counted, held.hold_id, client, verify, observer, within_s, begun)
    if begun is not None:
        ticket = fleet.adopt(model, counted, held.account_id, asking, begun.part)
    else:
        fleet.may_wait(model, counted.tokens, held.account_id)  # others may have come while the hold became durable
        ticket = fleet.enter(model, counted, held.account_id, asking)
    try:
        return await asking.answer(ticket)
    except TimeoutError:
        raise DeadlineExceeded("The request took longer than it may. Send fewer or shorter inputs at once.") from None
    finally:
        ticket.leave()
        await asking.stop(ticket)


class Asking:
    """One request's attempts. Implements the port `Asker`."""

    def __init__(
        self,
        model: Model,
        counted: Counted,
        request_id: str,
        client: NodeClient,
        verify: Verify,
        observer: Observer,
        within_s: float,
        begun: Begun | None = None,
    ) -> None:
        """All attempts together may take `within_s` seconds. One of them may have `begun`."""
        self._time = asyncio.get_running_loop().time
        self._until = self._time() + within_s
        self._model = model
        self._counted = counted
        self._request_id = request_id
        self._client = client
        self._verify = verify
        self._observer = observer
        self._begun = begun
        self._parts: deque[Part] = deque()  # to be asked
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[Part, None] = {}  # for their tasks to begin: one that is cancelled before that never does
        self._answers = _Answers(counted.lengths, model.width * 4)
        self._failure: BaseException | None = None  # a Failure, or a bug
        self._news: asyncio.Future[None] | None = None  # what `answer` waits for

    def take(self, part: Part) -> None:
        self._parts.append(part)
        self._tell()

    def give_up(self, last: NodeFailure | None) -> None:
        self._failure = caller_failure(last)
        self._tell()

    async def answer(self, ticket: Ticket) -> Answer:
        """Wait for all answers. Raises a Failure, or TimeoutError when the request's time has passed."""
        while True:
            while self._parts and self._failure is None:
                part = self._parts.popleft()
                hedge_after_s = ticket.hedge_after_s(part)
                if len(part.rows) == len(self._counted.lengths) and hedge_after_s is None:
                    await self._ask(ticket, part)  # the ordinary case: one part, and nothing else to do meanwhile
                    continue
                self._waiting[part] = None
                task = asyncio.create_task(self._ask_beside(ticket, part))
                self._tasks.add(task)
                task.add_done_callback(self._done)
                if hedge_after_s is not None:
                    asyncio.get_running_loop().call_later(hedge_after_s, ticket.hedge, part)
            if self._failure is not None:
                raise self._failure
            if self._answers.missing == 0:
                return self._answers.whole(self._model.width)
            self._news = asyncio.get_running_loop().create_future()
            with within(self._left_s()):
                await self._news

    async def stop(self, ticket: Ticket) -> None:
        """Break running attempts off; their nodes notice."""
        while self._parts:
            ticket.abandoned(self._parts.popleft())
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in self._waiting:
            ticket.abandoned(part)

    async def _ask_beside(self, ticket: Ticket, part: Part) -> None:
        del self._waiting[part]
        await self._ask(ticket, part)

    async def _ask(self, ticket: Ticket, part: Part) -> None:
        """Make one attempt. Its failure is the request's, unless another node will be asked."""
        if (record := CURRENT.get()) is not None:
            record.node = part.node_id
        try:
            reply = await self._attempt(ticket, part)
        except NodeFailure as failure:
            known = {"request_id": self._request_id, "node": part.node_id}
            log.debug("an attempt failed: %s", type(failure).__name__, extra=known)
            if not ticket.ended(part, failure):
                self._failure = self._failure or caller_failure(failure)
        except BaseException as reason:
            ticket.abandoned(
                part, late=isinstance(reason, TimeoutError)
            )  # the request's time passed, or its caller went
            raise
        else:
            ticket.ended(part, None)
            if self._answers.put(part, reply):
                self._observer.answered(self._model, self._counted, part, reply)

    async def _attempt(self, ticket: Ticket, part: Part) -> EmbedVectors:
        begun, self._begun = self._begun, None  # only the first attempt can be it
        spent_s = self._time() - begun.at if begun is not None else 0.0
        allowed_s = max(0.0, min(self._left_s(), attempt_s(part.expected_s) - spent_s))
        try:
            with within(allowed_s, partial(self._more_s, ticket, part)):
                if begun is not None:
                    reply = await begun.reply()
                else:
                    reply = await self._client.embed(part, self._model, self._counted, self._request_id)
        except TimeoutError:
            if not self._left_s():
                raise  # the request's own time has passed
            raise NodeTooSlow("the attempt's deadline passed") from None
        self._verify(reply, self._model, part, self._counted.exact)
        return reply

    def _more_s(self, ticket: Ticket, part: Part) -> float:
        """How much longer a late attempt may take: no longer if another node may be asked instead."""
        return 0.0 if ticket.may_ask_another(part) else min(self._left_s(), LOOK_AGAIN_S)

    def _left_s(self) -> float:
        return max(0.0, self._until - self._time())

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._failure = self._failure or task.exception()
        self._tell()

    def _tell(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)


class _Answers:
    """Rows of vectors by input, and the nodes that made them. The first answer to an input counts."""

    def __init__(self, lengths: Sequence[int], row_bytes: int) -> None:
        self._lengths = lengths
        self._in_order = tuple(range(len(lengths)))
        self._unanswered = set(self._in_order)
        self._row_bytes = row_bytes
        self._data: bytes | bytearray = b""
        self._tokens = 0
        self._by_node: dict[tuple[str, int], int] = {}

    @property
    def missing(self) -> int:
        """The number of inputs without an answer."""
        return len(self._unanswered)

    def put(self, part: Part, reply: EmbedVectors) -> bool:
        """Take the checked answer to a part. Returns whether any of it is new.

        A hedge may cover only some of a part's inputs; the first answer to each counts.
        """
        fresh = [at for at, row in enumerate(part.rows) if row in self._unanswered]
        if not fresh:
            return False
        whole = len(fresh) == len(part.rows)
        if whole and part.rows == self._in_order:
            self._data = reply.data
        else:
            self._scatter(part.rows, reply.data, fresh)
        self._unanswered.difference_update(part.rows)
        tokens = reply.tokens
        if not whole:
            tokens = min(tokens, sum(self._lengths[part.rows[at]] for at in fresh))
        self._tokens += tokens
        node = part.node_id, part.ask
        self._by_node[node] = self._by_node.get(node, 0) + tokens
        return True

    def whole(self, width: int) -> Answer:
        """All rows in order."""
        most_first = sorted(self._by_node.items(), key=lambda each: -each[1])
        shares = tuple(Share(node_id, tokens, ask) for (node_id, ask), tokens in most_first)
        return Answer(data=bytes(self._data), width=width, tokens=self._tokens, shares=shares)

    def _scatter(self, inputs: tuple[int, ...], data: bytes, fresh: Sequence[int]) -> None:
        size = self._row_bytes
        if not self._data:
            self._data = bytearray(len(self._in_order) * size)
        assert isinstance(self._data, bytearray)
        rows, target = memoryview(data), memoryview(self._data)
        for at in fresh:
            row = inputs[at]
            target[row * size : (row + 1) * size] = rows[at * size : (at + 1) * size]


def caller_failure(last: NodeFailure | None) -> Failure:
    """The caller's failure when no attempt succeeded."""
    match last:
        case NodeBusy(retry_after_s=wait_s):
            wait_s = min(max(wait_s, 1.0), RETRY_AFTER_MAX_S)
            return Overloaded("Every node is full of work. Try again shortly.", retry_after_s=wait_s)
        case NodeTooSlow():
            return DeadlineExceeded("No node answered in time. Try again.")
        case UpstreamRefused(too_long=True):
            return ContextLengthExceeded("The input, with its answer's limit if any, is longer than this model takes.")
        case UpstreamRefused(said=said) if said:
            return InvalidValue(f"The server that runs this model refuses the request: {said}")
        case UpstreamRefused():
            return BadNodeResponse("The server that runs this model refused the inputs. Are they too long for it?")
        case WrongAnswer() | NodeRefused():
            return BadNodeResponse("No node gave a right answer, so none was delivered. Try again.")
        case _:
            return NoNodeAvailable("No node serves this model right now. Try again shortly.")
