"""Reranking goes the way of embeddings: held, scored, told the best first, charged once, by tokens or by searches."""

import asyncio
import math
import random
import struct
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.catalogue import Catalogue
from embedmesh.flow.lock import lock_node
from embedmesh.flow.paid import BYTES_A_TOKEN, LARGE_BYTES
from embedmesh.flow.rerank import rank
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.confidential import SDK_SCHEME
from embedmesh.rules.embeddings import EmbedVectors
from embedmesh.rules.errors import Failure, NodeBroke
from embedmesh.rules.exchange import Delivery
from embedmesh.rules.holds import Meter, Metered
from embedmesh.rules.limits import RERANK_DOCUMENTS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.money import cost_nanousd
from embedmesh.rules.ports import Caller
from embedmesh.rules.reranking import Ranked
from tests.flow.reranking import (
    BY_SEARCHES,
    BY_TOKENS,
    PLAIN,
    SPECIALS,
    ask,
    body,
    counts,
    ranked,
    ranking_world,
)
from tests.flow.world import METERED_KEY, POOR_KEY, SCOPELESS_KEY, ScriptedWorld

DOCUMENTS = ["ab", "zz", "", "d", "b" * 4]
LOGITS = [(1, 50.0), (4, 12.0), (0, 1.0), (3, -1.0), (2, -8.0)]  # by their letters: `a` is 4
TOKENS = 9 + 5 * (3 + SPECIALS)  # of their letters, and of the query and the special tokens with each
COST = math.ceil(TOKENS * 1.5)
BROKEN_OFF = Delivery.BROKEN_OFF


def sigmoid(logit: float) -> float:
    """In double precision, as the float32 that is told."""
    told: float = struct.unpack("f", struct.pack("f", 1 / (1 + math.exp(-logit))))[0]
    return told


def charges(world: ScriptedWorld) -> list[int]:
    return [amount for what, amount in world.ledger.log if what == "capture"]


# -- scores ------------------------------------------------------------------------------------------------------------


async def test_the_best_are_told_first_and_the_tokens_of_all_pairs_are_paid() -> None:
    world = ranking_world()
    reply = await ask(world, body(DOCUMENTS))
    assert [index for index, _ in ranked(reply)] == [index for index, _ in LOGITS]
    assert dict(ranked(reply)) == pytest.approx({index: sigmoid(logit) for index, logit in LOGITS}, rel=1e-7)
    assert counts(reply) == {"tokens": TOKENS, "searches": None, "truncated": 0}
    assert reply.headers["x-embedmesh-node"] == "n0"
    assert reply.headers["x-embedmesh-cost-nanousd"] == str(COST)
    assert world.ledger.log == [("hold", COST), ("capture", COST)]
    (charge,) = world.ledger.charges
    assert (charge.tokens, charge.price, charge.meters) == (TOKENS, BY_TOKENS.price, ())
    assert world.rate_limits.asked == [TOKENS]


async def test_scores_are_as_the_model_says_or_as_the_caller_asks() -> None:
    world = ranking_world()
    assert ranked(await ask(world, body(DOCUMENTS, raw=True))) == LOGITS
    assert ranked(await ask(world, body(DOCUMENTS, model=BY_SEARCHES))) == LOGITS
    assert ranked(await ask(world, body(DOCUMENTS, model=BY_SEARCHES, top_n=2))) == LOGITS[:2]
    told = ranked(await ask(world, body(DOCUMENTS, model=BY_SEARCHES, raw=False, top_n=9)))
    assert dict(told)[0] == pytest.approx(sigmoid(1.0), rel=1e-7)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-1e4, max_value=1e4), min_size=1, max_size=9))
