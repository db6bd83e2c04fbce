"""What a sidecar asks the server beside it, and how it counts and seals what comes back: whole, or event by event."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec

from embedmesh.dialects.openai.chat import Chat
from embedmesh.dialects.openai.completions import Completions
from embedmesh.dialects.openai.images import Images
from embedmesh.flow.prompt_bounds import (
    asked_of,
    prompt_tokens,
    sealed_input_max,
    sealed_whole_bytes_max,
    text_bytes,
    whole_bytes_max,
)
from embedmesh.flow.usage import Most, Used, tokens_of, used
from embedmesh.node.seen_generation import SeenGeneration
from embedmesh.node.sidecar_models import SidecarModel
from embedmesh.rules.errors import (
    InvalidValue,
    MaxTokensPerRequest,
    ModelNotFound,
    NodeBroke,
    NodeFailure,
    NotAsAsked,
    WrongAnswer,
)
from embedmesh.rules.generation import (
    Generating,
    GenerationDialect,
    NodeStream,
    Piece,
    Prompt,
    StreamState,
    TokenCounts,
)
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Catalogue, Clock
from embedmesh.rules.sealed_generation import EVENTS_MORE, FRAME_LENGTH_BYTES, SealedGeneration, SignedCounts
from embedmesh.upstream.generating import UpstreamGeneration

DIALECTS: dict[Generating, GenerationDialect] = {"chat": Chat(), "completions": Completions(), "images": Images()}
PLAIN_SHARE = 0.9  # of a sealed answer: our scheme fills up a sixteenth
NOT_SERVED = "This node does not serve that model."


class FittedPrompt(msgspec.Struct, frozen=True):
    """What was in a sealed request, held to the words around it: each answer has at most `output_max` tokens."""

    prompt: Prompt
    model: Model
    most: Most
    likely: int  # tokens of the input
    output_max: int
    units: int


def fit_prompt(body: bytes, asked: SealedGeneration, modality: Generating, catalogue: Catalogue) -> FittedPrompt:
    """The request, by the same tables as an ordinary one. Takes long for a large body. Raises a CallerFailure."""

    def find(name: str) -> Model:
        model = catalogue.find(name)
        if model is None:
            raise ModelNotFound(NOT_SERVED, param="model")
        return model

    call = asked.call
    prompt, model = DIALECTS[modality].parse(body, find)
    if prompt.model != call.model_name or model.id != call.model:
        raise InvalidValue("The sealed request names another model than was locked.", param="model")
    if prompt.stream != asked.stream:
        raise InvalidValue("The sealed request and the one around it differ in `stream`.", param="stream")
    if prompt.modality == "images":
        if prompt.images != 1:
            raise InvalidValue("A lock is for one image: leave `n` out.", param="n")
        return FittedPrompt(prompt, model, Most(0, 0), 0, 0, call.units)
    tokens = prompt_tokens(prompt, model, text_bytes(prompt), None)
    likely = max(1, tokens.likely)
    room = (call.units - likely) // prompt.generated
    if room < 1:
        raise MaxTokensPerRequest(
            f"The prompt has about {likely:,} tokens, and the lock covers {call.units:,}, answers included. Lock more, "
            "or shorten it.",
            param="messages" if prompt.messages else "prompt",
        )
    output_max = min(prompt.output_max or model.output_max, room)
    if not prompt.stream and whole_bytes_max(prompt, output_max) > PLAIN_SHARE * sealed_whole_bytes_max(model):
        raise InvalidValue(
            "The answer may be larger than a whole one may be. Ask for a stream, or for fewer tokens, or likely ones.",
            param=prompt.limits[0],
        )
    most = Most(max(1, min(tokens.most, sealed_input_max(len(body), model))), prompt.generated * output_max)
    return FittedPrompt(prompt, model, most, likely, output_max, call.units)


class Answering:
    """One request on its way to the server and back."""

    def __init__(
        self,
        upstream: UpstreamGeneration,
        served: SidecarModel,
        fitted: FittedPrompt,
        seen: SeenGeneration,
        clock: Clock,
    ) -> None:
        self._upstream = upstream
        self.served = served
        self.fitted = fitted
        self.seen = seen
        self.clock = clock
        self.dialect = DIALECTS[fitted.prompt.modality]
        self._asked = asked_of(fitted.prompt, fitted.output_max)
        self._request_id = new_id("gen", clock)

    async def whole(self) -> tuple[bytes, int]:
        """The sealed answer, and its tokens. Raises a NodeFailure."""
        fitted, dialect = self.fitted, self.dialect
        prompt, model = fitted.prompt, fitted.model
        try:
            reply = await self._upstream.generate(model, self._asked)
            whole = dialect.whole(prompt, model, reply, self._request_id, self._now_s())
        except NodeFailure as failure:
            self.served.failed(failure)
            raise
        self.served.answered()
        if prompt.modality == "images":
            counts = SignedCounts(images=whole.images, size=prompt.size or "")
            return self.seen.seal(whole.data, counts, self.clock.unix_ms()), 0
        spent = self.spent(whole.usage, len(whole.text.encode("utf-8", "surrogatepass")))
        data = dialect.with_usage(whole, spent.usage) if spent.usage != whole.usage else whole.data
        return self.seen.seal(data, _counts(spent), self.clock.unix_ms()), spent.input + spent.output

    async def stream(self) -> "SealedFrames":
        """The sealed stream, once its first event is there. Raises a NodeFailure."""
        state = StreamState(self._request_id, self._now_s())
        try:
            stream = await self._upstream.stream(self.fitted.model, self._asked)
            try:
                first = await self.next(stream, state)
                if first is None:
                    raise WrongAnswer("the server's stream has no event")
            except BaseException:
                stream.close()
                raise
        except NodeFailure as failure:
            self.served.failed(failure)
            raise
        return SealedFrames(self, stream, state, first)

    async def next(self, stream: NodeStream, state: StreamState) -> Piece | None:
        """The next event by the dialect's allow-list; None after the last. Raises a NodeFailure."""
        data = await stream.next()
        if data is None:
            return None
        return self.dialect.piece(self.fitted.prompt, self.fitted.model, data, state)

    def spent(self, said: TokenCounts | None, delivered_bytes: int, events: int = 0) -> Used:
        """By the server's word within its bounds, else by our count; together never above the lock."""
        fitted = self.fitted
        own = TokenCounts(fitted.likely, tokens_of(delivered_bytes, events))
        spent = used(said, own, delivered_bytes, fitted.most, answers=fitted.prompt.generated)
        tokens = max(1, min(spent.input, fitted.units))
        return spent._replace(
            input=tokens, cached=min(spent.cached, tokens), output=min(spent.output, fitted.units - tokens)
        )

    def _now_s(self) -> int:
        return self.clock.unix_ms() // 1000


