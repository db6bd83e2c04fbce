"""Small requests that are for one node at one time, in one call: what a call costs besides its texts is paid once.

Nobody waits for company: while a node has less than CALLS calls under way, each request is a call of its own. What
comes while it has as many goes with the next call. A call that fails says nothing about any one of its requests: each
is asked again alone, so that a text that a node cannot digest costs others a moment, and not their answer.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial

from embedmesh.gateway.nodes.own import BYTES_PER_COMPONENT, OwnLink
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModels
from embedmesh.rules.errors import NodeFailure, NodeUnreachable, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check

CALLS = 2  # one that the node computes, and one that waits there: it is never without work
MERGED_TOKENS_MAX = 1_024  # of one call: a batch of our engine
SMALL_TOKENS_MAX = 512  # a larger request is a call of its own


@dataclass(eq=False, slots=True)
class _Asked:
    part: Part
    model: Model
    counted: Counted
    request_id: str
    answer: "asyncio.Future[EmbedVectors]"
    batch: "list[_Asked]" = field(default_factory=list)  # that it goes with, once it goes
    call: "asyncio.Task[None] | None" = None


class CoalescingLink:
    """A node of ours that keeps no receipts: those name single requests. Implements `Link`."""

    def __init__(self, link: OwnLink) -> None:
        self._link = link
        self._calls = 0
        self._waiting: deque[_Asked] = deque()  # as long as the line lets parts go to one node: see IN_FLIGHT_PARTS_MAX
        self._tasks: set[asyncio.Task[None]] = set()

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        if part.tokens > SMALL_TOKENS_MAX:
            return await self._link.embed(part, model, counted, request_id)
        if self._calls < CALLS:
            self._calls += 1
            try:
                return await self._link.embed(part, model, counted, request_id)
            finally:
                self._calls -= 1
                self._call_next()
        asked = _Asked(part, model, counted, request_id, asyncio.get_running_loop().create_future())
        self._waiting.append(asked)
        try:
            return await asked.answer
        except asyncio.CancelledError:
            _forsake(asked)
            raise

    async def served(self) -> ServedModels:
        return await self._link.served()

    def close(self) -> None:
        self._link.close()
        while self._waiting:
            _fail(self._waiting.popleft(), NodeUnreachable("the node was removed"))
        for task in self._tasks:
            task.cancel()

    def _call_next(self) -> None:
        while self._calls < CALLS and (batch := self._take()):
            self._calls += 1
            task = asyncio.get_running_loop().create_task(self._call(batch))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, batch))
            for asked in batch:
                asked.batch, asked.call = batch, task

    def _take(self) -> list[_Asked]:
        """What goes with the next call: of one model, in order, without those who have gone."""
        batch: list[_Asked] = []
        tokens = 0
        while self._waiting:
            asked = self._waiting[0]
            if not asked.answer.done():
                tokens += asked.part.tokens
                if batch and (tokens > MERGED_TOKENS_MAX or asked.model is not batch[0].model):
                    break
                batch.append(asked)
            self._waiting.popleft()
        return batch

    async def _call(self, batch: list[_Asked]) -> None:
        try:
            answers = await self._answers(batch)
            for asked, answer in zip(batch, answers, strict=True):
                if not asked.answer.done():
                    asked.answer.set_result(answer)
        except NodeFailure as failure:
            if len(batch) == 1:
                _fail(batch[0], failure)
            else:
                await asyncio.gather(*(self._alone(asked) for asked in batch))
        except Exception as error:  # noqa: BLE001 - a bug of ours: told to all who wait for it, who count it
            for asked in batch:
                _fail(asked, error)

    def _ended(self, batch: list[_Asked], task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():  # perhaps before its first step
            for asked in batch:
                _fail(asked, NodeUnreachable("the node was removed, or nobody waits for it"))
        self._calls -= 1
        self._call_next()

    async def _alone(self, asked: _Asked) -> None:
        if asked.answer.done():
            return
        try:
            answer = await self._link.embed(asked.part, asked.model, asked.counted, asked.request_id)
        except Exception as error:  # noqa: BLE001 - as in `_call`; the others get their answers
            _fail(asked, error)
        else:
            if not asked.answer.done():
                asked.answer.set_result(answer)
        _forsake(asked)

    async def _answers(self, batch: list[_Asked]) -> list[EmbedVectors]:
        """What each gets of one call's answer. Raises a NodeFailure."""
        first = batch[0]
        if len(batch) == 1:
            return [await self._link.embed(first.part, first.model, first.counted, first.request_id)]
        ids = [asked.counted.ids[place] for asked in batch if asked.counted.ids for place in asked.part.places]
        tokens = sum(asked.part.tokens for asked in batch)
        reply = await self._link.embed_ids(first.model, ids, first.request_id)
        row = first.model.width * BYTES_PER_COMPONENT
        if reply.tokens != tokens or len(reply.data) != len(ids) * row:
            raise WrongAnswer("the node answered to another number of tokens or inputs than asked", check=Check.TOKENS)
        answers, at = [], 0
        for asked in batch:
            size = len(asked.part.places) * row
            answers.append(EmbedVectors(asked.part.tokens, reply.data[at : at + size]))
            at += size
        return answers


def _fail(asked: _Asked, failure: Exception) -> None:
    if not asked.answer.done():
        asked.answer.set_exception(failure)


def _forsake(asked: _Asked) -> None:
    """It is over, or its caller has gone: where nobody waits for its call any more, the node is told to stop."""
    if asked.call is not None and all(each.answer.done() for each in asked.batch):
        asked.call.cancel()
