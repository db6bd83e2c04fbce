"""What a traced request does in the queue and with nodes: the ports that it sees mark that, and pass it on."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from random import getrandbits
from typing import Any, NamedTuple, cast

from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, WrongAnswer
from embedmesh.rules.forwarding import Asker, Attempt, AttemptOwner, Fleet, NodeClient, NodeLink, Part, Ticket
from embedmesh.rules.generation import GeneratingClient, GenerationRequest, NodeStream
from embedmesh.rules.models import Model
from embedmesh.rules.traces import Attribute, Trace, Tracing, asking_as, traceparent_of

CANCELLED, LATE = "cancelled", "timeout"


class TracedNode(NamedTuple):
    """What a trace tells of a node. Only a trusted one is told of the trace."""

    trusted: bool
    address: str


NodeOf = Callable[[str], TracedNode | None]
"""The node of that id."""
Now = Callable[[], float]
"""The monotonic clock."""


class RequestTracing(NamedTuple):
    """What is needed to trace requests."""

    tracing: Tracing
    node_of: NodeOf
    now: Now


class TracedAttempts:
    """Marks what one request does in the queue and with nodes: waiting, attempts, the check of each answer."""

    def __init__(self, trace: Trace, traced: RequestTracing, *, sealed: bool = False) -> None:
        """An attempt with a `sealed` request ends in the same way whether it went well or not: its call says it."""
        self.trace = trace
        self.now = traced.now
        self._node_of = traced.node_of
        self._sealed = sealed
        self.waits_from = trace.began
        self._running: dict[Part, tuple[float, int]] = {}  # began, span; bounded by what nodes may have at one time
        self._answered: dict[Part, float] = {}

    def given(self, part: Part) -> None:
        """A node gets a part; one that it has had already is adopted."""
        if part in self._running:
            return
        now = self.now()
        self.trace.mark("queue", self.waits_from, now)
        self._running[part] = now, getrandbits(64)

    def asking(self, part: Part, request_id: str) -> AbstractContextManager[None]:
        """What is sent inside tells a trusted node of the trace."""
        node, running = self._node_of(part.node_id), self._running.get(part)
        if node is None or not node.trusted or running is None:
            return asking_as(request_id, "")
        return asking_as(request_id, traceparent_of(self.trace.trace_id, running[1]))

    def answered(self, part: Part) -> None:
        """The node's answer is there, not yet checked."""
        self._answered[part] = self.now()

    def ended(self, part: Part, failure: NodeFailure | None, now: float) -> None:
        """Its answer was right, or it has failed: as an attempt, or by its answer."""
        error = "" if failure is None else failure.check.value
        answered = self._answered.get(part)
        wrong = isinstance(failure, WrongAnswer) and answered is not None
        self._attempted(part, now if answered is None else answered, "" if wrong else error)
        if answered is not None:
            self.trace.mark("verify", answered, now, error if wrong else "")
        if failure is not None:
            self.waits_from = now

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """It was given up, or has ended without anything that is to be learned of its node."""
        answered = self._answered.get(part)
        error = "" if self._sealed or answered is not None else LATE if late else CANCELLED
        self._attempted(part, self.now() if answered is None else answered, error)

    def _attempted(self, part: Part, ended: float, error: str) -> None:
        running = self._running.pop(part, None)
        self._answered.pop(part, None)
        if running is None:
            return
        node = self._node_of(part.node_id)
        attributes: dict[str, Attribute] = {
            "embedmesh.node_id": part.node_id,
            "embedmesh.node_address": "" if node is None else node.address,
            "embedmesh.inputs": len(part.rows),
            "embedmesh.tokens": part.tokens,
        }
        self.trace.mark("attempt", running[0], ended, error, attributes, running[1])


class TracedFleet:
    """Implements the port `Fleet`, around the real one."""

    def __init__(self, fleet: Fleet, attempts: TracedAttempts) -> None:
        self._fleet = fleet
        self._attempts = attempts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._fleet, name)

    def enter(self, model: Model, counted: Counted, account_id: str, asker: Asker, *more: Any) -> Ticket:
        attempts = self._attempts
        attempts.waits_from = attempts.now()
        asker = TracedAsker(asker, attempts)
        return cast(Ticket, TracedTicket(self._fleet.enter(model, counted, account_id, asker, *more), attempts))

    def adopt(self, model: Model, counted: Counted, account_id: str, asker: Asker, part: Part) -> Ticket:
        asker = TracedAsker(asker, self._attempts)
        return cast(Ticket, TracedTicket(self._fleet.adopt(model, counted, account_id, asker, part), self._attempts))

    def try_now(self, model: Model, counted: Counted, now: float) -> Part | None:
        attempts = self._attempts
        attempts.waits_from = attempts.now()
        part = self._fleet.try_now(model, counted, now)
        if part is not None:
            attempts.given(part)
        return part

    def answered_now(self, part: Part, now: float) -> bool:
        self._attempts.ended(part, None, now)
        return self._fleet.answered_now(part, now)

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self._attempts.abandoned(part, late=late)
        self._fleet.abandoned(part, late=late)


class TracedAsker(NamedTuple):
    """Implements the port `Asker`."""

    asker: Asker
    attempts: TracedAttempts

    def take(self, part: Part) -> None:
        self.attempts.given(part)
        self.asker.take(part)

    def give_up(self, last: NodeFailure | None) -> None:
        self.asker.give_up(last)


class TracedTicket:
    """Implements the port `Ticket`."""

    def __init__(self, ticket: Ticket, attempts: TracedAttempts) -> None:
        self._ticket = ticket
        self._attempts = attempts

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ticket, name)

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        self._attempts.ended(part, failure, self._attempts.now())
        return self._ticket.ended(part, failure)

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self._attempts.abandoned(part, late=late)
        self._ticket.abandoned(part, late=late)


class TracedClient(NamedTuple):
    """Implements the port `NodeClient`."""

    client: NodeClient
    attempts: TracedAttempts

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        with self.attempts.asking(part, request_id):
            reply = await self.client.embed(part, model, counted, request_id)
        self.attempts.answered(part)
        return reply

    def link_to(self, node_id: str) -> "TracedLink | None":
        link = self.client.link_to(node_id)
        return None if link is None else TracedLink(link, self.attempts)


class TracedLink(NamedTuple):
    """As much of the port `NodeLink` as the straight path needs."""

    link: NodeLink
    attempts: TracedAttempts

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        with self.attempts.asking(part, request_id):
            return self.link.ask(part, model, counted, request_id, TracedOwner(owner, part, self.attempts))


class TracedOwner(NamedTuple):
    """Implements the port `AttemptOwner`."""

    owner: AttemptOwner
    part: Part
    attempts: TracedAttempts

    def answered(self, vectors: EmbedVectors) -> None:
        self.attempts.answered(self.part)
        self.owner.answered(vectors)

    def failed(self, failure: NodeFailure) -> None:
        self.owner.failed(failure)


class TracedGenerating(NamedTuple):
    """Implements the port `GeneratingClient`."""

    client: GeneratingClient
    attempts: TracedAttempts

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        with self.attempts.asking(part, request_id):
            return await self.client.generate(part, model, asked, request_id)

    async def stream(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> NodeStream:
        with self.attempts.asking(part, request_id):
            return await self.client.stream(part, model, asked, request_id)
