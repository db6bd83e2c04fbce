"""A small world that reranks: a dialect of one JSON form, and nodes whose logits are a rule."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from embedmesh.catalogue import Catalogue
from embedmesh.flow.paid import serve
from embedmesh.flow.rerank import Rerank
from embedmesh.rules import ports
from embedmesh.rules.embeddings import ENDS_FIRST, Counted, EmbedVectors, numbers_of
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import RERANK, Model
from embedmesh.rules.reranking import Ranked, RerankCall, RerankCounts
from embedmesh.rules.served import ParseTerms, no_such_model
from tests.flow.world import CATALOGUE, GOOD_KEY, LetterTokenizer, ScriptedNodes, ScriptedWorld, make_world

BY_TOKENS = Model(
    id="acme/reranker", folder="/nowhere", width=1, max_tokens=20, price=1_500_000, digest="2" * 64, modalities=RERANK
)
BY_SEARCHES = msgspec.structs.replace(BY_TOKENS, id="acme/searcher", price=0, search_price=2_000, scores="raw")
FOREIGN = Model(id="acme/away", width=1, max_tokens=20, price=1_500_000, modalities=RERANK)
RERANKERS = (BY_TOKENS, BY_SEARCHES, FOREIGN)
SPECIALS = LetterTokenizer.specials + len(LetterTokenizer.between)  # of a pair
PRICE = 1.5  # nano-USD a token


class PlainRerank:
    """The call itself as JSON, and all that there is to tell."""

    envelope = None

    def parse(
        self, body: bytes, catalogue: ports.Catalogue, terms: ParseTerms, *, named: str | None
    ) -> tuple[RerankCall, Model]:
        call = msgspec.json.decode(body, type=RerankCall)
        model = catalogue.find(call.model)
        if model is None:
            raise no_such_model(call.model, catalogue, terms.serves)
        return call, model

    def reply_bytes_max(self, call: RerankCall) -> int:
        return 100 * len(call.documents) + 100

    def render(
        self, call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts, headers: dict[str, str]
    ) -> Reply:
        return Reply(headers, msgspec.json.encode({"ranked": ranked, "counts": counts}))


PLAIN = Rerank(PlainRerank())


def body(documents: Sequence[str], query: str = "abc", model: Model = BY_TOKENS, **more: Any) -> bytes:
    return json.dumps({"model": model.id, "query": query, "documents": list(documents), **more}).encode()


def logit_of(pair: list[int]) -> float:
    """By the document's ids alone, so that a test can say what comes: `a` is 1, `b` is 2; longer ones add up."""
    at = next(at for at, token in enumerate(pair) if token & ENDS_FIRST)
    return float(sum(pair[at + 1 :])) - 8.0


class ScoringNodes(ScriptedNodes):
    """Answers by a script, else with the right logits."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.ids is not None
        pairs = [numbers_of(counted.ids[row]) for row in part.rows]
        self.asked.append((part.node_id, pairs))
        step = next(self._script)
        if isinstance(step, BaseException):
            raise step
        return step or scored(pairs)


def scored(pairs: Sequence[list[int]]) -> EmbedVectors:
    tokens = sum(map(len, pairs)) + LetterTokenizer.specials * len(pairs)
    return EmbedVectors(tokens, np.array([logit_of(pair) for pair in pairs], "<f4").tobytes())


def ranking_world(*script: Failure | EmbedVectors | None, nodes: int = 1) -> ScriptedWorld:
    world = make_world(ScoringNodes(*script), nodes=nodes)
    catalogue = Catalogue((*CATALOGUE.models, *RERANKERS))
    for number in range(nodes):
        world.fleet.registry.answered_right(world.node(f"n{number}"), [model.id for model in catalogue.models])
    tokenizers = {model.id: LetterTokenizer() for model in catalogue.models if not model.foreign}
    return msgspec.structs.replace(world, catalogue=catalogue, tokenizers=tokenizers)


async def ask(
    world: ScriptedWorld,
    sent: bytes,
    *,
    api_key: str = GOOD_KEY,
    key: str | None = None,
    retries: int | None = None,
    how: Delivery | None = Delivery.WHOLE,
) -> Reply:
    """The reply, whose delivery ended in that way; None: the caller is gone before it begins."""
    delivered: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return sent

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        if how is None:
            raise ConnectionResetError("the caller went")
        delivered.append(reply)
        return how

    await serve(world, PLAIN, RequestHead(f"Bearer {api_key}", key, retries), receive, deliver)
    return delivered[0]


def ranked(reply: Reply) -> list[tuple[int, float]]:
    return [(index, score) for index, score in json.loads(reply.body)["ranked"]]


def counts(reply: Reply) -> dict[str, int | None]:
    found: dict[str, int | None] = json.loads(reply.body)["counts"]
    return found
