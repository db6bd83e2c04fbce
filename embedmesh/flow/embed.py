"""The operation "embeddings": count, look into the cache, have the rest embedded by nodes, put all vectors together."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Generic, Protocol, TypeVar

import msgspec

from embedmesh.flow.bill import Bill
from embedmesh.flow.cache import Learnt, Remembered
from embedmesh.flow.count import count, count_soon
from embedmesh.flow.forward import Begun, forward, time_allowed_s
from embedmesh.flow.operation import Bound, CanPayFor
from embedmesh.flow.verify import verify
from embedmesh.flow.world import World
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Call, Counted
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import CACHED_HEADER, NODE_HEADER, Reply, RequestHead
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import EMBED_SCOPE, Caller, Catalogue
from embedmesh.rules.reranking import RerankCall
from embedmesh.rules.served import ParseTerms, no_such_model

NODES_NAMED_MAX = 8  # in a header; the ledger has all
COMPONENT_BYTES = 4
INPUT = Meter.INPUT  # an enum's member is slow to look up
NOT_COUNTED = Counted([])

AnyCall = TypeVar("AnyCall", Call, RerankCall)
Asked = TypeVar("Asked", contravariant=True)


class Embedded(msgspec.Struct, frozen=True, array_like=True):
    """The result: all vectors, and how many inputs were cut or found in the cache (None: no cache)."""

    answer: Answer
    truncated: int
    cached: int | None = None


class ReplyForm(Protocol[Asked]):
    """How the reply to a request is written."""

    def reply_bytes_max(self, call: Asked, width: int) -> int:
        """What the reply takes in memory at most, in bytes: its body and its vectors, `width` components each."""
        ...

    def render(self, call: Asked, truncated: int, answer: Answer, headers: dict[str, str]) -> Reply:
        """The reply, with these headers and the form's own."""
        ...


class Dialect(ReplyForm[Call], Protocol):
    """How one API writes embedding requests and replies. Knows the rules only."""

    def parse(self, body: bytes, catalogue: Catalogue, terms: ParseTerms, *, named: str | None) -> tuple[Call, Model]:
        """The call and its model; `named` is the model that the path names. Raises a CallerFailure."""
        ...

    def parse_ordinary(self, body: bytes, catalogue: Catalogue) -> tuple[Call, Model] | None:
        """The same for a request that needs no closer look; None for any other."""
        ...

    @property
    def envelope(self) -> Callable[[Failure], bytes] | None:
        """How failures are told; None for OpenAI's envelope."""
        ...


@dataclass(frozen=True)
class Embeddings:
    """Create embeddings, in one dialect. Implements the protocol `Operation`."""

    dialect: Dialect
    scope = EMBED_SCOPE
    result = Embedded

    @property
    def envelope(self) -> Callable[[Failure], bytes] | None:
        return self.dialect.envelope

    def parse(self, world: World, head: RequestHead, body: bytes) -> "EmbeddingsCall":
        call, model = self.dialect.parse(body, world.catalogue, world.terms, named=head.model)
        return EmbeddingsCall(self.dialect, call, model, call.user)

    def read_now(self, world: World, caller: Caller, body: bytes) -> "tuple[EmbeddingsCall, Metered] | None":
        """An ordinary request that the caller may make, counted at once, and what is metered; None for any other."""
        parsed = self.dialect.parse_ordinary(body, world.catalogue)
        if parsed is None:
            return None
        call, model = parsed
        if caller.models is not None and model.id not in caller.models:
            return None
        counted = count_soon(call, model, world.tokenizers.get(model.id), world.cl100k)
        if counted is None:
            return None
        price = world.prices.of(model, caller.account_id)
        return (
            EmbeddingsCall(self.dialect, call, model, None, counted, missing=counted, price=price),
            Metered(INPUT, sum(counted.lengths), price),
        )

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        models = world.catalogue.models if model is None else (model,)
        return min((world.prices.of(each, account_id) for each in models if each.search_price is None), default=0)

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return caller.cache is CachePolicy.FREE and world.cache.has(caller.account_id)


