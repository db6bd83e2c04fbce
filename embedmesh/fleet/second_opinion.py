"""Ask another node the same: a question stands in the queue like a caller's request, and never goes to some nodes."""

import asyncio
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from embedmesh.deadline import within
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.registry import Node
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.rules.deadlines import LOOK_AGAIN_S, attempt_s
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, NodeTooSlow, Overloaded
from embedmesh.rules.forwarding import Part, Ticket
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model

Matrix = np.ndarray[Any, np.dtype[np.float32]]


class Opinion(NamedTuple):
    """A node's verified vectors, or logits, one a row."""

    node: Node
    vectors: Matrix


class SecondOpinions:
    """Gets opinions from the nodes of one gateway."""

    def __init__(self, examiner: Examiner, scheduler: Scheduler) -> None:
        self._examiner = examiner
        self._scheduler = scheduler

    async def of_trusted(self, model: Model, question: Counted, *but: Node) -> Opinion | None:
        """What a trusted node answers, other than `but`; None where none does."""
        ready = self._examiner.registry.ready(model.id)
        avoid = {node.node_id for node in (*ready, *but) if not node.trusted or node in but}
        if all(node.node_id in avoid for node in ready):
            return None
        return await self.of_any(model, question, avoid)

    async def of_any(self, model: Model, question: Counted, avoid: set[str]) -> Opinion | None:
        """What some node answers, other than those to `avoid`; None where none does."""
        parts = _PartQueue()
        try:
            async with asyncio.timeout(REQUEST_MIN_S):
                ticket = self._scheduler.repeat(model, question, parts, frozenset(avoid))
                try:
                    return await self._attempts(ticket, parts, model, question)
                finally:
                    ticket.leave()
                    parts.abandon(ticket)
        except (TimeoutError, Overloaded):
            return None

    async def _attempts(self, ticket: Ticket, parts: "_PartQueue", model: Model, question: Counted) -> Opinion | None:
        while (part := await parts.next()) is not None:
            if len(part.rows) < len(question.lengths):  # another node would answer the rest
                ticket.abandoned(part)
                break
            try:
                try:
                    with within(attempt_s(part.expected_s), partial(_more_s, ticket, part)):
                        reply = await self._examiner.embed(part, model, question)
                except TimeoutError:
                    raise NodeTooSlow("the attempt's deadline passed") from None
            except NodeFailure as failure:
                if not ticket.ended(part, failure):
                    break
            except BaseException:
                ticket.abandoned(part)
                raise
            else:
                ticket.ended(part, None)
                node = self._examiner.registry.find(part.node_id)
                return Opinion(node, rows_of(reply, model)) if node is not None else None
        return None


def rows_of(reply: EmbedVectors, model: Model) -> Matrix:
    """A reply's vectors, one a row."""
    return np.frombuffer(reply.data, "<f4").reshape(-1, model.width)


def _more_s(ticket: Ticket, part: Part) -> float:
    """As for callers, a late node is left only where another one may be asked. `of_any` bounds the whole."""
    return 0.0 if ticket.may_ask_another(part) else LOOK_AGAIN_S


class _PartQueue:
    """The parts of one question. Implements the port `Asker`."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()

    def take(self, part: Part) -> None:
        self._parts.put_nowait(part)

    def give_up(self, last: NodeFailure | None) -> None:
        self._parts.put_nowait(None)

    async def next(self) -> Part | None:
        """The next part to ask for, or None when no node is left."""
        return await self._parts.get()

    def abandon(self, ticket: Ticket) -> None:
        """Give up the parts that came too late."""
        while not self._parts.empty():
            if (part := self._parts.get_nowait()) is not None:
                ticket.abandoned(part)
