"""The operations "confidential chat", "completions" and "images": carried sealed to the one sidecar that was locked.

    hold     = the lock's: its tokens at the dearest price, or the dearest image
    capture  = the node's signed counts within their bounds, at the prices of now, never above the hold

A stream is charged by the counts that are signed with its last event that was handed over. Prices that have risen since
the lock was opened do not count.
"""

from collections.abc import Callable
from functools import partial

import msgspec

from embedmesh.deadline import within
from embedmesh.flow.bill import Bill
from embedmesh.flow.confidential import KEPT_OF_LOCKS_BYTES_MAX, TokenBounds, token_bounds
from embedmesh.flow.forward import caller_failure
from embedmesh.flow.generate import GENERATE_SCOPE, IMAGE_TOKENS, STREAM_ROOM_BYTES
from embedmesh.flow.leases import LEASE_S, Leases
from embedmesh.flow.lock import check_fits
from embedmesh.flow.one_node import OneNode
from embedmesh.flow.operation import Bound, CanPayFor, PayingLock
from embedmesh.flow.prompt_bounds import (
    ANSWER_FRAME_BYTES,
    EVENT_BYTES_A_TOKEN,
    SEALED_ANSWER_SHARE,
    image_bytes_max,
    sealed_input_max,
    sealed_whole_bytes_max,
)
from embedmesh.flow.sealed_pieces import GenerationEnvelopes, SealedPieces, check_not_refused, counts_of
from embedmesh.flow.stream import PieceStream, Stream
from embedmesh.flow.usage import Used
from embedmesh.flow.world import World
from embedmesh.rules.confidential import Locks, LockTerms, SealedAnswer, SealedCall
from embedmesh.rules.errors import (
    DeadlineExceeded,
    Failure,
    InvalidValue,
    NodeFailure,
    NoNodeAvailable,
    UnsupportedModality,
)
from embedmesh.rules.exchange import NODE_HEADER, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part, Share
from embedmesh.rules.generation import Generating, StreamState, TokenCounts
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import REQUEST_MAX_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.sealed_generation import (
    CheckedEvent,
    GeneratingNodes,
    GenerationStatement,
    SealedBounds,
    SignedCounts,
    largest_size,
)
from embedmesh.rules.served import no_such_model

SEALED_AND_BASE64 = 3  # times: as it comes from the node, as base64, as JSON


class SealedGenerated(msgspec.Struct, frozen=True, array_like=True):
    """The result: a node's answer, and what it has counted."""

    answer: SealedAnswer
    counts: SignedCounts
    node_id: str


class ConfidentialGeneration:
    """Implements the protocol `Operation` for one modality."""

    scope = GENERATE_SCOPE
    result = SealedGenerated

    def __init__(
        self, modality: Generating, dialect: GenerationEnvelopes, locks: Locks, nodes: GeneratingNodes, leases: Leases
    ) -> None:
        self.modality = modality
        self.dialect = dialect
        self.locks = locks
        self.nodes = nodes
        self.leases = leases
        self.envelope: Callable[[Failure], bytes] | None = dialect.refusal

    def parse(self, world: World, head: RequestHead, body: bytes) -> "SealedGenerationCall":
        if head.idempotency_key is not None:
            raise InvalidValue("A lock is for one request already: leave the Idempotency-Key out.")
        call, stream = self.dialect.parse(body)
        model = world.catalogue.find(call.model_name)
        if model is None:
            raise no_such_model(call.model_name, world.catalogue, world.terms.serves)
        if self.modality not in model.modalities:
            raise UnsupportedModality("This model does something else. Use that path, or another model.", param="model")
        if stream and self.modality == "images":
            raise InvalidValue("Images are not streamed: leave `stream` out, or false.", param="stream")
        return SealedGenerationCall(self, call, model, stream=stream)

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        return 0

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return True  # a lock has the money: what the account has beside it says nothing