class EncodingCall(msgspec.Struct, Generic[AnyCall], eq=False):
    """One valid request for what nodes make of some inputs, `Model.width` numbers of each.

    Implements the protocol `Invocation`, but for `count`. What is charged may differ by operation: `set_prices`,
    `metered`.
    """

    form: ReplyForm[AnyCall]
    call: AnyCall
    model: Model
    user: str | None
    counted: Counted = NOT_COUNTED
    begun: Begun | None = None  # an attempt that is under way already
    found: Remembered | None = None  # in the cache
    missing: Counted = NOT_COUNTED  # what has to be embedded
    free_tokens: int = 0  # that the cache gives
    price: int = 0
    _learnt: Learnt | None = None

    streams: ClassVar[bool] = False
    lock: ClassVar[None] = None

    @property
    def reply_bytes_max(self) -> int:
        return self.form.reply_bytes_max(self.call, self.model.width)

    def check_served(self, world: World) -> None:
        if not world.fleet.may_come(self.model):
            raise no_such_model(self.call.model, world.catalogue, world.terms.serves)

    @property
    def kept_bytes(self) -> int:
        return len(self.counted.lengths) * self.model.width * COMPONENT_BYTES

    def bound(self, world: World, caller: Caller, *, claimed: bool) -> Bound:
        counted, model = self.counted, self.model
        if caller.cache is not CachePolicy.OFF:
            self.found = world.cache.look(caller.account_id, model, counted)
        found = self.found
        self.missing = missing = found.missing if found is not None and found.inputs else counted
        within_s = REQUEST_MIN_S
        if missing.lengths:
            within_s = time_allowed_s(model, missing.tokens, world.fleet)
            if not claimed:  # else the result may have been kept, or is under way
                world.fleet.may_wait(model, missing.tokens, caller.account_id)
        free = found.tokens if found is not None and caller.cache is CachePolicy.FREE else 0
        self.free_tokens = free
        self.set_prices(world, caller)
        result = None
        if found is not None and free == counted.tokens:  # no node, no debt
            result = Embedded(found.join(None, model.width), counted.truncated, found.inputs)
        return Bound(self.metered(counted.tokens), within_s, result)

    async def work(self, world: World, bill: Bill) -> Embedded:
        missing, found = self.missing, self.found
        answer = None
        if missing.lengths:
            left_s = bill.until - world.clock.monotonic()
            answer = await forward(
                self.model, missing, bill.hold, left_s, world.fleet, world.client, verify, world.observer, self.begun
            )
            if found is not None:
                self._learnt = world.cache.learn(missing, answer)
        if found is not None:
            answer = found.join(answer, self.model.width)
        assert answer is not None
        bill.owe(*self.metered(answer.tokens), shares=answer.shares)
        return Embedded(answer, self.counted.truncated, found.inputs if found is not None else None)

    def render(self, result: Embedded, headers: dict[str, str]) -> Reply:
        first, *others = result.answer.shares
        headers[NODE_HEADER] = first.node_id
        if others:
            headers[NODE_HEADER] = ",".join([share.node_id for share in (first, *others[: NODES_NAMED_MAX - 1])])
        if result.cached is not None:
            headers[CACHED_HEADER] = str(result.cached)
        return self.form.render(self.call, result.truncated, result.answer, headers)

    def paid(self, world: World, caller: Caller) -> None:
        if self._learnt is not None:
            world.cache.keep(caller.account_id, self.model, self._learnt)

    def set_prices(self, world: World, caller: Caller) -> None:
        """Find out what `metered` needs to know: hold and charge are at the same prices."""
        self.price = world.prices.of(self.model, caller.account_id)

    def metered(self, tokens: int) -> tuple[Metered, ...]:
        """What is charged where nodes and cache have counted that many tokens, but for what the cache gives free."""
        return (Metered(INPUT, tokens - self.free_tokens, self.price),)


class EmbeddingsCall(EncodingCall[Call], eq=False):
    """One valid request for embeddings. Implements the protocol `Invocation`."""

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        tokenizer = world.tokenizers.get(self.model.id)
        self.counted = await count(
            self.call, self.model, tokenizer, world.cl100k, world.turns, caller.account_id, can_pay_for
        )
        return self.counted.tokens
