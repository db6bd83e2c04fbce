"""Rerank over a scripted world, by real HTTP: right scores in each API's words, one charge, its own failures."""

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from schemathesis import GenerationMode

from embedmesh import __version__
from embedmesh.catalogue import Catalogue
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.openapi import document
from embedmesh.gateway.api.rerank_api import RERANK_PATH, RERANK_V2_PATH, TEI_RERANK_BY_PATH, TEI_RERANK_PATH
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.models import Model
from embedmesh.rules.reranking import SEARCH_DOCUMENTS
from tests.data import quick_or
from tests.flow.reranking import BY_SEARCHES, BY_TOKENS, FOREIGN, SPECIALS, ranking_world
from tests.flow.sealed import DictLocks, SealedNode
from tests.flow.world import GOOD_KEY, MODEL, POOR_KEY, SCOPELESS_KEY, LetterTokenizer, ScriptedWorld
from tests.gateway.test_openapi import METRICS_KEY, KeyRingWithMetrics
from tests.http.raw import Raw, request, send, serving

Json = dict[str, Any]
API = document(__version__)
TOKENS = 3 * (3 + SPECIALS) + 3  # of the query, thrice, and of the documents
LOGITS = [sum(ord(letter) % 31 for letter in text) - 8.0 for text in ("ab", "t", "")]
SIGMOID = [float(str(np.float32(1 / (1 + math.exp(-logit))))) for logit in LOGITS]  # the shortest decimals
DOCUMENTS = ["ab", "t", ""]
PATHS = (RERANK_PATH, RERANK_V2_PATH, TEI_RERANK_PATH, TEI_RERANK_BY_PATH)
EXAMPLES = quick_or(200, quick=25)  # for each path and mode; a second each


@asynccontextmanager
async def gateway_of(*models: Model) -> AsyncIterator[tuple[int, ScriptedWorld]]:
    """A gateway with these models alone, all served by one node whose logits are a rule."""
    world = ranking_world()
    tokenizers = {model.id: LetterTokenizer() for model in models if not model.foreign}
    keys = KeyRingWithMetrics(world.keys)
    world = msgspec.structs.replace(world, catalogue=Catalogue(models), tokenizers=tokenizers, keys=keys)
    app = GatewayApp(
        world,
        world.fleet.registry,
        in_flight_max=100,
        bodies=BodyBudget(10**8),
        gauges=dict,
        confidential=(DictLocks(world), SealedNode(world)),
    )
    async with serving(app.server) as port:
        yield port, world
    assert app.metrics.internal_errors._value.get() == 0


def post(path: str, body: Json, key: str | None = GOOD_KEY, **headers: str) -> bytes:
    return request("POST", path, json.dumps(body).encode(), key=key, **headers)


def asked(path: str, model: Model | None = None, **more: Any) -> bytes:
    """A right request in the words of the path."""
    if path.startswith("/tei"):
        return post(path.replace("{id}", model.id if model else "x"), {"query": "abc", "texts": DOCUMENTS} | more)
    return post(path, {"query": "abc", "documents": DOCUMENTS} | ({"model": model.id} if model else {}) | more)


def scores(reply: Raw) -> list[tuple[int, float]]:
    assert reply.status == 200, reply.body
    told = json.loads(reply.body)
    results = told if isinstance(told, list) else told.get("results") or told["data"]
    return [(each["index"], each.get("score", each.get("relevance_score"))) for each in results]


@pytest.mark.parametrize("path", PATHS)
async def test_scores_come_best_first_are_charged_once_and_are_as_documented(path: str) -> None:
    async with gateway_of(MODEL, BY_TOKENS, BY_SEARCHES) as (port, world):
        reply = await send(port, asked(path, BY_TOKENS))
        assert scores(reply) == [(1, SIGMOID[1]), (0, SIGMOID[0]), (2, SIGMOID[2])]
        cost = math.ceil(TOKENS * BY_TOKENS.price / 10**6)
        assert world.ledger.log == [("hold", cost), ("capture", cost)]
        headers = ("cost-nanousd", "node", "truncated")
        assert [reply.headers[f"x-embedmesh-{name}"] for name in headers] == [str(cost), "n0", "0"]
        answer = API["paths"][path]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        whole = {"allOf": [answer], "components": API["components"]}
        assert [error.message for error in Draft202012Validator(whole).iter_errors(json.loads(reply.body))] == []
        page = (await send(port, request("GET", "/metrics", key=METRICS_KEY))).body.decode()
        assert f'embedmesh_requests_total{{code="ok",model="{BY_TOKENS.id}",route="{path}"}} 1.0' in page
        raw = await send(port, asked(path, BY_TOKENS, raw_scores=True))
        assert scores(raw) == [(1, LOGITS[1]), (0, LOGITS[0]), (2, LOGITS[2])]


