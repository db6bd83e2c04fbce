"""Coalescing: small requests for one node share a call, whose fixed cost is then paid once.

A request never waits for others: while a node has less than CALLS calls under way, each request is a call of its own.
Requests that come while it has as many share the next call. Where a call's fixed cost is small there is nothing to
share, and requests are not even counted. If a shared call fails, each of its requests is repeated
alone, so that a text which the node cannot process costs the others a moment, and not their answer.
"""

import asyncio
from collections import deque
from dataclasses import dataclass, field
from functools import partial

import msgspec

from embedmesh.fleet.load import Load
from embedmesh.gateway.nodes.own import FLOAT32_BYTES, OwnLink
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModels
from embedmesh.rules.errors import NodeFailure, NodeUnreachable, WrongAnswer
from embedmesh.rules.forwarding import Attempt, AttemptOwner, Part
from embedmesh.rules.generation import Generating, GenerationRequest, NodeStream
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1_stream import BodyStream

CALLS = 2  # one that the node computes, and one that waits there, so that it is never idle
MERGED_TOKENS_MAX = 1_024  # of one call: a batch of our engine
SMALL_TOKENS_MAX = 512  # a larger request is a call of its own
FIXED_S_MIN = 0.000_3  # of a call: less is not worth the gateway's own work of sharing, some 0.05 ms a request


@dataclass(eq=False, slots=True)
class _SmallRequest:
    part: Part
    model: Model
    counted: Counted
    request_id: str
    answer: "asyncio.Future[EmbedVectors]"
    batch: "list[_SmallRequest]" = field(default_factory=list)  # of the shared call, once that has begun
    call: "asyncio.Task[None] | None" = None


