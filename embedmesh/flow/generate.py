"""The operations "chat", "completions" and "images": forwarded to a node of another make, never computed here.

    hold     = bound of the input * its price + answers * output limit * its price; images: how many * price by size
    capture  = what the node says it has used, if that can be; else our own count, marked

An output limit is always sent to the node. A stream is told in `stream.py`.
"""

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
from embedmesh.flow.stream import Stream
from embedmesh.flow.usage import Most, Used, tokens_of, used
from embedmesh.flow.world import World
from embedmesh.rules.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    Failure,
    InvalidValue,
    WrongAnswer,
)
from embedmesh.rules.exchange import NODE_HEADER, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part, Share
from embedmesh.rules.generation import (
    GeneratingClient,
    GenerationDialect,
    GenerationRequest,
    Prompt,
    TokenCounts,
    Whole,
)
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import REQUEST_MAX_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.served import no_such_model

GENERATE_SCOPE = "generate"
TEMPLATE_TOKENS_LIKELY = 4  # around a message, where no node says
ALONE_BYTES = 32 * 1024  # of text that is counted on the event loop: a millisecond
ANSWER_FRAME_BYTES = 64 * 1024  # around the answers
ANSWER_BYTES_A_TOKEN = 64  # of an answer in JSON, escaped; ordinary text has six
LOGPROB_BYTES = 160  # of one token with its probability and its bytes
STREAM_ROOM_BYTES = 256 * 1024  # of a stream: its events wait in the kernel and with the node
EVENT_BYTES_A_TOKEN = 4_096  # of a stream's events: each repeats its id, its model and usage
PIXEL_BYTES = 6  # of an image in base64: an honest encoder needs a third
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
        text_bytes = sum(len(text.encode("utf-8", "surrogatepass")) for text in prompt.texts)
        given = prompt.ids + (model.image_tokens or 0) * (prompt.images if prompt.size is None else 0)
        templates = 1 + prompt.messages
        tokenizer, exact = world.tokenizers.get(model.id), None
        if tokenizer is not None:
            ids = tokenizer.ids
            if text_bytes <= ALONE_BYTES:
                exact = sum(map(len, ids(prompt.texts)))
            else:
                exact = sum(map(len, await world.turns.call(caller.account_id, ids, prompt.texts)))
        bound = (text_bytes if exact is None else exact) + given + templates * model.template_tokens
        likely = (tokens_of(text_bytes) if exact is None else exact) + given
        if prompt.messages:
            likely += templates * min(TEMPLATE_TOKENS_LIKELY, model.template_tokens)
        if exact is not None and exact + given > model.max_tokens:
            raise ContextLengthExceeded(
                f"The prompt has {exact + given:,} tokens; this model takes {model.max_tokens:,}, answer included.",
                param="messages" if prompt.messages else "prompt",
            )
        most_input = min(bound, model.max_tokens * max(1, prompt.choices))
        self.most = Most(most_input, prompt.generated * self.output_max)
        output = self.operation.expected.of(model.id, self.output_max) * prompt.generated
        self.likely = TokenCounts(min(likely, most_input), min(ceil(output), self.most.output))
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
        node = OneNode(world.fleet, self.model, self.tokens_expected, bill.hold.account_id, caller_failure)
        if self.streams:
            stream = Stream(self, world, self._caller, bill, node)
            await stream.begin()
            return stream
        try:
            with within(max(0.0, bill.until - world.clock.monotonic())):
                whole, part = await node.ask(lambda part: self._whole(world, bill, part))
        except TimeoutError:
            raise DeadlineExceeded("The answer took longer than it may. Ask for less of it, or for a stream.") from None
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
    def tokens_expected(self) -> int:
        """About how much work it is, in tokens."""
        if self.prompt.modality == "images":
            return IMAGE_TOKENS * self.prompt.images
        return max(1, self.likely.input + self.likely.output)

    def asked(self) -> GenerationRequest:
        """What a node is asked, but for the name that it has for the model."""
        prompt = self.prompt
        body = prompt.body
        if prompt.modality != "images":
            body = body | dict.fromkeys(prompt.limits, self.output_max)
        most = self._stream_bytes_max if self.streams else self._whole_bytes_max
        return GenerationRequest(prompt.modality, body, most, self.streams)

    def owe(self, world: World, bill: Bill, part: Part, said: TokenCounts | None, text_bytes: int) -> Used:
        """Charge what was used until now: see `flow.usage`."""
        own = TokenCounts(self.likely.input, tokens_of(text_bytes))
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
        prompt = self.prompt
        if prompt.size is not None:
            width, _, height = prompt.size.partition("x")
            return ANSWER_FRAME_BYTES + prompt.images * int(width) * int(height) * PIXEL_BYTES
        top = prompt.body.get("top_logprobs") or prompt.body.get("logprobs") or 0
        a_token = ANSWER_BYTES_A_TOKEN + LOGPROB_BYTES * (1 + int(top) if top else 0)
        return ANSWER_FRAME_BYTES + prompt.generated * self.output_max * a_token

    @property
    def _stream_bytes_max(self) -> int:
        return ANSWER_FRAME_BYTES + self.prompt.generated * self.output_max * EVENT_BYTES_A_TOKEN