async def test_a_model_whose_own_scores_are_raw_and_that_is_paid_by_searches() -> None:
    async with gateway_of(BY_TOKENS, BY_SEARCHES) as (port, world):
        reply = await send(port, asked(RERANK_V2_PATH, BY_SEARCHES, top_n=1, return_documents=True))
        assert scores(reply) == [(1, LOGITS[1])]
        told = json.loads(reply.body)
        assert told["results"][0]["document"] == {"text": "t"}
        assert told["meta"] == {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}
        assert told["usage"] == {"prompt_tokens": TOKENS, "total_tokens": TOKENS}
        more = {"documents": [""] * (SEARCH_DOCUMENTS + 1), "query": "a", "model": BY_SEARCHES.id}
        assert json.loads((await send(port, post(RERANK_PATH, more))).body)["meta"]["billed_units"] == {
            "search_units": 2
        }
        assert [nanousd for what, nanousd in world.ledger.log if what == "capture"] == [2_000, 4_000]
        assert scores(await send(port, asked(TEI_RERANK_BY_PATH, BY_SEARCHES)))[0] == (1, SIGMOID[1])


async def test_voyages_clients_read_results_as_data_and_documents_as_texts() -> None:
    async with gateway_of(BY_TOKENS) as (port, _):
        body = {"query": "abc", "documents": DOCUMENTS, "top_k": 1, "truncation": True, "return_documents": True}
        told = json.loads((await send(port, post(RERANK_PATH, body))).body)
        assert told["data"] == [{"index": 1, "relevance_score": SIGMOID[1], "document": "t"}]
        assert "results" not in told


async def test_a_request_that_names_no_model_has_the_only_one_that_reranks() -> None:
    async with gateway_of(MODEL, BY_TOKENS) as (port, _):
        for path in (RERANK_PATH, RERANK_V2_PATH, TEI_RERANK_PATH):
            assert len(scores(await send(port, asked(path)))) == 3
        assert len(scores(await send(port, post(TEI_RERANK_PATH, {"query": "abc", "texts": DOCUMENTS})))) == 3
        info = json.loads((await send(port, request("GET", "/tei/acme/reranker/info"))).body)
        assert "reranker" in info["model_type"] and info["max_input_length"] == BY_TOKENS.max_tokens
        assert "embedding" in json.loads((await send(port, request("GET", "/info"))).body)["model_type"]
        tags = json.loads((await send(port, request("GET", "/api/tags"))).body)["models"]
        assert [each["name"] for each in tags] == [MODEL.id], "a reranker is no embedding model"
    async with gateway_of(BY_TOKENS) as (port, _):
        assert "reranker" in json.loads((await send(port, request("GET", "/info"))).body)["model_type"]
    async with gateway_of(BY_TOKENS, BY_SEARCHES) as (port, world):
        for path in (RERANK_PATH, TEI_RERANK_PATH):
            reply = await send(port, asked(path))
            assert (reply.status, reply.error["code"]) == (400, "missing_parameter")
        assert world.ledger.log == []


async def test_models_say_what_their_scores_and_their_price_are() -> None:
    async with gateway_of(MODEL, BY_TOKENS, BY_SEARCHES) as (port, _):
        told = json.loads((await send(port, request("GET", "/v1/models"))).body)["data"]
        names = ("modalities", "scores", "search_price_nanousd", "width")
        assert [[each[name] for name in names] for each in told] == [
            [["embeddings"], None, None, 4],
            [["rerank"], "sigmoid", None, 0],
            [["rerank"], "raw", 2_000, 0],
        ]


EMBEDDERS_PATHS: list[tuple[str, Json]] = [
    ("/v1/embeddings", {"model": BY_TOKENS.id, "input": "a"}),
    ("/openai/deployments/acme/reranker/embeddings", {"input": "a"}),
    ("/api/embed", {"model": BY_TOKENS.id, "input": "a"}),
    ("/api/embeddings", {"model": BY_TOKENS.id, "prompt": "a"}),
    ("/v1/embed", {"model": BY_TOKENS.id, "texts": ["a"]}),
    ("/v2/embed", {"model": BY_TOKENS.id, "texts": ["a"]}),
    ("/tei/acme/reranker/embed", {"inputs": "a"}),
    ("/v1beta/models/acme/reranker:embedContent", {"content": {"parts": [{"text": "a"}]}}),
    ("/v1/nodes/lock", {"model": BY_TOKENS.id}),
]


