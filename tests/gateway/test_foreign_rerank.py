"""Scores of servers of other makes, over a real socket: each make's form gives the same logits; what is ambiguous is
refused by the check that it fails."""

import json
import math
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.examiner import FAR_TEXT, PROBE_QUERY, PROBE_TEXT
from embedmesh.flow.verify import verify
from embedmesh.gateway.nodes.foreign import UpstreamLink
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, UpstreamRefused, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.server import parse_url
from tests.gateway.test_foreign import STATUSES, Asked, Reply, ok, server
from tests.gateway.test_upstream_replies import http, saying

SIGMOID = Model(
    id="acme/judge", folder="/nowhere", width=1, max_tokens=64, price=1, digest="3" * 64, modalities=("rerank",)
)
RAW = Model(id="acme/raw", width=1, max_tokens=64, price=1, modalities=("rerank",), scores="raw")
CATALOGUE = Catalogue((SIGMOID, RAW))
QUERY = "which animal?"
DOCUMENTS = ["a fox", "tax law", 'a "dog"\n\U0001f600']
LIMIT_S = 10.0

Ask = Callable[[str, dict[str, Any]], Reply]


def logit(query: str, text: str) -> float:
    """Between -8 and 8, and no two alike."""
    return sum(map(ord, query + text)) * 7 % 160 / 10 - 8 + len(text) / 1_000


def sigmoid(logit: float) -> float:
    return 1.0 / (1.0 + math.exp(-logit))


def counted(documents: list[str] = DOCUMENTS, exact: bool = True) -> Counted:
    return Counted([10] * len(documents), texts=documents, exact=exact, query=QUERY)


def part_of(*rows: int) -> Part:
    return Part("up", rows, 10 * len(rows), 0.1)


def link(port: int, model: Model, path: str = "") -> UpstreamLink:
    offer = Offer(model.id, 1, model.max_tokens, model.digest, model.tier, name="theirs")
    return UpstreamLink(parse_url(f"http://127.0.0.1:{port}{path}"), (offer,), CATALOGUE, "sesame")


def logits(reply: EmbedVectors) -> list[float]:
    return [float(each) for each in np.frombuffer(reply.data, "<f4")]


# -- makes -------------------------------------------------------------------------------------------------------------


def refuses(status: int, words: str) -> Reply:
    return status, json.dumps({"error": {"message": words, "code": status}}).encode()


def ranked(body: dict[str, Any], name: str, tell: Callable[[float], float], **more: Any) -> list[dict[str, Any]]:
    """The results, best first, as all of them have them."""
    texts = body.get("documents") or body["texts"]
    scores = [tell(logit(body["query"], text)) for text in texts]
    order = sorted(range(len(texts)), key=lambda at: -scores[at])
    return [{"index": at, name: scores[at]} | {key: make(texts[at]) for key, make in more.items()} for at in order]


def tei(path: str, body: dict[str, Any]) -> Reply:
    if path != "/rerank":
        return 404, b""
    if "texts" not in body:
        return 422, b"Failed to deserialize the JSON body into the target type: missing field `texts`"
    assert body["truncate"] is False
    return ok(ranked(body, "score", float if body.get("raw_scores") else sigmoid))


def vllm(path: str, body: dict[str, Any]) -> Reply:
    if path not in ("/rerank", "/v1/rerank", "/v2/rerank"):
        return 404, b'{"detail":"Not Found"}'
    if "documents" not in body:
        return refuses(400, "documents: Field required")
    tell = float if body.get("use_activation") is False else sigmoid
    results = ranked(body, "relevance_score", tell, document=lambda text: {"text": text, "multi_modal": None})
    return ok(
        {"id": "rerank-1", "model": "theirs", "usage": {"prompt_tokens": 9, "total_tokens": 9}, "results": results}
    )


def infinity(prefix: str, member: str = "results") -> Ask:
    def answer(path: str, body: dict[str, Any]) -> Reply:
        if path != f"{prefix}/rerank":
            return 404, b'{"detail":"Not Found"}'
        if "documents" not in body:
            return 422, b'{"detail":[{"type":"missing","loc":["body","documents"]}]}'
        results = ranked(
            body, "relevance_score", float if body.get("raw_scores") else sigmoid, document=lambda text: None
        )
        usage = {"prompt_tokens": 90, "total_tokens": 90}
        return ok({"object": "rerank", member: results, "model": "theirs", "usage": usage, "id": "1", "created": 1})

    return answer