def test_any_logits_are_ranked(logits: list[float]) -> None:
    """Highest first, equal ones as they came, also where no float32 tells their scores apart; in shortest decimals."""
    order = sorted(range(len(logits)), key=lambda at: (-logits[at], at))
    data = np.array(logits, "<f4").tobytes()
    for raw in (True, False):
        found = rank(data, raw=raw)
        assert [each.index for each in found] == order
        for each in found:
            logit = logits[each.index]
            exact = logit if raw else 1 / (1 + math.exp(-logit)) if logit > -700 else 0.0
            assert each.score == pytest.approx(exact, rel=3e-7, abs=1e-44)  # a float32, and its shortest decimals
            assert len(repr(each.score)) <= len("-1.37983405e-27"), "the shortest decimals of a float32"
    assert rank(data, raw=True, top_n=1) == [Ranked(order[0], float(str(np.float32(logits[order[0]]))))]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
async def test_what_is_no_number_is_no_score(wrong: float) -> None:
    tokens = 2 + 2 * (3 + SPECIALS)
    world = ranking_world(EmbedVectors(tokens, np.array([1.0, wrong], "<f4").tobytes()))
    with pytest.raises(Failure) as refused:
        await ask(world, body(["a", "b"]))
    assert refused.value.code == "bad_node_response"
    assert charges(world) == []


async def test_a_thousand_documents_over_two_nodes_are_merged_in_order() -> None:
    """Each document once, whichever node scored it, and also where a node broke."""
    dice = random.Random(7)
    documents = ["".join(dice.choices("abcdefg", k=dice.randrange(15))) for _ in range(1_000)]
    world = ranking_world(None, NodeBroke("broke"), nodes=2)
    reply = await ask(world, body(documents, raw=True))
    logits = [sum(ord(letter) % 31 for letter in document) - 8.0 for document in documents]
    assert ranked(reply) == sorted(enumerate(logits), key=lambda each: (-each[1], each[0]))
    assert {node for node, _ in world.client.asked} == {"n0", "n1"}
    assert len(charges(world)) == 1


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = [
    (body(DOCUMENTS, query=""), "empty_input", "query"),
    (body([]), "empty_input", "documents"),
    (body(["a"] * (RERANK_DOCUMENTS_MAX + 1)), "too_many_inputs", "documents"),
    (body(["a", "d" * 30], truncate="none"), "context_length_exceeded", "documents.1"),
    (body(["a"], query="q" * 30, truncate="none"), "context_length_exceeded", "query"),
    (body(["a"]).replace(b"acme/reranker", b"acme/nobody"), "model_not_found", "model"),
]