async def test_each_kind_of_model_is_refused_on_the_other_kinds_paths_and_told_the_right_one() -> None:
    async with gateway_of(MODEL, BY_TOKENS) as (port, world):
        for path, body in EMBEDDERS_PATHS:
            reply = await send(port, post(path, body))
            assert reply.status == 400 and b"POST /v1/rerank" in reply.body, path
        for path in (RERANK_PATH, RERANK_V2_PATH, TEI_RERANK_PATH, TEI_RERANK_BY_PATH):
            reply = await send(port, asked(path, MODEL))
            assert reply.status == 400 and b"POST /v1/embeddings" in reply.body, path
        assert world.ledger.log == [] and world.client.asked == []


async def test_a_query_and_documents_there_must_be_and_not_too_many() -> None:
    """In the same words for every form, with its own names of them; so is what cannot be read for its size."""
    few, many = " must not be empty.", " has too many entries; one request takes at most 2,048."
    async with gateway_of(BY_TOKENS) as (port, world):
        for path, given in ((RERANK_PATH, "documents"), (RERANK_V2_PATH, "documents"), (TEI_RERANK_BY_PATH, "texts")):
            for more, says in (
                ({"query": ""}, f"`query`{few}"),
                ({given: []}, f"`{given}`{few}"),
                ({given: ["a"] * 2_049}, f"`{given}`{many}"),
                ({given: ["a" * 20] * 9_000}, f"`{given}`{many}"),
            ):
                reply = await send(port, asked(path, BY_TOKENS, **more))
                told = json.loads(reply.body)
                assert (reply.status, told.get("message", told["error"])) == (400, says)
        assert (await send(port, asked(RERANK_PATH, BY_TOKENS, documents=["a"] * 2_048))).status == 200
        assert len(world.ledger.log) == 2, "one hold, one charge"


async def test_pairs_that_are_too_long_are_cut_or_refused() -> None:
    """At most 20 tokens: four special ones, and the longer text is cut first."""
    long = {"documents": ["a" * 50, "b"], "texts": ["a" * 50, "b"]}
    room = BY_TOKENS.max_tokens - SPECIALS
    async with gateway_of(BY_TOKENS) as (port, world):

        async def ask(path: str, **more: Any) -> Raw:
            given = "texts" if path == TEI_RERANK_BY_PATH else "documents"
            return await send(port, asked(path, BY_TOKENS, **{given: long[given]} | more))

        cut = await ask(RERANK_PATH)
        assert (cut.status, cut.headers["x-embedmesh-truncated"]) == (200, "1")
        assert len(world.client.asked[-1][1][0]) == room + len(LetterTokenizer.between)
        assert (await ask(TEI_RERANK_BY_PATH, truncate=True)).headers["x-embedmesh-truncated"] == "1"
        short = await ask(RERANK_V2_PATH, max_tokens_per_doc=2, truncate="none")
        assert (short.status, short.headers["x-embedmesh-truncated"]) == (200, "1")
        for more in ({"truncate": "none"}, {"truncate": False}, {"truncation": False}):
            told = (await ask(RERANK_PATH, **more)).error
            assert (told["code"], told["param"]) == ("context_length_exceeded", "documents.0")
        refused = await ask(TEI_RERANK_BY_PATH)
        assert refused.status == 400 and json.loads(refused.body)["error_type"] == "Validation"
        assert "documents" not in refused.body.decode()


async def test_documents_for_a_foreign_model_are_not_cut() -> None:
    async with gateway_of(FOREIGN) as (port, _):
        reply = await send(port, asked(RERANK_PATH, FOREIGN, max_tokens_per_doc=2))
        assert (reply.status, reply.error["param"]) == (400, "max_tokens_per_doc")


