"""Rerank requests of several APIs become one call; replies and failures are in each API's own words."""

import json
from typing import Any

import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.dialects import tei
from embedmesh.dialects.rerank import RerankList, VoyageRerankList, rerank_forms
from embedmesh.dialects.reranking import RerankForm, RerankPath
from embedmesh.rules.errors import ContextLengthExceeded, Failure
from embedmesh.rules.limits import RERANK_DOCUMENTS_MAX
from embedmesh.rules.models import RERANK, Model
from embedmesh.rules.reranking import Ranked, RerankCall, RerankCounts
from embedmesh.rules.served import ORDINARY

SCORES = Model(id="scores", folder="x", width=1, max_tokens=16, price=1, modalities=RERANK)
FAR = Model(id="far", width=1, max_tokens=16, price=1, modalities=RERANK)
TINY = Model(id="tiny", folder="y", width=4, max_tokens=16, price=1)
ONE, ALL = Catalogue((SCORES, TINY)), Catalogue((SCORES, TINY, FAR))
V1, V2, PLAIN = rerank_forms(lambda failure: "invalid_request_error")
RANKED = (Ranked(2, 0.9999999), Ranked(0, 1e-7), Ranked(1, -11.1))
DOCUMENTS = ["a", "", "\x00 é\n"]
ASKED: dict[str, Any] = {"model": "scores", "query": "q", "documents": DOCUMENTS}


def either() -> RerankPath:
    return RerankPath("texts", tei.RERANK, PLAIN)


def parsed(form: RerankForm | RerankPath, catalogue: Catalogue = ONE, named: str | None = None, **asked: Any) -> Any:
    return form.parse(json.dumps(asked).encode(), catalogue, ORDINARY, named=named)[0]


def replied(form: RerankForm | RerankPath, named: str | None = None, searches: int | None = None, **asked: Any) -> Any:
    call = parsed(form, named=named, **asked)
    ranked = RANKED[: call.top_n]
    headers: dict[str, str] = {}
    body = form.render(call, ranked, RerankCounts(tokens=21, searches=searches, truncated=2), headers).body
    assert len(body) + 4 * len(ranked) <= form.reply_bytes_max(call)
    assert headers["x-embedmesh-truncated"] == "2"
    return json.loads(body)


MEANS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"documents": [{"text": "a"}, "b", {"text": ""}], "rank_fields": ["text"]}, {"documents": ["a", "b", ""]}),
    ({"top_n": 2, "top_k": 2}, {"top_n": 2}),
    ({"top_k": 5}, {"top_n": 5}),
    ({"max_tokens_per_doc": 7}, {"keep": 7}),
    ({"max_doc_length": 7, "max_tokens_per_doc": 7}, {"keep": 7}),
    ({"truncate": "NONE"}, {"truncate": "none"}),
    ({"truncate": False, "truncation": False}, {"truncate": "none"}),
    ({"truncation": True, "truncate": "end", "truncate_prompt_tokens": -1}, {"truncate": "end"}),
    ({"raw_scores": True, "use_activation": False, "activation": False}, {"raw": True}),
    ({"use_activation": True}, {"raw": False}),
    ({"max_chunks_per_doc": 10, "priority": 3}, {"ignored": ("max_chunks_per_doc", "priority")}),
    ({"user": "u", "return_documents": True}, {"user": "u"}),
    ({"model": None, "top_n": None, "truncate": None, "rank_fields": None, "raw_scores": None}, {}),
    ({"model": "far"}, {"model": "far", "truncate": "none"}),  # nobody here can cut its documents
]


@pytest.mark.parametrize(("members", "means"), MEANS)
def test_what_members_mean(members: dict[str, Any], means: dict[str, Any]) -> None:
    plain = RerankCall(model="scores", query="q", documents=DOCUMENTS)
    for form in (V1, V2):
        call = parsed(form, ALL if "far" in means.values() else ONE, **ASKED | members)
        assert msgspec.structs.replace(call, asked=None) == msgspec.structs.replace(plain, **means)


def test_texts_of_tei_are_refused_when_too_long_and_scored_between_0_and_1_unless_told_otherwise() -> None:
    call = parsed(tei.RERANK, query="q", texts=["a", ""])
    assert (call.model, call.documents, call.truncate, call.raw, call.top_n) == (
        "scores",
        ["a", ""],
        "none",
        False,
        None,
    )
    call = parsed(
        tei.RERANK, ALL, "far", query="q", texts=["a"], truncate=True, raw_scores=True, truncation_direction="Right"
    )
    assert (call.model, call.truncate, call.raw) == ("far", "end", True)
    with pytest.raises(Failure) as failed:
        parsed(tei.RERANK, ALL, query="q", texts=["a"])
    assert failed.value.code == "missing_parameter" and "/tei/MODEL/rerank" in failed.value.message


