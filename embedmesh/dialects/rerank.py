"""The form of `/v1/rerank` and `/v2/rerank`: what Cohere, Jina, Voyage, vLLM and Infinity take, in one.

https://docs.cohere.com/reference/rerank, https://jina.ai/reranker, https://docs.voyageai.com/reference/reranker-api.
Voyage's clients are known by `truncation` or `top_k`: only they read the results as `data`. A pair of query and
document that is too long is cut, the longer text first, unless the request says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.reranking import SOME_DOCUMENTS, SOME_QUERY, RerankForm, WriteRanked, agreed
from embedmesh.rules.errors import Failure
from embedmesh.rules.limits import USER_CHARS_MAX
from embedmesh.rules.reranking import Ranked, RerankCall, RerankCounts, RerankTruncate

SAME_RERANK_ID = "rerank"  # some clients want an id; the same request again gets the same bytes, so it says nothing
IGNORED = ("max_chunks_per_doc", "priority")  # a document is one chunk here, which is within any number of them

Name = Annotated[str, Meta(min_length=1)]
Least1 = Annotated[int, Meta(ge=1)]


class RerankDocument(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A document as an object. It has nothing but a text, so that nothing of it is left unread."""

    text: str


class RerankRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A query, and the documents to rank. Members in one line mean the same, and must agree.

    - `top_n`, `top_k`: how many of the best are told; else all.
    - `max_tokens_per_doc`, `max_doc_length`: a document keeps at most this many tokens.
    - `truncate`, `truncation`: false or `none` refuses a pair that is too long for the model; else it is cut.
    - `raw_scores: true`, `use_activation: false`, `activation: false`: scores are the model's logits; the opposite
      wants them between 0 and 1; else they are what the model's own definition says.
    - `max_chunks_per_doc`, `priority`: change nothing.
    """

    query: Annotated[str, SOME_QUERY]
    documents: Annotated[list[str | RerankDocument], SOME_DOCUMENTS]
    model: Name | None = None
    top_n: Least1 | None = None
    top_k: Least1 | None = None
    return_documents: bool | None = None
    rank_fields: Annotated[list[Literal["text"]], Meta(min_length=1, max_length=1)] | None = None
    max_tokens_per_doc: Least1 | None = None
    max_doc_length: Least1 | None = None
    truncate: bool | Literal["none", "end", "NONE", "END"] | None = None
    truncation: bool | None = None
    truncate_prompt_tokens: Literal[-1] | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None
    activation: bool | None = None
    max_chunks_per_doc: Least1 | None = None
    priority: int | None = None
    user: Annotated[str, Meta(max_length=USER_CHARS_MAX)] | None = None


class RerankedText(msgspec.Struct, frozen=True):
    """A document of the request."""

    text: str


class RankedReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """A document's position in the request, and its score; with `return_documents` the document, too."""

    index: Annotated[int, Meta(ge=0)]
    relevance_score: float
    document: RerankedText | None = None


class VoyageRankedReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """The same, as Voyage's clients read it."""

    index: Annotated[int, Meta(ge=0)]
    relevance_score: float
    document: str | None = None


class RerankUsage(msgspec.Struct, frozen=True):
    """Tokens of all pairs, special tokens included: the query counts once for each document."""

    prompt_tokens: int
    total_tokens: int


class RerankVersion(msgspec.Struct, frozen=True):
    """That of the path."""

    version: Literal["1", "2"]