def llama_cpp(path: str, body: dict[str, Any]) -> Reply:
    if path not in ("/rerank", "/reranking", "/v1/rerank", "/v1/reranking"):
        return refuses(404, "File Not Found")
    if "texts" in body:
        return ok(ranked(body, "score", float))
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    results = ranked(body, "relevance_score", float)
    return ok({"model": "theirs", "object": "list", "usage": usage, "results": results})


def strict(path: str, body: dict[str, Any]) -> Reply:
    """A provider that knows its own members only."""
    if path != "/v1/rerank":
        return 404, b"{}"
    if unknown := body.keys() - {"model", "query", "documents", "top_n", "return_documents"}:
        return refuses(400, f"unknown field {unknown}")
    meta = {"api_version": {"version": "1"}, "billed_units": {"search_units": 1}}
    return ok({"id": "1", "results": ranked(body, "relevance_score", sigmoid), "meta": meta})


def voyage(path: str, body: dict[str, Any]) -> Reply:
    status, reply = strict(path, body)
    found = json.loads(reply)
    return (status, reply) if "results" not in found else ok({"object": "list", "data": found["results"]})


MAKES: dict[str, tuple[Ask, str, int]] = {
    # how it answers, the path of its address, how many requests its first question takes
    "TEI": (tei, "", 2),
    "TEI behind a path": (lambda path, body: tei(path.removeprefix("/tei"), body), "/tei", 2),
    "vLLM": (vllm, "", 1),
    "vLLM, version 2": (vllm, "/v2", 1),
    "Infinity": (infinity(""), "", 3),
    "Infinity with a prefix": (infinity("/v1"), "", 1),
    "Infinity, earlier": (infinity("/v1", "data"), "", 1),
    "llama.cpp": (llama_cpp, "", 1),
    "Cohere, Jina": (strict, "", 1),
    "Voyage": (voyage, "", 1),
}


def asked_of(make: Ask) -> Callable[[Asked], Reply]:
    return lambda asked: make(asked[0][""].split()[1], asked[1])


@pytest.mark.parametrize("model", [SIGMOID, RAW], ids=["sigmoid", "raw"])
@pytest.mark.parametrize(("make", "path", "tries"), MAKES.values(), ids=MAKES)
async def test_each_make_gives_the_same_logits_and_is_found_out_once(
    make: Ask, path: str, tries: int, model: Model
) -> None:
    if model is RAW and make in (strict, voyage):
        pytest.skip("providers tell sigmoids")
    many = [f"{at} " * (at % 7 + 1) for at in range(40)]
    async with server(asked_of(make)) as (port, asked):
        one = link(port, model, path)
        first = await one.embed(part_of(0, 1, 2), model, counted(), "req_1")
        assert len(asked) == tries
        second = await one.embed(part_of(2, 0), model, counted(), "req_2")
        third = await one.embed(part_of(*range(40)), model, counted(many), "req_3")
        assert len(asked) == tries + 2
        one.close()
    for reply, texts in ((first, DOCUMENTS), (second, [DOCUMENTS[2], DOCUMENTS[0]]), (third, many)):
        assert logits(reply) == pytest.approx([logit(QUERY, text) for text in texts], abs=1e-5)
        assert reply.tokens == 10 * len(texts), "we have counted: their count does not matter"
    headers, body = asked[-1]
    assert headers["authorization"] == "Bearer sesame"
    assert "top_n" not in body, "all are wanted"
    assert body.get("model", "theirs") == "theirs"


# -- bodies ------------------------------------------------------------------------------------------------------------

RESULTS = [
    {"index": 2, "relevance_score": 0.9},
    {"index": 0, "relevance_score": 0.5},
    {"index": 1, "relevance_score": 0.1},
]
LOGITS = [0.0, math.log(0.1 / 0.9), math.log(0.9 / 0.1)]


def usual(**more: Any) -> dict[str, Any]:
    return {"object": "list", "results": RESULTS, "model": "theirs", "usage": {"total_tokens": 9}} | more


def changed(**members: Any) -> str:
    return json.dumps(usual(results=[RESULTS[0], RESULTS[1] | members, RESULTS[2]]))


def scored(score: str) -> str:
    return json.dumps(usual()).replace("0.9", score)