GOLDEN = [
    (
        V1,
        ASKED | {"return_documents": True, "top_n": 2},
        None,
        '{"id":"rerank","object":"list","model":"scores","results":['
        '{"index":2,"relevance_score":0.9999999,"document":{"text":"\\u0000 é\\n"}},'
        '{"index":0,"relevance_score":1e-7,"document":{"text":"a"}}],"usage":{"prompt_tokens":21,"total_tokens":21},'
        '"meta":{"api_version":{"version":"1"},"billed_units":{"input_tokens":21}}}',
    ),
    (
        V2,
        ASKED,
        3,
        '{"id":"rerank","object":"list","model":"scores","results":[{"index":2,"relevance_score":0.9999999},'
        '{"index":0,"relevance_score":1e-7},{"index":1,"relevance_score":-11.1}],'
        '"usage":{"prompt_tokens":21,"total_tokens":21},'
        '"meta":{"api_version":{"version":"2"},"billed_units":{"search_units":3}}}',
    ),
    (
        V1,
        ASKED | {"truncation": True, "top_k": 1, "return_documents": True},
        None,
        '{"id":"rerank","object":"list","model":"scores","data":[{"index":2,"relevance_score":0.9999999,'
        '"document":"\\u0000 é\\n"}],"usage":{"prompt_tokens":21,"total_tokens":21},'
        '"meta":{"api_version":{"version":"1"},"billed_units":{"input_tokens":21}}}',
    ),
    (
        tei.RERANK,
        {"query": "q", "texts": DOCUMENTS, "return_text": True},
        None,
        '[{"index":2,"score":0.9999999,"text":"\\u0000 é\\n"},{"index":0,"score":1e-7,"text":"a"},'
        '{"index":1,"score":-11.1,"text":""}]',
    ),
    (tei.RERANK, {"query": "q", "texts": DOCUMENTS, "top_n": 1}, None, '[{"index":2,"score":0.9999999}]'),
]


@pytest.mark.parametrize(("form", "asked", "searches", "reply"), GOLDEN)
def test_replies_to_the_letter(form: RerankForm, asked: Any, searches: int | None, reply: str) -> None:
    call = parsed(form, **asked)
    ranked = RANKED[: call.top_n or len(call.documents)]
    counts = RerankCounts(tokens=21, searches=searches, truncated=0)
    body = form.render(call, ranked, counts, {}).body
    assert body.decode() == reply
    assert len(body) <= form.reply_bytes_max(call)


def test_replies_are_of_the_documented_types() -> None:
    assert len(msgspec.convert(replied(V1, **ASKED), RerankList).results) == 3
    assert len(msgspec.convert(replied(V2, **ASKED, truncation=False, searches=2), VoyageRerankList).data) == 3
    assert msgspec.convert(replied(tei.RERANK, query="q", texts=DOCUMENTS), list[tei.TeiRanked])[0].index == 2


def test_the_largest_reply_is_known_before_it_is_made() -> None:
    """Documents that grow sixfold when they are told, names of any characters: the bound holds, and is no fiction."""
    model = Model(id="scores", folder="x", width=1, max_tokens=16, price=1, modalities=RERANK, aliases=("é" * 200,))
    documents = ["\x01" * (each % 300) for each in range(RERANK_DOCUMENTS_MAX)]
    asked: dict[str, Any] = {
        "model": "é" * 200,
        "query": "q",
        "documents": documents,
        "return_documents": True,
        "top_n": 2_000,
    }
    call = parsed(V1, Catalogue((model,)), **asked)
    ranked = [Ranked(index, -1.1754944e-38) for index in range(48, RERANK_DOCUMENTS_MAX)]
    size = len(V1.render(call, ranked, RerankCounts(tokens=10**9, searches=None, truncated=0), {}).body)
    assert size + 4 * len(ranked) <= V1.reply_bytes_max(call) <= 1.2 * size
    assert V1.reply_bytes_max(parsed(V1, Catalogue((model,)), **asked | {"return_documents": False})) < 300_000