class RerankBilled(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the request is by list: tokens, or searches of up to 100 documents each, as the model is priced.

    What is remembered for you may be free: `x-embedmesh-cost-nanousd` tells the charge.
    """

    input_tokens: int | None = None
    search_units: int | None = None


class RerankMeta(msgspec.Struct, frozen=True):
    """As Cohere tells it."""

    api_version: RerankVersion
    billed_units: RerankBilled


class RerankList(msgspec.Struct, frozen=True):
    """The best documents, best first; of equal scores the earlier document."""

    id: Literal["rerank"]
    object: Literal["list", "rerank"]
    model: str
    results: list[RankedReply]
    usage: RerankUsage
    meta: RerankMeta


class VoyageRerankList(msgspec.Struct, frozen=True):
    """The same, where the request has `truncation` or `top_k`."""

    id: Literal["rerank"]
    object: Literal["list", "rerank"]
    model: str
    data: list[VoyageRankedReply]
    usage: RerankUsage
    meta: RerankMeta


def _cut(value: bool | str | None) -> RerankTruncate | None:
    if value is None:
        return None
    return "none" if value is False or str(value).lower() == "none" else "end"


def _opposite(value: bool | None) -> bool | None:
    return None if value is None else not value


def _meanings(asked: RerankRequest) -> dict[str, Any]:
    cuts = {
        "truncate": _cut(asked.truncate),
        "truncation": _cut(asked.truncation),
        "truncate_prompt_tokens": None if asked.truncate_prompt_tokens is None else "end",
    }
    scores = {
        "raw_scores": asked.raw_scores,
        "use_activation": _opposite(asked.use_activation),
        "activation": _opposite(asked.activation),
    }
    lengths = {"max_tokens_per_doc": asked.max_tokens_per_doc, "max_doc_length": asked.max_doc_length}
    return {
        "model": asked.model,
        "query": asked.query,
        "documents": [each if isinstance(each, str) else each.text for each in asked.documents],
        "top_n": agreed({"top_n": asked.top_n, "top_k": asked.top_k}),
        "keep": agreed(lengths),
        "truncate": agreed(cuts),
        "raw": agreed(scores),
        "user": asked.user,
        "ignored": tuple(name for name in IGNORED if getattr(asked, name) is not None),
    }


def _echoes(asked: RerankRequest) -> bool:
    return bool(asked.return_documents)


def _writing(version: Literal["1", "2"], kind: Literal["list", "rerank"]) -> WriteRanked:
    """How a reply is written at the path of that version; `kind` is what clients there want as `object`."""

    def write(call: RerankCall, ranked: Sequence[Ranked], counts: RerankCounts) -> Any:
        asked: RerankRequest = call.asked
        voyage = asked.truncation is not None or asked.top_k is not None
        results: list[dict[str, Any]] = [{"index": each.index, "relevance_score": each.score} for each in ranked]
        if asked.return_documents:
            for result in results:
                text = call.documents[result["index"]]
                result["document"] = text if voyage else {"text": text}
        by_tokens = counts.searches is None
        return {
            "id": SAME_RERANK_ID,
            "object": kind,
            "model": call.model,
            "data" if voyage else "results": results,
            "usage": {"prompt_tokens": counts.tokens, "total_tokens": counts.tokens},
            "meta": {
                "api_version": {"version": version},
                "billed_units": {"input_tokens": counts.tokens} if by_tokens else {"search_units": counts.searches},
            },
        }

    return write


def envelope_with(kind_of: Callable[[Failure], str]) -> Callable[[Failure], bytes]:
    """How failures are told: OpenAI's member `error`, Cohere's `message` and Voyage's and Jina's `detail` in one."""

    def envelope(failure: Failure) -> bytes:
        said = failure.message
        error = {"message": said, "type": kind_of(failure), "param": failure.param, "code": failure.code}
        return orjson.dumps({"error": error, "message": said, "detail": said})

    return envelope


def rerank_forms(kind_of: Callable[[Failure], str]) -> tuple[RerankForm, RerankForm, RerankForm]:
    """Of `/v1/rerank`, `/v2/rerank` and `/rerank`. `kind_of` is the `type` of a failure in OpenAI's envelope."""
    envelope = envelope_with(kind_of)

    def form(write: WriteRanked) -> RerankForm:
        return RerankForm(RerankRequest, _meanings, write, envelope, {"input": "documents"}, _echoes)

    return form(_writing("1", "list")), form(_writing("2", "list")), form(_writing("1", "rerank"))