WHOLE = json.dumps(usual())
ECHOED = [each | {"document": {"text": '"index": 7, "relevance_score": 2', "index": 1}} for each in RESULTS]
RIGHT_BODIES = {
    "usual": WHOLE,
    "no usage": json.dumps({"results": RESULTS}),
    "a byte order mark": "\ufeff" + WHOLE,
    "the results alone": json.dumps(RESULTS),
    "data": json.dumps({"data": RESULTS}),
    "score": WHOLE.replace("relevance_score", "score"),
    "the same score twice": json.dumps(usual(results=[each | {"score": each["relevance_score"]} for each in RESULTS])),
    "indexes as texts": json.dumps(usual(results=[each | {"index": str(each["index"])} for each in RESULTS])),
    "indexes as floats": json.dumps(usual(results=[each | {"index": float(each["index"])} for each in RESULTS])),
    "documents that quote replies": json.dumps(usual(results=ECHOED)),
    "odd usage and meta": json.dumps(usual(usage=[{}], meta="none", results_count=3)),
}  # fmt: skip
WRONG_BODIES = {
    "fewer, as with top_n": (json.dumps(usual(results=RESULTS[:2])), Check.COUNT),
    "more": (json.dumps(usual(results=[*RESULTS, RESULTS[0]])), Check.COUNT),
    "none": (json.dumps(usual(results=[])), Check.COUNT),
    "index twice": (changed(index=2), Check.ORDER),
    "index too large": (changed(index=3), Check.ORDER),
    "index below 0": (changed(index=-1), Check.ORDER),
    "half an index": (changed(index=0.5), Check.ORDER),
    "no index": (changed(index=None), Check.ORDER),
    "no index at all": (json.dumps(usual(results=[{"relevance_score": 0.5}] * 3)), Check.ORDER),
    "two indexes of one document": (WHOLE.replace('"index": 0', '"index": 0, "index": 0'), Check.FORM),
    "two scores of one document": (scored('0.9, "relevance_score": 0.9'), Check.FORM),
    "two scores that differ": (changed(score=0.7), Check.FORM),
    "results twice": (WHOLE[:-1] + f', "results": {json.dumps(RESULTS)}}}', Check.FORM),
    "results and data": (json.dumps(usual(data=RESULTS)), Check.FORM),
    "neither": (json.dumps({"object": "list"}), Check.FORM),
    "results null": (json.dumps(usual(results=None)), Check.FORM),
    "no score": (json.dumps(usual(results=[{"index": at} for at in range(3)])), Check.FINITE),
    "null, as TEI writes NaN": (scored("null"), Check.FINITE),
    "NaN": (scored("NaN"), Check.FORM),
    "Infinity": (scored("Infinity"), Check.FORM),
    "too large for a float32": (scored("1e39"), Check.FINITE),
    "too large for a float": (scored("1" + "0" * 400), Check.FORM),
    "a text": (scored('"0.9"'), Check.FORM),
    "true": (scored("true"), Check.FORM),
    "a list": (scored("[0.9]"), Check.FORM),
    "vectors": (json.dumps({"data": [{"index": at, "embedding": [1.0]} for at in range(3)]}), Check.FINITE),
    "half": (WHOLE[:40], Check.FORM),
    "a page": ("<html>", Check.FORM),
    "deep": ("[" * 15_000, Check.FORM),
}  # fmt: skip


@pytest.mark.parametrize("body", RIGHT_BODIES.values(), ids=RIGHT_BODIES)
async def test_what_is_not_needed_never_spoils_right_scores(body: str) -> None:
    async with saying(http(body.encode())) as (port, asked):
        reply = await link(port, SIGMOID).embed(part_of(0, 1, 2), SIGMOID, counted(), "req_1")
    assert logits(reply) == pytest.approx(LOGITS, abs=1e-6)
    assert len(asked) == 1


@pytest.mark.parametrize(("body", "check"), WRONG_BODIES.values(), ids=WRONG_BODIES)
async def test_what_is_ambiguous_or_no_score_is_refused_by_the_check_it_fails(body: str, check: Check) -> None:
    async with saying(http(body.encode())) as (port, _):
        with pytest.raises(WrongAnswer) as raised:
            await link(port, SIGMOID).embed(part_of(0, 1, 2), SIGMOID, counted(), "req_1")
    assert raised.value.check is check


TOKENS = [
    ({"usage": {"total_tokens": 7}}, 7),
    ({"usage": {"prompt_tokens": "7"}}, 7),
    ({"meta": {"tokens": {"input_tokens": 7.0}}}, 7),
    ({"meta": {"billed_units": {"input_tokens": 7}}}, 7),
    ({"meta": {"billed_units": {"search_units": 1}}}, 30),
    ({"usage": {"total_tokens": 500}}, 30),
    ({"usage": {"total_tokens": -7}}, 30),
    ({}, 30),
]


@pytest.mark.parametrize(("told", "tokens"), TOKENS)
async def test_where_nobody_here_can_count_their_count_is_believed_within_our_bound(told: Any, tokens: int) -> None:
    async with saying(http(json.dumps({"results": RESULTS} | told).encode())) as (port, _):
        reply = await link(port, RAW).embed(part_of(0, 1, 2), RAW, counted(exact=False), "req_1")
    assert reply.tokens == tokens


