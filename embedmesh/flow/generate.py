"""The operations "chat", "completions" and "images": forwarded to a node of another make, never computed here.

    hold     = bound of the input * its price + answers * output limit * its price; images: how many * price by size
    capture  = what the node says it has used, if that can be; else our own count, marked

An output limit is always sent to the node. A stream is told in `stream.py`.
"""

import asyncio
import hashlib
from collections.abc import Callable
from math import ceil

import msgspec

from embedmesh.deadline import within
from embedmesh.flow.bill import Bill
from embedmesh.flow.expected import ExpectedOutput
from embedmesh.flow.forward import caller_failure
from embedmesh.flow.leases import LEASE_S, Leases
from embedmesh.flow.one_node import OneNode
from embedmesh.flow.operation import Bound, CanPayFor
from embedmesh.flow.prompt_bounds import asked_of, prompt_tokens, text_bytes, whole_bytes_max
from embedmesh.flow.stream import PieceStream, Stream
from embedmesh.flow.usage import Most, Used, tokens_of, used
from embedmesh.flow.world import World
from embedmesh.rules.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Failure,
    InvalidValue,
    NotAsAsked,
    WrongAnswer,
)
from embedmesh.rules.exchange import NODE_HEADER, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part, Share
from embedmesh.rules.generation import (
    GeneratingClient,
    GenerationDialect,
    GenerationRequest,
    NodeStream,
    Piece,
    Prompt,
    StreamState,
    TokenCounts,
    Whole,
)
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import REQUEST_MAX_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.sealed_generation import EVENTS_MORE
from embedmesh.rules.served import no_such_model

GENERATE_SCOPE = "generate"
BEGINNING_TEXTS, BEGINNING_CHARS = 2, 4_096  # what a model is told first, and the first question, decide its node
BEGINNING_BYTES = 16
ALONE_BYTES = 32 * 1024  # of text that is counted on the event loop: a millisecond
STREAM_ROOM_BYTES = 256 * 1024  # of a stream: its events wait in the kernel and with the node
DONE = b"data: [DONE]\n\n"
IMAGE_TOKENS = 1_000  # what an image counts in the scheduler: seconds of work


class Generated(msgspec.Struct, frozen=True, array_like=True):
    """A whole reply as JSON, and whose it is."""

    data: bytes
    node_id: str


class Generation:
    """Implements the protocol `Operation` for one dialect."""

    scope = GENERATE_SCOPE
    result = Generated
    envelope = None

    def __init__(
        self,
        dialect: GenerationDialect,
        client: GeneratingClient,
        leases: Leases,
        expected: ExpectedOutput,
        failure_event: Callable[[Failure], bytes],
    ) -> None:
        """`failure_event` writes a failure as the data of an event."""
        self.dialect = dialect
        self.client = client
        self.leases = leases
        self.expected = expected
        self.failure_event = failure_event

    def parse(self, world: World, head: RequestHead, body: bytes) -> "GenerationCall":
        def find(name: str) -> Model:
            model = world.catalogue.find(name)
            if model is None:
                raise no_such_model(name, world.catalogue, world.terms.serves)
            return model

        prompt, model = self.dialect.parse(body, find)
        if prompt.stream and head.idempotency_key is not None:
            raise InvalidValue("A stream is not kept, so it takes no Idempotency-Key. Leave out one of the two.")
        return GenerationCall(self, prompt, model)

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        return 0 if model is None else world.prices.of(model, account_id)

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return False