class CoalescingLink:
    """A node of ours that keeps no receipts: those name single requests. Implements `Link`."""

    def __init__(self, link: OwnLink, load: Load) -> None:
        """`load` tells what a call costs."""
        self._link = link
        self._load = load
        self._calls = 0
        self._waiting: deque[_SmallRequest] = deque()  # bounded by IN_FLIGHT_PARTS_MAX
        self._tasks: set[asyncio.Task[None]] = set()

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        if part.tokens > SMALL_TOKENS_MAX or self._load.fixed_s < FIXED_S_MIN:
            return await self._link.embed(part, model, counted, request_id)
        if self._calls < CALLS:
            self._calls += 1
            try:
                return await self._link.embed(part, model, counted, request_id)
            finally:
                self.call_ended()
        request = _SmallRequest(part, model, counted, request_id, asyncio.get_running_loop().create_future())
        self._waiting.append(request)
        try:
            return await request.answer
        except asyncio.CancelledError:
            _drop(request)
            raise

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        if self._load.fit.fixed_s < FIXED_S_MIN or part.tokens > SMALL_TOKENS_MAX:
            return self._link.ask(part, model, counted, request_id, owner)
        if self._calls >= CALLS:
            return None
        call = _Call(self, owner)
        call.attempt = self._link.ask(part, model, counted, request_id, call)
        if call.attempt is None:
            return None
        self._calls += 1
        return call

    async def served(self) -> ServedModels:
        return await self._link.served()

    async def generate(self, model: Model, asked: GenerationRequest) -> bytes:
        return await self._link.generate(model, asked)

    async def stream(self, model: Model, asked: GenerationRequest) -> NodeStream:
        return await self._link.stream(model, asked)

    async def post_sealed(self, body: bytes, limit: int, request_id: str) -> bytes:
        return await self._link.post_sealed(body, limit, request_id)

    async def generate_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> bytes:
        return await self._link.generate_sealed(modality, body, limit, request_id)

    async def stream_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> BodyStream:
        return await self._link.stream_sealed(modality, body, limit, request_id)

    def close(self) -> None:
        self._link.close()
        while self._waiting:
            _settle(self._waiting.popleft(), NodeUnreachable("the node was removed"))
        for task in self._tasks:
            task.cancel()

    def call_ended(self) -> None:
        """A call is no longer under way: the next can begin."""
        self._calls -= 1
        self._call_next()

    def _call_next(self) -> None:
        while self._calls < CALLS and (batch := self._take()):
            self._calls += 1
            task = asyncio.get_running_loop().create_task(self._call(batch))
            self._tasks.add(task)
            task.add_done_callback(partial(self._ended, batch))
            for request in batch:
                request.batch, request.call = batch, task

    def _take(self) -> list[_SmallRequest]:
        """The requests of the next call: of one model, in order, without those whose callers have gone."""
        batch: list[_SmallRequest] = []
        tokens = 0
        while self._waiting:
            request = self._waiting[0]
            if not request.answer.done():
                tokens += request.part.tokens
                if batch and (tokens > MERGED_TOKENS_MAX or request.model is not batch[0].model):
                    break
                batch.append(request)
            self._waiting.popleft()
        return batch

    async def _call(self, batch: list[_SmallRequest]) -> None:
        try:
            answers = await self._answers(batch)
            for request, answer in zip(batch, answers, strict=True):
                _settle(request, answer)
        except NodeFailure as failure:
            if len(batch) == 1:
                _settle(batch[0], failure)
            else:
                await asyncio.gather(*(self._alone(request) for request in batch))
        except Exception as error:  # noqa: BLE001 - a bug of ours: all callers get it, and count it
            for request in batch:
                _settle(request, error)

    def _ended(self, batch: list[_SmallRequest], task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if task.cancelled():  # perhaps before its first step
            for request in batch:
                _settle(request, NodeUnreachable("the node was removed, or no caller waits for it"))
        self.call_ended()

    async def _alone(self, request: _SmallRequest) -> None:
        if request.answer.done():
            return
        try:
            _settle(request, await self._link.embed(request.part, request.model, request.counted, request.request_id))
        except Exception as error:  # noqa: BLE001 - as in `_call`; the others get their answers
            _settle(request, error)
        _drop(request)

    async def _answers(self, batch: list[_SmallRequest]) -> list[EmbedVectors]:
        """Each request's share of one call's answer. Raises a NodeFailure."""
        first = batch[0]
        if len(batch) == 1:
            return [await self._link.embed(first.part, first.model, first.counted, first.request_id)]
        ids = [request.counted.ids[place] for request in batch if request.counted.ids for place in request.part.rows]
        tokens = sum(request.part.tokens for request in batch)
        reply = await self._link.embed_ids(first.model, ids, first.request_id)
        row = first.model.width * FLOAT32_BYTES
        if reply.tokens != tokens or len(reply.data) != len(ids) * row:
            raise WrongAnswer(
                "the node answered to another number of tokens or inputs than it was sent", check=Check.TOKENS
            )
        answers, at = [], 0
        for request in batch:
            size = len(request.part.rows) * row
            answers.append(EmbedVectors(request.part.tokens, reply.data[at : at + size]))
            at += size
        return answers


class _Call(msgspec.Struct, eq=False):
    """A call for one request, which counts as under way until it ends. Implements `Attempt` and `AttemptOwner`."""

    link: CoalescingLink
    owner: AttemptOwner
    attempt: Attempt | None = None

    def answered(self, vectors: EmbedVectors) -> None:
        self.attempt = None
        self.link.call_ended()
        self.owner.answered(vectors)

    def failed(self, failure: NodeFailure) -> None:
        self.attempt = None
        self.link.call_ended()
        self.owner.failed(failure)

    def cancel(self) -> None:
        if (attempt := self.attempt) is not None:
            self.attempt = None
            attempt.cancel()
            self.link.call_ended()


def _settle(request: _SmallRequest, answer: EmbedVectors | Exception) -> None:
    if request.answer.done():
        return
    if isinstance(answer, Exception):
        request.answer.set_exception(answer)
    else:
        request.answer.set_result(answer)


def _drop(request: _SmallRequest) -> None:
    """A request is over, or its caller has gone: a call without any other request is cancelled."""
    if request.call is not None and all(each.answer.done() for each in request.batch):
        request.call.cancel()