# -- what a score is ---------------------------------------------------------------------------------------------------


def says(*scores: float) -> bytes:
    return http(json.dumps([{"index": at, "score": score} for at, score in enumerate(scores)]).encode())


async def test_a_server_that_told_sigmoids_is_wrong_once_it_tells_anything_else() -> None:
    """And is then judged anew: another one may be behind its address."""
    async with saying(says(0.0, 1.0), says(-0.0, 1e-310), says(0.5, 1.1), says(3.0, 0.5), says(0.5, 0.25)) as (port, _):
        one = link(port, SIGMOID)

        async def ask() -> list[float]:
            return logits(await one.embed(part_of(0, 1), SIGMOID, counted(), "req_1"))

        assert await ask() == [-36.0, 36.0]
        assert await ask() == [-36.0, -36.0]
        with pytest.raises(WrongAnswer) as raised:
            await ask()
        assert raised.value.check is Check.ENCODING
        assert await ask() == [3.0, 0.5], "logits, as llama.cpp tells them"
        assert await ask() == [0.5, 0.25], "and no reply of it is taken for sigmoids"


async def test_pairs_with_more_or_less_of_the_query_are_asked_for_apart() -> None:
    """A long document cuts the query of its own pair, and of no other."""

    def score(path: str, body: dict[str, Any]) -> Reply:
        told = [len(body["query"]) + len(text) / 8 for text in body["documents"]]
        return ok({"results": [{"index": at, "relevance_score": each} for at, each in enumerate(told)]})

    pairs = Counted([9] * 4, texts=["a", "bb", "ccc", "d"], query="qqqq", queries=["qqqq", "qq", "qqqq", "qq"])
    async with server(asked_of(score)) as (port, asked):
        one = link(port, RAW)
        assert logits(await one.embed(part_of(0, 1, 2, 3), RAW, pairs, "req_1")) == [4.125, 2.25, 4.375, 2.125]
        assert logits(await one.embed(part_of(3, 0), RAW, pairs, "req_2")) == [2.125, 4.125]
    assert [(each["query"], each["documents"]) for _, each in asked[:2]] == [
        ("qqqq", ["a", "ccc"]),
        ("qq", ["bb", "d"]),
    ]


PROBE = Counted([10, 10], texts=[PROBE_TEXT, FAR_TEXT], query=PROBE_QUERY)


async def test_a_server_of_sigmoids_in_the_place_of_llama_cpp_is_known_by_the_next_probe() -> None:
    """A caller's scores do not decide it: logits may lie within 0..1, and then say nothing."""
    told = ([5.0, -11.0], [0.25, 0.75], [5.0, -11.0], [0.97, 0.001], [0.25, 0.75])
    questions = (PROBE, msgspec.structs.replace(PROBE, texts=[PROBE_TEXT, "a caller's"]), PROBE, PROBE, counted())
    async with saying(*(says(*each) for each in told)) as (port, _):
        one = link(port, SIGMOID)
        got = [logits(await one.embed(part_of(0, 1), SIGMOID, each, "req_1")) for each in questions]
    assert got[:3] == [[5.0, -11.0], [0.25, 0.75], [5.0, -11.0]]
    for scores, sigmoids in zip(got[3:], told[3:], strict=True):
        assert scores == pytest.approx([math.log(each / (1 - each)) for each in sigmoids], abs=1e-5)


async def test_logits_of_a_probe_that_are_within_0_and_1_show_no_other_server() -> None:
    """Where a caller's reply has shown what it tells, no probe of the kind unsays it."""
    replies = (says(0.5, 0.25), says(3.0, 0.5), says(3.0, 0.5), says(0.5, 0.25), says(0.5, 0.75))
    async with saying(*replies) as (port, _):
        one = link(port, SIGMOID)
        await one.embed(part_of(0, 1), SIGMOID, PROBE, "req_1")
        with pytest.raises(WrongAnswer):
            await one.embed(part_of(0, 1), SIGMOID, counted(), "req_2")
        for question, told in ((counted(), [3.0, 0.5]), (PROBE, [0.5, 0.25]), (counted(), [0.5, 0.75])):
            assert logits(await one.embed(part_of(0, 1), SIGMOID, question, "req_3")) == told


def own(*scores: float) -> EmbedVectors:
    return EmbedVectors(20_480, np.array(scores, "<f4").tobytes())