@pytest.mark.parametrize("path", PATHS)
async def test_failures_have_the_envelope_of_the_path_and_cost_nothing(path: str) -> None:
    real = path.replace("{id}", BY_TOKENS.id)
    tei = path == TEI_RERANK_BY_PATH
    body = {"query": "abc", **({"texts": ["a"]} if tei else {"documents": ["a"], "model": BY_TOKENS.id})}
    async with gateway_of(BY_TOKENS) as (port, world):
        for raw, status in (
            (post(real, body, None), 401),
            (post(real, body, SCOPELESS_KEY), 403),
            (post(real, body | {"zzz": 1}), 400),
            (post(real, body | {"query": ""}), 400),
            (request("POST", real, b'{"a'), 400),
            (request("POST", real, b"{}", content_type="text/plain"), 415),
            (post(real, body, POOR_KEY), 429),
            (request("POST", real, b" " * (4 * 1024 * 1024 + 1)), 413),
        ):
            reply = await send(port, raw)
            assert reply.status == status, reply.body
            told = json.loads(reply.body)
            if tei:
                assert told.keys() == {"error", "error_type"} and isinstance(told["error"], str)
            else:
                assert told.keys() == {"error", "message", "detail"}
                assert told["error"]["message"] == told["message"] == told["detail"]
                assert told["error"].keys() == {"message", "type", "param", "code"}
        assert world.ledger.log == [] and world.client.asked == []


async def test_the_same_key_gives_the_same_bytes_and_one_path_is_not_another() -> None:
    async with gateway_of(BY_TOKENS) as (port, world):
        body = {"query": "abc", "documents": DOCUMENTS, "return_documents": True}
        first, again = [await send(port, post(RERANK_PATH, body, Idempotency_Key="k")) for _ in range(2)]
        assert (first.status, first.body) == (200, again.body)
        assert again.headers["idempotent-replayed"] == "true"
        assert [what for what, _ in world.ledger.log] == ["hold", "capture"]
        assert (await send(port, post(RERANK_V2_PATH, body, Idempotency_Key="k"))).status == 409


async def test_most_documents_at_once() -> None:
    """2,048 documents as objects, told with their texts; a body far above what is parsed on the event loop."""
    documents = [{"text": "ab" * (number % 3)} for number in range(2_048)]
    async with gateway_of(BY_TOKENS) as (port, _):
        body = {"query": "abc", "documents": documents, "return_documents": True}
        reply = await send(port, post(RERANK_PATH, body), timeout_s=30)
        told = scores(reply)
        assert [index for index, _ in told] == sorted(range(2_048), key=lambda number: (-(number % 3), number))
        body["documents"] = [*documents, {"text": ""}]
        reply = await send(port, post(RERANK_PATH, body), timeout_s=30)
        assert (reply.status, reply.error["param"]) == (400, "documents")


# -- whatever is sent --------------------------------------------------------------------------------------------------


def small(api: Json) -> Json:
    """The document, whose requests are for the model that is there and have room in it."""
    api = json.loads(json.dumps(api))
    for name in ("RerankRequest", "TeiRerank"):
        members = api["components"]["schemas"][name]["properties"]
        members["query"]["maxLength"] = 2
        for texts in ("documents", "texts"):
            if texts in members:
                members[texts]["maxItems"] = 8
    api["components"]["schemas"]["RerankRequest"]["properties"]["model"] = {"enum": [BY_TOKENS.id, None]}
    return api


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize("path", PATHS)
async def test_whatever_is_sent_is_answered_as_documented(path: str, mode: GenerationMode) -> None:
    """No 5xx; what is refused costs nothing, and is told in the path's own envelope. What the schema allows is done."""
    operation = schemathesis.openapi.from_dict(small(API))[path]["POST"]
    bodies: list[Any] = []

    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=[*HealthCheck]
    )
    @given(data=st.data())
    def draw(data: st.DataObject) -> None:
        bodies.append(data.draw(operation.as_strategy(generation_mode=mode)).body)

    draw()
    statuses: list[int] = []
    async with gateway_of(MODEL, BY_TOKENS) as (port, world):
        for body in bodies:
            sent = body if isinstance(body, bytes) else json.dumps(body).encode()
            before = list(world.ledger.log)
            reply = await send(port, request("POST", path.replace("{id}", BY_TOKENS.id), sent))
            statuses.append(reply.status)
            answers = API["paths"][path]["post"]["responses"]
            schema = answers[str(reply.status)]["content"]["application/json"]["schema"]
            whole = {"allOf": [schema], "components": API["components"]}
            assert [error.message for error in Draft202012Validator(whole).iter_errors(json.loads(reply.body))] == []
            made = [what for what, _ in world.ledger.log[len(before) :]]
            if reply.status == 200:
                assert made == ["hold", "capture"]
            else:
                unknown = reply.status == 404 and body["model"] != BY_TOKENS.id
                assert (reply.status == 400 or unknown) and made == [], (body, reply.body)
                told = json.loads(reply.body)
                assert "error_type" in told or told["message"] == told["error"]["message"]
    if mode is GenerationMode.POSITIVE:
        assert statuses.count(200) > len(statuses) / 5