@pytest.mark.parametrize(("sent", "code", "param"), REFUSED)
async def test_what_is_refused_is_named_costs_nothing_and_counts(sent: bytes, code: str, param: str) -> None:
    world = ranking_world()
    with pytest.raises(Failure) as refused:
        await ask(world, sent)
    assert (refused.value.code, refused.value.param) == (code, param)
    assert world.ledger.log == [] and world.client.asked == []
    assert world.rate_limits.in_vain == [len(sent) // BYTES_A_TOKEN]


async def test_as_many_documents_as_there_may_be_are_ranked() -> None:
    reply = await ask(ranking_world(nodes=2), body(["a"] * RERANK_DOCUMENTS_MAX, top_n=3))
    assert [index for index, _ in ranked(reply)] == [0, 1, 2]


@pytest.mark.parametrize("model", [BY_TOKENS, BY_SEARCHES])
@pytest.mark.parametrize("size", [10, LARGE_BYTES])
async def test_without_money_no_node_is_asked(model: Model, size: int) -> None:
    world = ranking_world()
    for key, code in ((POOR_KEY, "insufficient_quota"), (SCOPELESS_KEY, "insufficient_scope")):
        with pytest.raises(Failure) as refused:
            await ask(world, body(["a" * size], model=model), api_key=key)
        assert refused.value.code == code
    assert world.client.asked == [] and world.ledger.log == []


async def test_the_limits_of_a_key_count_pairs() -> None:
    """Twelve tokens a minute: one pair of nine, and no other."""
    world = ranking_world()
    await ask(world, body(["abc"]), api_key=METERED_KEY)
    with pytest.raises(Failure) as refused:
        await ask(world, body(["abc"]), api_key=METERED_KEY)
    assert refused.value.code == "rate_limit_exceeded"
    assert len(charges(world)) == 1


def test_the_least_price_is_that_of_what_is_counted() -> None:
    """Of tokens or of searches; models that embed have another operation."""
    world = ranking_world()
    assert PLAIN.price_min(world, "acct", BY_TOKENS) == BY_TOKENS.price
    assert PLAIN.price_min(world, "acct", BY_SEARCHES) == 2_000 * 1_000_000
    assert PLAIN.price_min(world, "acct", None) == BY_TOKENS.price
    empty = msgspec.structs.replace(world, catalogue=Catalogue(()))
    assert PLAIN.price_min(empty, "acct", None) == 0


# -- money -------------------------------------------------------------------------------------------------------------


async def test_searches_are_paid_and_tokens_stay_visible() -> None:
    """A hundred documents are one search, one more is two; the hold is what is charged."""
    for documents, searches in ((1, 1), (100, 1), (101, 2), (1_000, 10)):
        world = ranking_world()
        reply = await ask(world, body(["ab"] * documents, model=BY_SEARCHES))
        tokens, cost = documents * (5 + SPECIALS), searches * 2_000
        assert counts(reply) == {"tokens": tokens, "searches": searches, "truncated": 0}
        assert world.ledger.log == [("hold", cost), ("capture", cost)]
        (charge,) = world.ledger.charges
        assert (charge.tokens, charge.price, charge.cost_nanousd) == (tokens, None, cost)
        assert charge.meters == (
            Metered(Meter.SEARCHES, searches, 2_000 * 1_000_000),
            Metered(Meter.INPUT, tokens, 0),
        )


@settings(max_examples=40, deadline=None)
@given(
    query=st.integers(1, 30),
    documents=st.lists(st.integers(0, 30), min_size=1, max_size=120),
    keep=st.none() | st.integers(1, 30),
    price=st.integers(0, 10**10),
    by_searches=st.booleans(),
)
async def test_what_is_held_covers_the_charge_and_the_charge_is_the_formula(
    query: int, documents: list[int], keep: int | None, price: int, by_searches: bool
) -> None:
    model = msgspec.structs.replace(BY_TOKENS, price=0 if by_searches else price, search_price=None)
    if by_searches:
        model = msgspec.structs.replace(model, search_price=price)
    world = ranking_world()
    world = msgspec.structs.replace(world, catalogue=Catalogue((model,)))
    reply = await ask(world, body(["d" * each for each in documents], "q" * query, model, keep=keep))
    (held, hold), (captured, cost) = world.ledger.log
    assert (held, captured) == ("hold", "capture")
    tokens = counts(reply)["tokens"]
    assert tokens == sum(len(pair) + 2 for _, pairs in world.client.asked for pair in pairs)
    assert hold == cost == (price * -(-len(documents) // 100) if by_searches else cost_nanousd(tokens, price))


async def test_a_node_that_asks_for_money_gets_it_for_tokens_and_never_more_than_the_cost() -> None:
    world = ranking_world()
    world.node("n0").asks[BY_SEARCHES.id] = 10**12
    await ask(world, body(DOCUMENTS, model=BY_SEARCHES))
    (charge,) = world.ledger.charges
    assert sum(each.nanousd for each in charge.payables) == charge.cost_nanousd == 2_000


async def test_a_reply_that_is_broken_off_is_paid_and_one_that_does_not_begin_is_not() -> None:
    world = ranking_world()
    await ask(world, body(DOCUMENTS), how=BROKEN_OFF)
    assert world.ledger.log == [("hold", COST), ("capture", COST)]
    with pytest.raises(ConnectionResetError):
        await ask(world, body(DOCUMENTS, query="abd"), how=None)
    assert world.ledger.log[2:] == [("hold", COST), ("release", COST)]


# -- the same again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [BY_TOKENS, BY_SEARCHES])
async def test_a_key_gives_the_same_reply_and_no_second_charge(model: Model) -> None:
    world = ranking_world()
    sent = body([*DOCUMENTS, "e" * 30], model=model, top_n=4)
    first, second = await ask(world, sent, key="k"), await ask(world, sent, key="k")
    assert second.body == first.body and counts(first)["truncated"] == 1
    assert "idempotent-replayed" not in first.headers and second.headers["idempotent-replayed"] == "true"
    assert second.headers["x-embedmesh-cost-nanousd"] == first.headers["x-embedmesh-cost-nanousd"]
    assert len(world.client.asked) == len(charges(world)) == 1
    with pytest.raises(Failure) as refused:
        await ask(world, body(DOCUMENTS, model=model, top_n=3), key="k")
    assert refused.value.code == "idempotency_conflict"


async def test_an_sdks_retry_joins_the_first_try_or_gets_what_was_paid_and_not_read() -> None:
    world = ranking_world()
    first, again = await asyncio.gather(ask(world, body(DOCUMENTS), retries=0), ask(world, body(DOCUMENTS), retries=1))
    assert first.body == again.body
    assert len(world.client.asked) == len(charges(world)) == 1
    lost = await ask(world, body(DOCUMENTS, query="xyz"), retries=0, how=BROKEN_OFF)
    found = await ask(world, body(DOCUMENTS, query="xyz"), retries=1)
    assert found.body == lost.body and found.headers["idempotent-replayed"] == "true"
    assert len(world.client.asked) == len(charges(world)) == 2


# -- remembered scores -------------------------------------------------------------------------------------------------


def remembering(policy: CachePolicy) -> ScriptedWorld:
    class Keys:
        async def find(self, token: str) -> Caller | None:
            return Caller("a", "key_a", frozenset({"embeddings"}), cache=policy)

    return msgspec.structs.replace(ranking_world(), keys=Keys())


MONEY = [
    # model, policy, what 150 documents cost, 150 more with 50 of these, the last again, by their pairs
    (BY_TOKENS, CachePolicy.CHARGED, (150, 150, 150)),
    (BY_TOKENS, CachePolicy.FREE, (150, 100, None)),
    (BY_SEARCHES, CachePolicy.CHARGED, (2, 2, 2)),
    (BY_SEARCHES, CachePolicy.FREE, (2, 1, None)),
]


@pytest.mark.parametrize(("model", "policy", "quantities"), MONEY)
async def test_what_is_remembered_is_told_the_same_and_paid_as_was_agreed(
    model: Model, policy: CachePolicy, quantities: tuple[int, int, int | None]
) -> None:
    """A pair is found by both of its texts; of searches those are paid that the other documents would be."""
    world = remembering(policy)
    documents = [f"{chr(97 + number // 20)}{chr(97 + number % 20)}" for number in range(250)]
    first = await ask(world, body(documents[:150], model=model))
    overlap = await ask(world, body(documents[100:], model=model))
    again = await ask(world, body(documents[100:], model=model))
    assert [reply.headers["x-embedmesh-cached"] for reply in (first, overlap, again)] == ["0", "50", "150"]
    assert again.body == overlap.body
    assert sum(len(pairs) for _, pairs in world.client.asked) == 150 + 100
    pair_tokens = 5 + SPECIALS
    unit = 2_000 if model is BY_SEARCHES else pair_tokens * 1.5
    paid = [quantity for quantity in quantities if quantity is not None]
    assert charges(world) == [math.ceil(quantity * unit) for quantity in paid]
    assert counts(overlap)["tokens"] == 150 * pair_tokens
    assert counts(overlap)["searches"] == (2 if model is BY_SEARCHES else None), "by list, whatever is free of it"
    other = await ask(world, body(documents[:1], query="xyz", model=model))
    assert other.headers["x-embedmesh-cached"] == "0", "another query is another pair"
    kept = remembering(policy)
    await ask(kept, body(documents[:1], model=model), how=BROKEN_OFF)
    assert kept.cache.has("a"), "paid is remembered, though it was not read"


async def test_no_node_is_locked_for_a_reranker() -> None:
    """Or a sealed request could only be refused."""
    caller = Caller("acct", "key_1", frozenset({"embeddings"}))
    nobody: Any = None
    with pytest.raises(Failure) as refused:
        await lock_node(ranking_world(), nobody, nobody, caller, BY_TOKENS.id, 10, 5, SDK_SCHEME)
    assert (refused.value.code, refused.value.param) == ("unsupported_modality", "model")
