"""A sidecar's side of confidential chat, completions and images: opened, asked of the server beside it, sealed.

The order of checks, the one refusal and the memory of replays are those of confidential embeddings.
"""

import asyncio
import functools
from collections.abc import Awaitable, Callable

import msgspec
from aiohttp import web

from embedmesh.flow.forward import caller_failure
from embedmesh.http.failures import envelope
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.routing import Routes
from embedmesh.http.streaming import stream
from embedmesh.node.app import SOON_BYTES_MAX, queue_full
from embedmesh.node.confidential import LateOpener
from embedmesh.node.key_sets import HeldKey
from embedmesh.node.metrics import NodeMetrics
from embedmesh.node.refusals import Refusals
from embedmesh.node.seen_generation import SeenGeneration
from embedmesh.node.sidecar_answers import NOT_SERVED, Answering, SealedFrames, fit_prompt, framed
from embedmesh.node.sidecar_models import SidecarModels
from embedmesh.rules import errors
from embedmesh.rules.embeddings import COMPACT
from embedmesh.rules.exchange import StreamedReply
from embedmesh.rules.generation import Generating
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, REQUEST_MAX_S, SEALED_CALL_BYTES_MAX
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.rules.sealed_generation import SEALED_EVENTS, SealedGeneration, confidential_path
from embedmesh.upstream.generating import UpstreamGeneration

MODALITIES: tuple[Generating, ...] = ("chat", "completions", "images")
UNDER_WAY_MAX = 256  # each has a connection to the server, and some 100 kB here
READ_PART_S = 600.0  # for a gateway to read one event: it has a deadline of its own for its caller, who may be slow
LATE = "The answer took longer than it may. Ask for less of it, or for a stream."
DECODE = msgspec.msgpack.Decoder(SealedGeneration).decode
Sign = Callable[[web.Response, int], web.Response]
"""Signs a whole reply, with its number of tokens."""


