"""Rerank requests: a query and documents, each pair of which gets a score."""

from typing import Any, Literal

import msgspec

from embedmesh.rules.limits import RERANK_DOCUMENTS_MAX

TOO_MANY_DOCUMENTS = f"`documents` has too many entries; one request takes at most {RERANK_DOCUMENTS_MAX:,}."
SEARCH_DOCUMENTS = 100  # that one search covers, as Cohere counts them

RerankTruncate = Literal["none", "end"]


class RerankCall(msgspec.Struct, frozen=True):
    """A validated request. `asked` is the request in the form of its dialect, for the reply.

    `top_n`: how many of the best are told; None for all. `keep`: tokens of a document that are kept at most.
    `truncate`: whether a pair that is too long for the model is cut, the longer of its texts first, or refused. `raw`:
    whether scores are told as logits; None for what the model's own definition says.
    """

    model: str  # as sent, tier suffix and alias included
    query: str
    documents: list[str]
    top_n: int | None = None
    keep: int | None = None
    truncate: RerankTruncate = "end"
    raw: bool | None = None
    user: str | None = None
    ignored: tuple[str, ...] = ()
    asked: Any = None


class Ranked(msgspec.Struct, frozen=True, array_like=True):
    """A document's place in the request, and its score as callers are told it."""

    index: int
    score: float


class RerankCounts(msgspec.Struct, frozen=True):
    """What callers are told that a request was: `tokens` of all pairs, and how many pairs were cut (`truncated`).

    `searches` is None where tokens are paid. Both are those of all documents, of remembered scores, too, so that the
    same request gets the same bytes: what is charged may be less.
    """

    tokens: int
    searches: int | None
    truncated: int


def searches_of(documents: int) -> int:
    """How many searches a request with that number of documents is charged for."""
    return -(-documents // SEARCH_DOCUMENTS)


def fit_pair(query: int, document: int, room: int) -> tuple[int, int]:
    """How many tokens of each are kept where both may have `room` together: the longer one is cut first.

    The rule is that of CrossEncoder, which has the tokenizer cut "longest first": below half of the room none is cut.
    """
    short, long = min(query, document), max(query, document)
    if short + long > room:
        short = min(short, room // 2)
        long = room - short
    return (short, long) if query <= document else (long, short)