FULL = [float(at) for at in range(REQUEST_INPUTS_MAX)]
WRONG_SCORES = {
    "one for all": ([0.5], Check.COUNT),
    "one too few": (FULL[1:], Check.COUNT),
    "one too many": ([*FULL, 1.0], Check.COUNT),
    "a NaN": ([*FULL[1:], math.nan], Check.FINITE),
    "infinite": ([math.inf, *FULL[1:]], Check.FINITE),
    "minus infinite": ([*FULL[1:], -math.inf], Check.FINITE),
    "1e30": ([*FULL[1:], 1e30], Check.FINITE),
}


@pytest.mark.parametrize(("scores", "check"), WRONG_SCORES.values(), ids=WRONG_SCORES)
def test_2048_scores_are_as_many_and_all_finite(scores: list[float], check: Check) -> None:
    with pytest.raises(WrongAnswer) as raised:
        verify(own(*scores), SIGMOID, part_of(*range(REQUEST_INPUTS_MAX)), True)
    assert raised.value.check is check


@pytest.mark.parametrize("score", [0.0, -0.0, 1e-45, -1e-39, 1e18])
def test_a_score_may_be_any_number_that_is_finite(score: float) -> None:
    verify(own(*[score] * REQUEST_INPUTS_MAX), SIGMOID, part_of(*range(REQUEST_INPUTS_MAX)), True)


# -- refusals, sizes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "failure"), STATUSES)
async def test_refusals_mean_what_they_mean_for_embeddings(status: int, failure: type[NodeFailure]) -> None:
    """Once its form is known. No refusal of a caller's documents is taken for that of a form."""
    refusing = False

    def answer(asked: Asked) -> Reply:
        return (status, b'{"error": "Input is too long: maximum context length"}') if refusing else asked_of(tei)(asked)

    async with server(answer) as (port, asked):
        one = link(port, SIGMOID)
        await one.embed(part_of(0), SIGMOID, counted(), "req_1")
        refusing = True
        for tries in (1, 3):  # the second time the other forms are tried, too
            before = len(asked)
            with pytest.raises(failure) as raised:
                await one.embed(part_of(0), SIGMOID, counted(), "req_2")
            assert len(asked) - before <= tries
            if isinstance(raised.value, UpstreamRefused):
                assert raised.value.too_long
        refusing = False
        assert logits(await one.embed(part_of(0), SIGMOID, counted(), "req_3"))
        assert asked[-1][0][""].startswith("POST /rerank "), "the form that it spoke is tried first"


async def test_a_server_without_rerank_is_told_by_what_was_tried() -> None:
    async with server(lambda asked: (404, b"{}")) as (port, asked):
        with pytest.raises(NodeFailure) as raised:
            await link(port, SIGMOID).embed(part_of(0), SIGMOID, counted(), "req_1")
    assert str(raised.value.message).startswith(
        "it has no rerank that we know: HTTP 404 at /v1/rerank, HTTP 404 at /rerank, HTTP 404 at /rerank; are its"
    )
    assert (raised.value.check, len(asked)) == (Check.STATUS_4XX, 3)


async def test_another_make_behind_the_same_address_is_found() -> None:
    make: Ask = vllm
    async with server(lambda asked: asked_of(make)(asked)) as (port, _):
        one = link(port, RAW)
        for make in (vllm, tei, infinity(""), infinity("/v1"), tei, llama_cpp):  # noqa: B007 - the server answers by it
            for _ in range(2):  # at the latest
                try:
                    found = logits(await one.embed(part_of(0, 1), RAW, counted(), "req_1"))
                    break
                except NodeFailure:
                    found = []
            assert found == pytest.approx([logit(QUERY, text) for text in DOCUMENTS[:2]], abs=1e-5)


async def test_documents_that_are_sent_back_have_room_and_much_more_has_not() -> None:
    documents = ["\x01" * 1_000 + str(at) for at in range(REQUEST_INPUTS_MAX)]
    rows = part_of(*range(REQUEST_INPUTS_MAX))
    more = ""

    def answer(asked: Asked) -> Reply:
        status, reply = vllm(asked[0][""].split()[1], asked[1])
        return status, reply + more.encode()

    async with server(answer) as (port, _):
        one = link(port, SIGMOID)
        reply = await one.embed(rows, SIGMOID, counted(documents), "req_1")
        assert len(reply.data) == 4 * REQUEST_INPUTS_MAX
        more = " " * 8_000_000
        with pytest.raises(NodeFailure) as raised:
            await one.embed(part_of(0, 1), SIGMOID, counted(documents), "req_1")
        assert raised.value.check is Check.HTTP