class SealedFrames:
    """The frames of one sealed stream. Nothing is read ahead; an event that ends an answer waits for what follows it.

    So the last event is known as the last one when it is sealed, and usage has come by then.
    """

    def __init__(self, of: Answering, stream: NodeStream, state: StreamState, first: Piece) -> None:
        self._of = of
        self._stream = stream
        self._state = state
        self._text_bytes = self._events = 0
        self._said: TokenCounts | None = None
        self._gone = False
        self._parts = self._made(first)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        return await anext(self._parts)

    async def aclose(self) -> None:
        await self._parts.aclose()
        self._stream.close()  # a generator that has not begun does nothing when it is closed

    def left(self) -> None:
        """The gateway has gone: the server can stop."""
        self._gone = True
        self._stream.close()

    async def _made(self, first: Piece) -> AsyncGenerator[bytes, None]:
        """The frames. Raises a NodeFailure where the server breaks off: then the connection is cut."""
        served = self._of.served
        waiting: bytes | None = None
        piece: Piece | None = first
        try:
            while piece is not None:
                self._note(piece)
                if piece.data is not None:
                    if waiting is not None:
                        yield self._frame(waiting)
                    waiting = piece.data if piece.finished else None
                    if waiting is None:
                        yield self._frame(piece.data)
                await asyncio.sleep(0)  # an event takes half a millisecond here: where many have come, others get turns
                piece = await self._of.next(self._stream, self._state)
            if self._stream.end != "done" and len(self._state.ended) < self._of.fitted.prompt.choices:
                raise NodeBroke("the server's stream ended before its answer")
            served.answered()
            for part in self._last(waiting):
                yield part
        except NodeFailure as failure:
            if not self._gone:
                served.failed(failure)
                raise
        finally:
            self._stream.close()

    def _last(self, waiting: bytes | None) -> tuple[bytes, ...]:
        """What is sent once all is counted: what has waited, or usage where the caller wants it, or both."""
        of = self._of
        fitted = of.fitted
        if waiting is not None and not fitted.prompt.wants_usage:
            return (self._frame(waiting, final=True),)
        spent = of.spent(self._said, self._text_bytes, self._events)
        usage = of.dialect.usage_event(fitted.prompt, fitted.model, spent.usage, self._state)
        before = () if waiting is None else (self._frame(waiting),)
        return (*before, self._frame(usage, final=True))

    def _note(self, piece: Piece) -> None:
        self._text_bytes += len(piece.text.encode("utf-8", "surrogatepass"))
        self._said = piece.usage or self._said
        self._events += bool(piece.text)
        if self._events > self._of.fitted.most.output + EVENTS_MORE:
            raise NotAsAsked("the server's stream does not end where it was asked to")

    def _frame(self, data: bytes, *, final: bool = False) -> bytes:
        of = self._of
        counts = _counts(of.spent(self._said, self._text_bytes, self._events))
        return framed(of.seen.seal(data, counts, of.clock.unix_ms(), final=final))


def framed(message: bytes) -> bytes:
    """One message of a stream of them."""
    return len(message).to_bytes(FRAME_LENGTH_BYTES, "big") + message


def _counts(spent: Used) -> SignedCounts:
    return SignedCounts(spent.input, spent.output, spent.cached, estimated=spent.estimated)
