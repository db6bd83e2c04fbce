"""Rerank calls: the order of documents, what is sent in parts, and what a bad reply becomes. Both clients."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from embedmesh.client import (
    AsyncClient,
    CallNotAnswered,
    CallRefused,
    Client,
    InputRefused,
    NotScores,
    Reranked,
    WrongCall,
)
from tests.client.gateway import KEY, Members, Raw, Received, ScriptedGateway, envelope, score_of

DOCUMENTS = [f"document {number}" for number in range(7)]
Rerank = Callable[..., Reranked]


@pytest.fixture(params=["sync", "async"])
def rerank(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> Rerank:
    def blocking(query: str, documents: Any, **options: Any) -> Reranked:
        with Client(base_url=gateway.base_url, api_key=KEY) as client:
            return client.rerank(query, documents, model="m", **options)

    async def waiting(query: str, documents: Any, **options: Any) -> Reranked:
        async with AsyncClient(base_url=gateway.base_url, api_key=KEY) as client:
            return await client.rerank(query, documents, model="m", **options)

    return blocking if request.param == "sync" else lambda *given, **more: asyncio.run(waiting(*given, **more))


def best_first(query: str, documents: list[str]) -> list[tuple[int, float]]:
    scores = [score_of(query, document) for document in documents]
    return [(at, scores[at]) for at in sorted(range(len(scores)), key=lambda at: -scores[at])]


def found(reranked: Reranked) -> list[tuple[int, float]]:
    return [(each.index, each.score) for each in reranked.results]


def test_documents_come_best_first_with_what_they_cost(gateway: ScriptedGateway, rerank: Rerank) -> None:
    def answer(received: Received) -> Any:
        headers = {"x-embedmesh-cost-nanousd": "70", "x-embedmesh-truncated": "2"}
        return 200, rank_with(received, billed_units={"search_units": 1}), headers

    gateway.script = answer
    told = rerank("q", tuple(DOCUMENTS), raw_scores=True, truncate="end", extra_body={"priority": 0, "user": None})
    assert found(told) == best_first("q", DOCUMENTS)
    assert (told.model, told.tokens, told.searches, told.cost_nanousd, told.truncated) == ("m", 35, 1, 70, 2)
    assert told.request_ids == ["req_1"]
    assert gateway.received[0].body == {
        "model": "m",
        "query": "q",
        "documents": DOCUMENTS,
        "top_n": 7,
        "raw_scores": True,
        "truncate": "end",
        "priority": 0,
    }


def rank_with(received: Received, **meta: Any) -> Members:
    from tests.client.gateway import rank

    return rank(received.body) | {"meta": meta}


@pytest.mark.parametrize("top_n", [1, 3, 7, 50])
def test_several_requests_are_one_order(gateway: ScriptedGateway, rerank: Rerank, top_n: int) -> None:
    """The best of each request are enough; a number larger than there are documents means all."""
    done: list[int] = []
    told = rerank("q", iter(DOCUMENTS), batch_size=3, top_n=top_n, progress=done.append)
    assert found(told) == best_first("q", DOCUMENTS)[:top_n]
    assert [received.body["documents"] for received in gateway.received] == [
        DOCUMENTS[:3],
        DOCUMENTS[3:6],
        DOCUMENTS[6:],
    ]
    assert [received.body["top_n"] for received in gateway.received] == [min(top_n, 3), min(top_n, 3), 1]
    assert (done, told.tokens, told.searches, told.cost_nanousd) == ([3, 6, 7], 35, None, None)


def test_of_equal_scores_the_server_s_order_stays(gateway: ScriptedGateway, rerank: Rerank) -> None:
    """Its order is that of logits, many of which are told as 1. Over several requests the earlier one comes first."""
    logits = {"document 0": 20.0, "document 1": 25.0, "document 2": 3.0, "document 3": 30.0, "document 4": 31.0}

    def answer(received: Received) -> Any:
        numbers = [logits[document] for document in received.body["documents"]]
        order = sorted(range(len(numbers)), key=lambda at: -numbers[at])[: received.body["top_n"]]
        told = [{"index": at, "relevance_score": 1.0 if numbers[at] > 17 else 0.95} for at in order]
        return 200, {"model": "m", "results": told}

    gateway.script = answer
    assert found(rerank("q", DOCUMENTS[:3])) == [(1, 1.0), (0, 1.0), (2, 0.95)]
    assert [at for at, _ in found(rerank("q", DOCUMENTS[:5], batch_size=3))] == [1, 0, 4, 3, 2]
    assert [at for at, _ in found(rerank("q", DOCUMENTS[:5], batch_size=3, top_n=3))] == [1, 0, 4]


def test_requests_are_cut_at_whole_searches_and_at_the_size_of_a_body(gateway: ScriptedGateway, rerank: Rerank) -> None:
    many = [f"{number}" for number in range(4_100)]
    assert found(rerank("q", many)) == best_first("q", many)
    large = [f"{number}" + "x" * 9_000 for number in range(900)]
    assert found(rerank("q", large, top_n=5)) == best_first("q", large)[:5]
    sizes = [len(received.body["documents"]) for received in gateway.received]
    assert sizes == [2_000, 2_000, 100, 400, 400, 100]
    assert max(len(received.raw) for received in gateway.received) <= 4 * 1024 * 1024


def test_a_long_query_counts_once_a_document(gateway: ScriptedGateway, rerank: Rerank) -> None:
    """The query counts with each document, so that fewer documents fit into a request."""
    rerank("long " * 2_000, ["short"] * 500)
    assert [len(received.body["documents"]) for received in gateway.received] == [400, 100]


def test_a_key_of_its_own_for_each_request_outlives_tries(gateway: ScriptedGateway, rerank: Rerank) -> None:
    answers: list[Any] = [Raw(b""), None, None]
    gateway.script = lambda received: answers.pop(0)
    rerank("q", DOCUMENTS, batch_size=4, idempotent=True)
    keys = [received.headers["idempotency-key"] for received in gateway.received]
    assert keys[0] == keys[1] != keys[2]
    assert [received.body["documents"] for received in gateway.received][1:] == [DOCUMENTS[:4], DOCUMENTS[4:]]


def test_a_request_with_too_many_tokens_is_sent_in_halves(gateway: ScriptedGateway, rerank: Rerank) -> None:
    def script(received: Received) -> Any:
        many = len(received.body["documents"]) > 2
        return (400, envelope("max_tokens_per_request", param="documents")) if many else None

    gateway.script = script
    assert found(rerank("q", DOCUMENTS)) == best_first("q", DOCUMENTS)
    assert [len(received.body["documents"]) for received in gateway.received] == [7, 3, 1, 2, 4, 2, 2]
    gateway.script = lambda received: (400, envelope("max_tokens_per_request"))
    with pytest.raises(CallRefused, match="max_tokens_per_request"):
        rerank("q", DOCUMENTS)


def test_halves_cost_no_more_searches_than_the_whole(gateway: ScriptedGateway, rerank: Rerank) -> None:
    """A gateway refuses what is beyond a bound of tokens; a search has up to 100 documents."""

    def script(received: Received) -> Any:
        documents = len(received.body["documents"])
        if documents > 120:
            return 400, envelope("max_tokens_per_request", param="documents")
        return 200, rank_with(received, billed_units={"search_units": -(-documents // 100)})

    gateway.script = script
    for documents, searches in ((150, 2), (199, 2), (201, 3), (250, 3), (500, 5), (1_999, 20)):
        texts = [f"{number}" for number in range(documents)]
        told = rerank("q", texts)
        assert (told.searches, found(told)) == (searches, best_first("q", texts))


def test_a_document_that_is_refused_is_named_by_its_place_among_all(gateway: ScriptedGateway, rerank: Rerank) -> None:
    gateway.script = lambda received: (
        (400, envelope("context_length_exceeded", param="documents.1"))
        if "document 4" in received.body["documents"]
        else None
    )
    with pytest.raises(InputRefused) as caught:
        rerank("q", DOCUMENTS, batch_size=3)
    assert (caught.value.index, caught.value.code) == (4, "context_length_exceeded")


def test_load_and_a_broken_connection_are_tried_again_as_for_embeddings(
    gateway: ScriptedGateway, rerank: Rerank
) -> None:
    answers: list[Any] = [(503, envelope("overloaded"), {"retry-after-ms": "1"}), Raw(b"")]
    gateway.script = lambda received: answers.pop(0) if answers else None
    assert found(rerank("q", DOCUMENTS)) == best_first("q", DOCUMENTS)
    assert len({received.raw for received in gateway.received}) == 1
    assert len(gateway.received) == 3
    gateway.script = lambda received: (401, envelope("invalid_api_key"))
    with pytest.raises(CallRefused, match="invalid_api_key"):
        rerank("q", DOCUMENTS)
    assert len(gateway.received) == 4


WRONG: dict[str, tuple[Callable[[Members], object], str]] = {
    "one too few": (lambda reply: reply["results"].pop(), "count"),
    "one twice": (lambda reply: reply["results"][0].update(index=reply["results"][1]["index"]), "index"),
    "one that was not sent": (lambda reply: reply["results"][0].update(index=7), "index"),
    "one before the first": (lambda reply: reply["results"][0].update(index=-1), "index"),
    "no number": (lambda reply: reply["results"][0].update(relevance_score=None), "form"),
    "infinity": (lambda reply: reply["results"][0].update(relevance_score=float("inf")), "form"),
    "no results": (lambda reply: reply.update(results=None), "form"),
    "an embeddings reply": (lambda reply: reply.pop("results"), "form"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_reply_is_never_returned(gateway: ScriptedGateway, rerank: Rerank, wrong: str) -> None:
    change, reason = WRONG[wrong]

    def on_reply(reply: Members) -> None:
        change(reply)

    gateway.on_reply = on_reply
    with pytest.raises(NotScores, match=rf"\({reason}\)"):
        rerank("q", DOCUMENTS)


@pytest.mark.parametrize(
    ("query", "documents", "options", "says"),
    [
        ("", ["a"], {}, "query"),
        ("q", [], {}, "must not be empty"),
        ("q", "abc", {}, r"\[text\] for one"),
        ("q", ["a", 1], {}, "must be texts"),
        ("q", ["\ud800"], {}, "surrogate"),
        ("q", ["a"], {"top_n": 0}, "top_n"),
        ("q", ["a"], {"batch_size": 0}, "batch_size"),
        ("q", ["a"], {"topn": 1}, "no option topn"),
        ("q", ["a", "x" * 4_200_000], {}, "Document 1 does not fit"),
        ("q", ["a"], {"extra_body": {"x": 1j}}, "not JSON"),
    ],
    ids=str,
)
def test_what_cannot_be_sent_is_refused_here(
    gateway: ScriptedGateway, rerank: Rerank, query: str, documents: Any, options: Any, says: str
) -> None:
    with pytest.raises(WrongCall, match=says):
        rerank(query, documents, **options)
    assert gateway.received == []


def test_a_confidential_client_does_not_rank_in_the_clear(gateway: ScriptedGateway, pins: Any) -> None:
    with (
        Client(base_url=gateway.base_url, api_key=KEY, confidential=True, pins=pins) as client,
        pytest.raises(WrongCall, match="Nothing was sent"),
    ):
        client.rerank("q", ["a"], model="m")
    assert gateway.received == []


def test_a_connection_that_breaks_twice_is_told(gateway: ScriptedGateway, rerank: Rerank) -> None:
    gateway.script = lambda received: Raw(b"")
    with pytest.raises(CallNotAnswered):
        rerank("q", ["a"], timeout=30.0)
    assert len(gateway.received) == 2