REFUSED: list[tuple[Any, dict[str, Any], str, str]] = [
    (V1, {"query": "q"}, "missing_parameter", "documents"),
    (V1, {"documents": ["a"]}, "missing_parameter", "query"),
    (V1, ASKED | {"query": {"text": "q"}}, "invalid_type", "query"),
    (V1, ASKED | {"documents": ["a" * 20] * 9_000}, "too_many_inputs", "documents"),
    (V1, ASKED | {"documents": ["a", 7]}, "invalid_type", "documents.1"),
    (V1, ASKED | {"documents": ["a", None]}, "invalid_type", "documents.1"),
    (V1, ASKED | {"documents": [{"title": "a"}]}, "unknown_parameter", "documents.0.title"),
    (V1, ASKED | {"documents": [{}]}, "missing_parameter", "documents.0.text"),
    (V1, ASKED | {"rank_fields": ["title"]}, "invalid_value", "rank_fields.0"),
    (V1, ASKED | {"top_n": 0}, "invalid_value", "top_n"),
    (V1, ASKED | {"top_n": True}, "invalid_type", "top_n"),
    (V1, ASKED | {"top_n": 1, "top_k": 2}, "invalid_value", "top_k"),
    (V1, ASKED | {"raw_scores": True, "use_activation": True}, "invalid_value", "use_activation"),
    (V1, ASKED | {"truncate": "none", "truncation": True}, "invalid_value", "truncation"),
    (V1, ASKED | {"truncate": "start"}, "invalid_value", "truncate"),
    (V1, ASKED | {"truncate_prompt_tokens": 9}, "invalid_value", "truncate_prompt_tokens"),
    (V1, ASKED | {"max_tokens_per_doc": 1, "max_doc_length": 2}, "invalid_value", "max_doc_length"),
    (V1, ASKED | {"instruction": "x"}, "unknown_parameter", "instruction"),
    (V1, ASKED | {"model": "nope"}, "model_not_found", "model"),
    (V2, ASKED | {"model": "tiny"}, "unsupported_modality", "model"),
    (tei.RERANK, {"query": "q"}, "missing_parameter", "texts"),
    (tei.RERANK, {"query": "q", "texts": ["a", 3]}, "invalid_type", "texts.1"),
    (tei.RERANK, {"query": "q", "texts": ["a" * 20] * 9_000}, "too_many_inputs", "texts"),
    (
        tei.RERANK,
        {"query": "q", "texts": ["a"], "truncation_direction": "Left"},
        "invalid_value",
        "truncation_direction",
    ),
    (tei.RERANK, {"query": "q", "documents": ["a"]}, "unknown_parameter", "documents"),
    (tei.RERANK, {"query": "q", "texts": ["a"], "top_k": 1}, "unknown_parameter", "top_k"),
]


@pytest.mark.parametrize(("form", "asked", "code", "param"), REFUSED)
def test_a_refusal_names_the_forms_own_member(form: RerankForm, asked: Any, code: str, param: str) -> None:
    with pytest.raises(Failure) as failed:
        parsed(form, **asked)
    assert (failed.value.code, failed.value.param) == (code, param)
    if code != "unsupported_modality" and code != "model_not_found":
        assert f"`{param}`" in failed.value.message
    told = json.loads(form.envelope(failed.value))
    assert failed.value.message in (told.get("message"), told.get("error"))


def test_a_model_that_does_something_else_is_refused_with_the_right_path() -> None:
    with pytest.raises(Failure) as failed:
        parsed(tei.RERANK, named="tiny", query="q", texts=["a"])
    assert "POST /v1/embeddings" in failed.value.message


def test_an_unknown_name_is_told_the_models_that_rerank() -> None:
    with pytest.raises(Failure) as failed:
        parsed(V1, ALL, **ASKED | {"model": "rerank-v3.5"})
    assert "Served are: scores, far." in failed.value.message


def test_each_api_reads_the_failure_where_it_looks_for_it() -> None:
    words = "`documents.1` has 9 tokens with its query; the model takes at most 5. Shorten it."
    told = json.loads(V1.envelope(ContextLengthExceeded(words, param="documents.1")))
    error = {
        "message": words,
        "type": "invalid_request_error",
        "param": "documents.1",
        "code": "context_length_exceeded",
    }
    assert told == {"error": error, "message": words, "detail": words}
    told = json.loads(tei.RERANK.envelope(ContextLengthExceeded(words, param="documents.1")))
    assert told == {"error": words.replace("documents", "texts"), "error_type": "Validation"}


def test_one_path_has_two_forms_and_each_has_its_own_failures() -> None:
    asked = either()
    assert parsed(asked, query="q", texts=["a"]).documents == ["a"]
    assert asked.envelope is not None and "error_type" in json.loads(asked.envelope(Failure("x")))
    assert replied(either(), query="q", texts=DOCUMENTS)[0] == {"index": 2, "score": 0.9999999}
    told = replied(either(), **ASKED | {"texts": None})
    assert (told["object"], told["results"][0]["index"]) == ("rerank", 2), "Infinity's client wants its own word"
    for body, tei_form in (
        (b'{"query": "q", "texts": [1]}', True),
        (b'{"query": "q", "texts": ["a"], "documents": ["a"]}', True),
        (b'{"query": "q", "texts": "\\ud800"', True),
        (b'{"query": "q", "documents": ["\\"texts\\""], "top_n": 0}', False),
        (b'{"query": "q"', False),
        (b"[]", False),
    ):
        asked = either()
        with pytest.raises(Failure) as failed:
            asked.parse(body, ONE, ORDINARY, named=None)
        assert ("error_type" in json.loads(asked.envelope(failed.value))) == tei_form, body


@pytest.mark.parametrize("body", [b"", b"[]", b'"a"', b"{", b'{"query": "\\ud800"}', b"\xff", b"[" * 99])
def test_what_is_no_request_at_all_is_refused(body: bytes) -> None:
    for form in (V1, V2, tei.RERANK, either()):
        with pytest.raises(Failure) as failed:
            form.parse(body, ONE, ORDINARY, named=None)
        assert failed.value.code in ("invalid_json", "invalid_type")