class GenerationCall:
    """One valid request. Implements the protocol `Invocation`."""

    lock = None
    most: Most
    likely: TokenCounts  # of the input, our own count; output: what such requests have made of late
    _caller: Caller
    _prices: tuple[int, int, int]  # input, cached, output
    _image_price: int  # of a million

    def __init__(self, operation: Generation, prompt: Prompt, model: Model) -> None:
        self.operation = operation
        self.prompt = prompt
        self.model = model
        self.user = prompt.user
        self.streams = prompt.stream

    @property
    def output_max(self) -> int:
        """Tokens of one answer."""
        return self.prompt.output_max or self.model.output_max

    @property
    def reply_bytes_max(self) -> int:
        return STREAM_ROOM_BYTES if self.streams else self._whole_bytes_max

    @property
    def kept_bytes(self) -> int:
        return self._whole_bytes_max

    def check_served(self, world: World) -> None:
        if not world.fleet.may_come(self.model):
            raise no_such_model(self.prompt.model, world.catalogue, world.terms.serves)

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        """Bound and guess the input's tokens. Raises ContextLengthExceeded, InvalidValue or InsufficientQuota."""
        self._caller = caller
        prompt, model = self.prompt, self.model
        if prompt.output_max is not None and prompt.output_max > model.max_tokens:
            raise InvalidValue(
                f"`{prompt.limits[0]}` is more than the {model.max_tokens:,} tokens that prompt and answer may have "
                "together for this model.",
                param=prompt.limits[0],
            )
        size = text_bytes(prompt)
        tokenizer, exact = world.tokenizers.get(model.id), None
        if tokenizer is not None:
            ids = tokenizer.ids
            if size <= ALONE_BYTES:
                exact = sum(map(len, ids(prompt.texts)))
            else:
                exact = sum(map(len, await world.turns.call(caller.account_id, ids, prompt.texts)))
        tokens = prompt_tokens(prompt, model, size, exact)
        if tokens.exact is not None and tokens.exact > model.max_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {tokens.exact:,} tokens; this model takes {model.max_tokens:,}, answer included.",
                param="messages" if prompt.messages else "prompt",
            )
        self.most = Most(tokens.most, prompt.generated * self.output_max)
        output = self.operation.expected.of(model.id, self.output_max) * prompt.generated
        self.likely = TokenCounts(tokens.likely, min(ceil(output), self.most.output))
        return self.likely.input

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        model, account_id = self.model, caller.account_id
        if not world.fleet.serves(model):
            raise caller_failure(None)
        world.fleet.may_wait(model, self.tokens_expected, account_id)
        within_s = LEASE_S if self.streams else REQUEST_MAX_S
        if self.prompt.modality == "images":
            self._image_price = world.prices.image(model, account_id, self._size)
            return Bound((self._images(self.prompt.images),), within_s)
        prices = world.prices
        self._prices = (
            prices.of(model, account_id),
            prices.meter(model, account_id, Meter.CACHED),
            prices.meter(model, account_id, Meter.OUTPUT),
        )
        dearest = max(self._prices[:2])
        held = Metered(Meter.INPUT, self.most.input, dearest), Metered(Meter.OUTPUT, self.most.output, self._prices[2])
        return Bound(held, within_s)

    async def work(self, world: World, bill: Bill) -> Generated | Stream:
        account_id, beginning = bill.hold.account_id, self._beginning
        node = OneNode(world.fleet, self.model, self.tokens_expected, account_id, caller_failure, beginning=beginning)
        if self.streams:
            stream = Stream(self, world, self._caller, bill, node)
            await stream.begin()
            return stream
        try:
            with within(max(0.0, bill.until - world.clock.monotonic())):
                whole, part = await node.ask(lambda part: self._whole(world, bill, part))
        except TimeoutError:
            raise DeadlineExceeded("The answer took longer than it may. Ask for less of it, or for a stream.") from None
        except asyncio.CancelledError:  # its caller has gone, and pays nothing: it was worked for, all the same
            world.rate_limits.spend_tokens(self._caller, self.likely.output)
            raise
        else:
            node.answered()
        finally:
            node.leave()
        data = whole.data
        if self.prompt.modality == "images":
            bill.owe(self._images(whole.images), shares=(Share(part.node_id, 0, part.ask),))
        else:
            spent = self.owe(world, bill, part, whole.usage, len(whole.text.encode("utf-8", "surrogatepass")))
            self.spend(world, spent)
            self.operation.expected.learn(self.model.id, spent.output / self.prompt.generated)
            if spent.estimated:
                data = self.operation.dialect.with_usage(whole, spent.usage)
        return Generated(data, part.node_id)

    def render(self, result: Generated | Stream, headers: dict[str, str]) -> Reply | StreamedReply:
        if isinstance(result, Generated):
            headers[NODE_HEADER] = result.node_id
            return Reply(headers, result.data)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamedReply(headers, result, left=result.left)

    def paid(self, world: World, caller: Caller) -> None:
        """Nothing beyond what its end has taught."""

    @property
    def _beginning(self) -> bytes | None:
        """A hash of the first messages, for this account alone: no speed of an answer tells what others ask."""
        if not self.model.affinity:
            return None
        begins = hashlib.blake2b(self._caller.account_id.encode(), digest_size=BEGINNING_BYTES)
        for text in self.prompt.texts[:BEGINNING_TEXTS]:
            begins.update(text[:BEGINNING_CHARS].encode("utf-8", "surrogatepass") + b"\0")
        return begins.digest()

    @property
    def tokens_expected(self) -> int:
        """About how much work it is, in tokens."""
        if self.prompt.modality == "images":
            return IMAGE_TOKENS * self.prompt.images
        return max(1, self.likely.input + self.likely.output)

    def asked(self) -> GenerationRequest:
        """What a node is asked, but for the name that it has for the model."""
        return asked_of(self.prompt, self.output_max)

    @property
    def leases(self) -> Leases:
        """Of all streams of this gateway."""
        return self.operation.leases

    async def open(self, part: Part, state: StreamState) -> PieceStream:
        """A node's stream, once its head has come. Raises a NodeFailure."""
        stream = await self.operation.client.stream(part, self.model, self.asked(), state.request_id)
        return DialectPieces(self, stream, state)

    def ending(self, spent: Used, state: StreamState) -> tuple[bytes, ...]:
        """What follows the last event."""
        if not self.prompt.wants_usage:
            return (DONE,)
        event = self.operation.dialect.usage_event(self.prompt, self.model, spent.usage, state)
        return b"data: %b\n\n" % event, DONE

    def learn(self, spent: Used) -> None:
        """A stream has ended well."""
        self.operation.expected.learn(self.model.id, spent.output / self.prompt.generated)

    def failure_event(self, failure: Failure) -> bytes:
        """A failure as the data of an event."""
        return self.operation.failure_event(failure)

    def owe(
        self, world: World, bill: Bill, part: Part, said: TokenCounts | None, text_bytes: int, events: int = 0
    ) -> Used:
        """Charge what was used until now: see `flow.usage`."""
        own = TokenCounts(self.likely.input, tokens_of(text_bytes, events))
        spent = used(said, own, text_bytes, self.most, answers=self.prompt.generated)
        input_price, cached_price, output_price = self._prices
        bill.owe(
            Metered(Meter.INPUT, spent.input - spent.cached, input_price, spent.estimated),
            Metered(Meter.CACHED, spent.cached, cached_price, spent.estimated),
            Metered(Meter.OUTPUT, spent.output, output_price, spent.estimated),
            shares=(Share(part.node_id, spent.input + spent.output, part.ask),),
        )
        return spent

    def spend(self, world: World, spent: Used) -> None:
        """What it has used takes from the key's limits, which have our guess of the input."""
        world.rate_limits.spend_tokens(self._caller, spent.input - self.likely.input + spent.output)

    async def _whole(self, world: World, bill: Bill, part: Part) -> Whole:
        operation, asked, request_id = self.operation, self.asked(), bill.hold.hold_id
        reply = await operation.client.generate(part, self.model, asked, request_id)
        whole = operation.dialect.whole(self.prompt, self.model, reply, request_id, world.clock.unix_ms() // 1000)
        if self.prompt.modality == "images" and not 0 < whole.images <= self.prompt.images:
            raise WrongAnswer("the server made another number of images than was asked for")
        return whole

    def _images(self, number: int) -> Metered:
        return Metered(Meter.IMAGES, number, self._image_price)

    @property
    def _size(self) -> str:
        """Of an image."""
        size = self.prompt.size
        assert size is not None
        return size

    @property
    def _whole_bytes_max(self) -> int:
        return whole_bytes_max(self.prompt, self.output_max)


class DialectPieces:
    """A node's events by the dialect's allow-list. Implements `PieceStream`."""

    def __init__(self, call: GenerationCall, stream: NodeStream, state: StreamState) -> None:
        self._dialect = call.operation.dialect
        self._prompt = call.prompt
        self._model = call.model
        self._stream = stream
        self._state = state
        self._left = call.most.output + EVENTS_MORE

    @property
    def is_whole(self) -> bool:
        return self._stream.end == "done" or len(self._state.ended) >= self._prompt.choices

    async def next(self) -> Piece | None:
        data = await self._stream.next()
        if data is None:
            return None
        piece = self._dialect.piece(self._prompt, self._model, data, self._state)
        if piece.text:
            self._left -= 1
            if self._left < 0:
                raise NotAsAsked("the server's stream does not end where it was asked to")
        return piece

    def close(self) -> None:
        self._stream.close()