class SealedGenerationCall:
    """One valid request. Implements the protocols `Invocation` and `StreamedCall`."""

    user = None
    lock: PayingLock | None = None
    _terms: LockTerms
    _caller: Caller
    _tokens: TokenBounds
    _prices: tuple[int, int, int]  # input, cached, output
    _events: "SealedPieces"
    _answer_bytes: int | None = None  # once it is there

    def __init__(self, operation: ConfidentialGeneration, call: SealedCall, model: Model, *, stream: bool) -> None:
        self.model = model
        self.streams = stream
        self._operation = operation
        self._call = call
        self._plaintext_bytes = operation.dialect.plaintext_bytes_max(call)

    # -- Invocation

    @property
    def reply_bytes_max(self) -> int:
        return STREAM_ROOM_BYTES if self.streams else SEALED_AND_BASE64 * self._whole_bytes_max

    @property
    def kept_bytes(self) -> int:
        return self._whole_bytes_max if self._answer_bytes is None else self._answer_bytes

    def check_served(self, world: World) -> None:
        if not world.fleet.may_come(self.model):
            raise no_such_model(self._call.model_name, world.catalogue, world.terms.serves)

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        """Find the lock, and bound what the ciphertext can hold. Raises LockNotFound or KeyMismatch."""
        operation = self._operation
        found = await operation.locks.find(caller.account_id, self._call.lock)
        terms = found.terms
        check_fits(self._call, self.model, terms)
        self._terms, self._caller = terms, caller
        self._call = msgspec.structs.replace(self._call, model=terms.model, units=terms.units)
        self._tokens = self._token_bounds(terms.units)
        may_be_kept = not self.streams and found.kept_bytes + self.kept_bytes <= KEPT_OF_LOCKS_BYTES_MAX
        redeem = partial(operation.locks.redeem, found)
        self.lock = PayingLock(terms, redeem, kept=may_be_kept, here=operation.nodes.is_here(terms))
        return self._taken

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        world.fleet.may_wait(self.model, self._likely, caller.account_id)
        prices, model, most = world.prices, self.model, self._terms.price
        self._prices = (
            min(prices.of(model, caller.account_id), most),
            min(prices.meter(model, caller.account_id, Meter.CACHED), most),
            min(prices.meter(model, caller.account_id, Meter.OUTPUT), most),
        )
        within_s = LEASE_S if self.streams else REQUEST_MAX_S
        return Bound((Metered(Meter.INPUT, self._terms.units, most),), within_s)

    async def work(self, world: World, bill: Bill) -> SealedGenerated | Stream:
        node = OneNode(world.fleet, self.model, self._likely, bill.hold.account_id, _failure, only=self._terms.node_id)
        if self.streams:
            stream = Stream(self, world, self._caller, bill, node)
            await stream.begin()
            return stream
        try:
            with within(max(0.0, bill.until - world.clock.monotonic())):
                event, part = await node.ask(lambda part: self._whole(bill.hold.hold_id))
        except TimeoutError:
            raise DeadlineExceeded("The node did not answer in time. Lock again, and ask for less.") from None
        finally:
            node.leave()  # its tokens were a guess: nothing is learned of the node's speed
        self._answer_bytes = len(event.answer.sealed)
        used = self._owe(world, bill, part, event.statement)
        self.spend(world, used)
        return SealedGenerated(event.answer, counts_of(event.statement), self._terms.node_id)

    def render(self, result: SealedGenerated | Stream, headers: dict[str, str]) -> Reply | StreamedReply:
        headers[NODE_HEADER] = self._terms.node_id
        if isinstance(result, SealedGenerated):
            return self._operation.dialect.render(self._call.scheme, result.answer, result.counts, headers)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        return StreamedReply(headers, result, left=result.left)

    def paid(self, world: World, caller: Caller) -> None:
        """Nothing is learned of what nobody here can read."""

    # -- StreamedCall

    @property
    def leases(self) -> Leases:
        return self._operation.leases

    async def open(self, part: Part, state: StreamState) -> PieceStream:
        operation = self._operation
        bounds = self._bounds()
        stream = await operation.nodes.stream(self._terms, self._call, operation.modality, bounds, state.request_id)
        self._events = SealedPieces(stream, operation.dialect, self._call.scheme)
        return self._events

    def owe(self, world: World, bill: Bill, part: Part, said: TokenCounts | None, text_bytes: int, events: int) -> Used:
        statement = self._events.statement
        assert statement is not None  # an event has come
        return self._owe(world, bill, part, statement)

    def spend(self, world: World, spent: Used) -> None:
        world.rate_limits.spend_tokens(self._caller, spent.input + spent.output - self._taken)

    def learn(self, spent: Used) -> None:
        """Nothing is learned of what nobody here can read."""

    def ending(self, spent: Used, state: StreamState) -> tuple[bytes, ...]:
        return ()  # no `[DONE]`: the SDKs raise on it, and the last event says of itself that it is the last

    def failure_event(self, failure: Failure) -> bytes:
        return self._operation.dialect.refusal(failure)

    # -- inside

    @property
    def _draws(self) -> bool:
        return self._operation.modality == "images"

    @property
    def _taken(self) -> int:
        """Tokens that it takes from the key's limits at first."""
        return 0 if self._draws else self._tokens.likely

    @property
    def _likely(self) -> int:
        """About how much work it is, in tokens."""
        return IMAGE_TOKENS if self._draws else max(1, self._tokens.likely + self.model.output_max // 4)

    async def _whole(self, request_id: str) -> CheckedEvent:
        operation = self._operation
        bounds = self._bounds()
        event = await operation.nodes.generate(self._terms, self._call, operation.modality, bounds, request_id)
        check_not_refused(event, self._call.scheme)
        return event

    def _owe(self, world: World, bill: Bill, part: Part, said: GenerationStatement) -> Used:
        """Charge what the node has signed for, which was found to be within its bounds."""
        if self._draws:
            price = min(world.prices.image(self.model, self._caller.account_id, said.size), _of_one(bill))
            bill.owe(Metered(Meter.IMAGES, 1, price), shares=(Share(part.node_id, 0, part.ask),))
            return Used(0, 0)
        tokens = max(said.input, self._tokens.least)
        used = Used(tokens, min(said.output, self._terms.units - tokens), said.cached, estimated=said.estimated)
        input_price, cached_price, output_price = self._prices
        bill.owe(
            Metered(Meter.INPUT, used.input - used.cached, input_price, used.estimated),
            Metered(Meter.CACHED, used.cached, cached_price, used.estimated),
            Metered(Meter.OUTPUT, used.output, output_price, used.estimated),
            shares=(Share(part.node_id, used.input + used.output, part.ask),),
        )
        return used

    def _token_bounds(self, units: int) -> TokenBounds:
        """Of the input. Templates add to each message; images take what the model says, whatever their bytes are."""
        size, model = self._plaintext_bytes, self.model
        bounds = token_bounds(size, units, 0)
        if model.image_tokens is not None:
            bounds = bounds._replace(least=0)
        return bounds._replace(most=max(1, min(units, sealed_input_max(size, model))))

    def _bounds(self) -> SealedBounds:
        sizes = tuple(self.model.image_prices) if self._draws else ()
        reply_bytes = self._whole_bytes_max
        if self.streams:
            reply_bytes = SEALED_ANSWER_SHARE * (ANSWER_FRAME_BYTES + self._terms.units * EVENT_BYTES_A_TOKEN)
        return SealedBounds(self._tokens.most, self._terms.units, reply_bytes, sizes)

    @property
    def _whole_bytes_max(self) -> int:
        """Of a whole answer; a longer one can be had as a stream. The lock is not known when room is taken."""
        if self._draws:
            return SEALED_ANSWER_SHARE * image_bytes_max(largest_size(self.model), 1)
        return sealed_whole_bytes_max(self.model)


def _failure(last: NodeFailure | None) -> Failure:
    if last is None:
        return NoNodeAvailable("The node that was locked is not there now. Lock again.")
    return caller_failure(last)


def _of_one(bill: Bill) -> int:
    """The price of a million at which one costs all that is held."""
    return bill.hold.amount_nanousd * 1_000_000