class SidecarCalls:
    """Answers sealed calls by the server."""

    def __init__(
        self,
        upstream: UpstreamGeneration,
        models: SidecarModels,
        catalogue: Catalogue,
        opener: LateOpener,
        metrics: NodeMetrics,
        bodies: BodyBudget,
        clock: Clock,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`catalogue` has the models that this node serves, and no others."""
        self._upstream = upstream
        self._models = models
        self._catalogue = catalogue
        self._opener = opener
        self._metrics = metrics
        self._bodies = bodies
        self._clock = clock
        self._refusals = Refusals(clock, sleep)
        self._under_way = 0

    def routes(self) -> Routes:
        """Routes for a socket that only the node's owner may open."""
        return {
            confidential_path(modality): {"POST": functools.partial(self.generate, modality)} for modality in MODALITIES
        }

    async def generate(self, modality: Generating, request: web.BaseRequest) -> web.StreamResponse:
        """Unsigned, as the socket is private."""
        body = await self.read_body(request)
        try:
            return await self.respond(modality, body, request)
        finally:
            self.give_back(body)

    async def read_body(self, request: web.BaseRequest) -> bytes:
        """The body of a request; for `give_back`. Raises as `receive.read_body`."""
        return await read_body(request, SEALED_CALL_BYTES_MAX, self._bodies, content_type=COMPACT)

    def give_back(self, body: bytes) -> None:
        """A body is done with."""
        self._bodies.give_back("", len(body))

    async def respond(
        self, modality: Generating, body: bytes, request: web.BaseRequest, sign: Sign = lambda response, _: response
    ) -> web.StreamResponse:
        """The reply to a request with this body. Whole replies are signed; each event of a stream is by itself."""
        try:
            answer, tokens = await self.answer(modality, body)
        except errors.Overloaded as failure:
            return queue_full(failure)
        except errors.NodeBusy as failure:
            return queue_full(errors.Overloaded("The server is busy.", retry_after_s=max(1.0, failure.retry_after_s)))
        if isinstance(answer, bytes):
            return sign(web.Response(body=answer, headers={"Content-Type": COMPACT}), tokens)
        response = web.StreamResponse(headers={"Content-Type": SEALED_EVENTS})
        self._under_way += 1
        try:
            await stream(request, response, StreamedReply({}, answer, left=answer.left), READ_PART_S)
        finally:
            self._under_way -= 1
            await answer.aclose()
        return response

    async def answer(self, modality: Generating, body: bytes) -> tuple[bytes | SealedFrames, int]:
        """The answer to a body that has just come: whole with its tokens, or a stream that has begun.

        Raises Overloaded, InvalidType for what is no sealed call, NoNodeAvailable, DeadlineExceeded, NodeFailure.
        """
        arrived, arrived_ms = self._clock.monotonic(), self._clock.unix_ms()
        self._refusals.check_room()
        try:
            asked = DECODE(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise errors.InvalidType("The body is not a sealed call of the node protocol.") from None
        opener = self._opener.get()
        held = opener.find(asked.call)
        look = functools.partial(opener.look_at_generation, asked, modality, None if held is None else held.key)
        seen = look() if len(asked.call.ciphertext) <= SOON_BYTES_MAX else await asyncio.to_thread(look)
        answer = None
        try:
            if held is not None and seen.body is not None and not held.of.has_seen(seen.replay):
                answer = await self._opened(asked, modality, seen, held)
        except errors.CallerFailure as failure:
            self._metrics.confidential("refused")
            return _one(asked, seen.refuse(self._clock.unix_ms(), envelope(failure))), 0
        if answer is None:
            self._metrics.confidential("refused")
            await self._refusals.wait(arrived)
            return _one(asked, seen.refuse(arrived_ms)), 0
        self._metrics.confidential("answered")
        return answer

    async def _opened(
        self, asked: SealedGeneration, modality: Generating, seen: SeenGeneration, held: HeldKey
    ) -> tuple[bytes | SealedFrames, int] | None:
        """None for what came before. Raises a CallerFailure, too."""
        body = seen.body
        assert body is not None
        if len(body) > REQUEST_BODY_BYTES_MAX:
            raise errors.BodyTooLarge(f"The sealed request has more than {REQUEST_BODY_BYTES_MAX:,} bytes.")
        read = functools.partial(fit_prompt, body, asked, modality, self._catalogue)
        fitted = read() if len(body) <= SOON_BYTES_MAX else await asyncio.to_thread(read)
        served = self._models.find(fitted.model.id)
        if served is None:
            raise errors.ModelNotFound(NOT_SERVED, param="model")
        if self._under_way >= UNDER_WAY_MAX:
            raise errors.Overloaded("This node answers as many sealed requests as it may at one time.")
        if held.of.has_seen(seen.replay):  # meanwhile
            return None
        held.of.remember(seen.replay)
        answering = Answering(self._upstream, served, fitted, seen, self._clock)
        self._under_way += 1
        try:
            return await self._asked(answering, stream=asked.stream)
        except (errors.NodeBusy, errors.NodeUnreachable):
            held.of.forget(seen.replay)  # nothing was made of it, and the gateway may send it again
            raise
        finally:
            self._under_way -= 1

    async def _asked(self, answering: Answering, *, stream: bool) -> tuple[bytes | SealedFrames, int]:
        try:
            if stream:
                return await answering.stream(), 0
            async with asyncio.timeout(REQUEST_MAX_S):
                return await answering.whole()
        except errors.UpstreamRefused as refused:
            told = caller_failure(refused)
            if isinstance(told, errors.CallerFailure):
                raise told from None  # for the caller alone: it may quote the text
            raise
        except errors.NotAsAsked:  # gateways would count it against this node, whose caller may be the reason
            raise errors.InvalidValue("The server behind this node answers more or less than was asked for.") from None
        except TimeoutError:
            raise errors.DeadlineExceeded(LATE) from None


def _one(asked: SealedGeneration, message: bytes) -> bytes:
    """The only event of an answer."""
    return framed(message) if asked.stream else message
