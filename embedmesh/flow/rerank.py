"""The operation "rerank": count pairs of the query and each document, have nodes score them, tell the best first.

A pair is an input whose vector has one component, its logit: all else is as in `embed`. Paid are the tokens of all
pairs, or searches where the catalogue has a price for them; then tokens are metered at nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import orjson

from embedmesh.flow.count_pairs import count_pairs
from embedmesh.flow.embed import Embedded, EncodingCall
from embedmesh.flow.operation import CanPayFor
from embedmesh.flow.world import World
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.errors import EmptyInput, Failure, TooManyInputs
from embedmesh.rules.exchange import Reply, RequestHead
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import RERANK_DOCUMENTS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import EMBED_SCOPE, Caller, Catalogue
from embedmesh.rules.reranking import TOO_MANY_DOCUMENTS, Ranked, RerankCall, RerankCounts, searches_of
from embedmesh.rules.served import ParseTerms

FLOAT32 = np.dtype("<f4")


class RerankDialect(Protocol):
    """How one API writes rerank requests and replies. Knows the rules only."""

    def parse(
        self, body: bytes, catalogue: Catalogue, terms: ParseTerms, *, named: str | None
    ) -> tuple[RerankCall, Model]:
        """The call and its model, which reranks; `named` is the model that the path names. Raises a CallerFailure.

        That there are a query and documents, and how many, is checked behind it.
        """
        ...

    def reply_bytes_max(self, call: RerankCall) -> int:
        """What the reply takes in memory at most, in bytes: its body, and the scores."""
        ...

    def render(
        self, call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts, headers: dict[str, str]
    ) -> Reply:
        """The reply, with these headers and the dialect's own. `ranked` are those that are told, the best first."""
        ...

    @property
    def envelope(self) -> Callable[[Failure], bytes] | None:
        """How failures are told; None for OpenAI's envelope. They name `query`, `documents`, `documents.N`."""
        ...


@dataclass(frozen=True)
class Rerank:
    """Rerank documents, in one dialect. Implements the protocol `Operation`."""

    dialect: RerankDialect
    scope = EMBED_SCOPE
    result = Embedded
    modality = "rerank"

    @property
    def envelope(self) -> Callable[[Failure], bytes] | None:
        return self.dialect.envelope

    def parse(self, world: World, head: RequestHead, body: bytes) -> "RerankingCall":
        call, model = self.dialect.parse(body, world.catalogue, world.terms, named=head.model)
        if not call.query:
            raise EmptyInput("`query` must not be empty.", param="query")
        if not call.documents:
            raise EmptyInput("`documents` must not be empty.", param="documents")
        if len(call.documents) > RERANK_DOCUMENTS_MAX:
            raise TooManyInputs(TOO_MANY_DOCUMENTS, param="documents")
        return RerankingCall(RankedForm(self.dialect, model), call, model, call.user)

    def price_min(self, world: World, account_id: str, model: Model | None) -> int:
        models = (each for each in world.catalogue.models if each.reranks) if model is None else (model,)
        return min((_price_of(world, each, account_id) for each in models), default=0)

    def may_be_free(self, world: World, caller: Caller) -> bool:
        return caller.cache is CachePolicy.FREE and world.cache.has(caller.account_id)


class RankedForm(NamedTuple):
    """Writes the reply to one request: scores, the best first, instead of vectors. Implements `ReplyForm`."""

    dialect: RerankDialect
    model: Model

    def reply_bytes_max(self, call: RerankCall, width: int) -> int:
        return self.dialect.reply_bytes_max(call)

    def render(self, call: RerankCall, truncated: int, answer: Answer, headers: dict[str, str]) -> Reply:
        raw = self.model.scores == "raw" if call.raw is None else call.raw
        searches = None if self.model.search_price is None else searches_of(len(call.documents))
        ranked = rank(answer.data, raw=raw, top_n=call.top_n)
        return self.dialect.render(call, ranked, RerankCounts(answer.tokens, searches, truncated), headers)


class RerankingCall(EncodingCall[RerankCall], eq=False):
    """One valid request. Implements the protocol `Invocation`."""

    async def count(self, world: World, caller: Caller, can_pay_for: CanPayFor) -> int:
        tokenizer = world.tokenizers.get(self.model.id)
        self.counted = await count_pairs(self.call, self.model, tokenizer, world.turns, caller.account_id, can_pay_for)
        return self.counted.tokens

    def set_prices(self, world: World, caller: Caller) -> None:
        self.price = _price_of(world, self.model, caller.account_id)

    def metered(self, tokens: int) -> tuple[Metered, ...]:
        charged = tokens - self.free_tokens
        if self.model.search_price is None:
            return (Metered(Meter.INPUT, charged, self.price),)
        free = self.found.inputs if self.found is not None and self.free_tokens else 0
        searches = searches_of(len(self.call.documents) - free)
        return Metered(Meter.SEARCHES, searches, self.price), Metered(Meter.INPUT, charged, 0)


def rank(logits: bytes, *, raw: bool, top_n: int | None = None) -> list[Ranked]:
    """The documents of the `top_n` highest logits (little-endian float32, in order), best first, ties by index.

    A score is the logit, or its logistic function in double precision; then a float32, as its shortest decimals.
    """
    numbers = np.frombuffer(logits, FLOAT32).astype(np.float64)
    order = np.argsort(-numbers, kind="stable")[:top_n]
    scores = numbers[order]
    if not raw:
        with np.errstate(over="ignore"):  # of a number below -709 it is 0
            scores = 1.0 / (1.0 + np.exp(-scores))
    told = orjson.loads(orjson.dumps(scores.astype(np.float32), option=orjson.OPT_SERIALIZE_NUMPY))
    return list(map(Ranked, order.tolist(), told))


def _price_of(world: World, model: Model, account_id: str) -> int:
    """Of a million searches where those are paid, else of a million tokens."""
    if model.search_price is not None:
        return world.prices.search(model, account_id)
    return world.prices.of(model, account_id)
