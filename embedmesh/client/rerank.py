"""Rerank: documents in the order in which they answer a query, in as few requests as they need. It has no I/O.

Each pair of query and document is scored by itself, so that scores of several requests are one order. Of equal scores
the server knows the better one, by its logits, which are not told.
"""

import math
import secrets
from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict

import msgspec

from embedmesh.client.errors import CallRefused, InputRefused, NotScores, WrongCall
from embedmesh.client.steps import Patience, Steps, ToSend, _answered, _refused
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.rules.reranking import SEARCH_DOCUMENTS, Ranked

if TYPE_CHECKING:
    from embedmesh.client.calls import BegunCall

RERANK_PATH = "/rerank"
PART_DOCUMENTS_MAX = 2_000  # a gateway takes 2,048; whole searches, so that several requests cost no more than one
TOO_MANY_TOKENS = "max_tokens_per_request"  # of a part: it is cut in two
REFUSED_DOCUMENT = "documents."


class RerankOptions(TypedDict, total=False):
    """Options of `rerank`.

    `top_n`: how many of the best come back; all, by default. `raw_scores`: True for logits, False for 0 to 1; by
    default as the model's own definition has it. `truncate`: "none" refuses a pair that is longer than the model
    takes; "end", the default, cuts the longer of its texts. `max_tokens_per_doc` cuts documents before that.
    `extra_body`: further members of each request. `batch_size`: documents a request at most. `timeout`: seconds, for
    each request. `idempotent`: every request has an Idempotency-Key, so that what is sent again is not paid twice,
    whichever gateway gets it. `progress` is called with the number of documents that are scored, after each request.
    """

    top_n: int | None
    raw_scores: bool | None
    truncate: Literal["none", "end"] | None
    max_tokens_per_doc: int | None
    user: str | None
    extra_body: Mapping[str, Any] | None
    batch_size: int | None
    timeout: float | None
    idempotent: bool
    progress: Callable[[int], object] | None


class Reranked(msgspec.Struct, frozen=True):
    """Documents by their scores: best first, equal ones as the server orders them, those of earlier requests first.

    `tokens` are those of all pairs, the query's once a document. `searches` are counted, too, where the model has a
    price of those. Both are by list: what the server remembers may be free. `cost_nanousd` is what was charged, None
    where the server does not tell. `truncated` documents were cut.
    """

    results: list[Ranked]
    model: str
    tokens: int
    searches: int | None
    cost_nanousd: int | None
    truncated: int
    request_ids: list[str]


class WantedRerank(NamedTuple):
    """What is to be ranked. `members` are those of every request but its documents, which are JSON already."""

    members: dict[str, Any]
    documents: list[bytes]
    top_n: int | None
    parts: list[range]
    idempotent: bool
    progress: Callable[[int], object]


class RerankReply(NamedTuple):
    """What one request was answered. Indices are those of its own documents."""

    results: list[Ranked]
    model: str
    tokens: int
    searches: int | None
    cost_nanousd: int | None
    truncated: int
    request_id: str | None


def want_rerank(query: str, documents: Iterable[str], model: str, options: RerankOptions) -> WantedRerank:
    """The requests for these documents. Raises WrongCall."""
    if unknown := options.keys() - RerankOptions.__annotations__.keys():
        raise WrongCall(f"There is no option {min(unknown)}. Members of the request go into extra_body.")
    if not isinstance(query, str) or not query:
        raise WrongCall("query must be a text, and not empty.")
    top_n = _whole("top_n", options)
    named = ("raw_scores", "truncate", "max_tokens_per_doc", "user")
    given = {name: options.get(name) for name in named} | dict(options.get("extra_body") or {})
    members = {name: value for name, value in given.items() if value is not None} | {"model": model, "query": query}
    encoded = _documents(documents)
    head_bytes = len(_json(members | {"top_n": len(encoded), "documents": []}))
    # With the query in each pair: a body has room for as many bytes as a request takes tokens, times four.
    query_bytes = len(_json(query))
    sizes = [len(each) + query_bytes + 1 for each in encoded]
    documents_max = min(_whole("batch_size", options) or PART_DOCUMENTS_MAX, PART_DOCUMENTS_MAX)
    parts = _cut(sizes, REQUEST_BODY_BYTES_MAX - head_bytes, documents_max)
    progress = options.get("progress") or (lambda done: None)
    return WantedRerank(members, encoded, top_n, parts, options.get("idempotent", False), progress)


def rerank_requests(
    wanted: WantedRerank, begin: "Callable[[Callable[[Patience], Steps[RerankReply | None]]], BegunCall[Any]]"
) -> "Generator[BegunCall[RerankReply | None], RerankReply | None, Reranked]":
    """One call after another, each answered with what has come of it; `begin` gives it its time.

    Raises CallRefused, InputRefused, CallNotAnswered or NotScores, by the steps of a call.
    """
    parts, replies, ranked = deque(wanted.parts), list[RerankReply](), list[Ranked]()
    done = 0
    while parts:
        part = parts.popleft()
        reply = yield begin(lambda patience, part=part: _scores(wanted, part, patience))  # type: ignore[misc]
        if reply is None:
            half = len(part) // 2
            if half > SEARCH_DOCUMENTS:
                half -= half % SEARCH_DOCUMENTS  # whole searches, so that both cost no more than the part
            parts.extendleft((part[half:], part[:half]))
            continue
        replies.append(reply)
        ranked += [Ranked(part[each.index], each.score) for each in reply.results]
        done += len(part)
        wanted.progress(done)
    ranked.sort(key=lambda each: -each.score)  # stable: a reply's order stays, also where its scores are all told as 1
    searches = [each.searches for each in replies if each.searches is not None]
    costs = [each.cost_nanousd for each in replies if each.cost_nanousd is not None]
    return Reranked(
        results=ranked[: wanted.top_n],
        model=replies[0].model,
        tokens=sum(each.tokens for each in replies),
        searches=sum(searches) if searches else None,
        cost_nanousd=sum(costs) if costs else None,
        truncated=sum(each.truncated for each in replies),
        request_ids=[each.request_id for each in replies if each.request_id],
    )


def _scores(wanted: WantedRerank, part: range, patience: Patience) -> Steps[RerankReply | None]:
    """The scores of a part; None where it has more tokens than one request takes."""
    top_n = len(part) if wanted.top_n is None else min(wanted.top_n, len(part))
    documents = [msgspec.Raw(each) for each in wanted.documents[part.start : part.stop]]
    body = _json(wanted.members | {"top_n": top_n, "documents": documents})
    headers = {"Idempotency-Key": secrets.token_hex(16)} if wanted.idempotent else {}
    answer = yield from _answered(ToSend(RERANK_PATH, body, headers), patience)
    if answer.status != 200:
        refused = _refused(answer)
        if refused.code == TOO_MANY_TOKENS and len(part) > 1:
            return None
        raise _in_whole(refused, part)
    try:
        return read_ranked(answer.body, len(part), top_n, answer.headers)
    except ValueError as error:
        raise NotScores(
            f"The reply is not what a rerank endpoint answers ({error}). Is the base URL that of one?"
        ) from None


def _in_whole(refused: CallRefused, part: range) -> CallRefused:
    """A refusal of one document names it by its place among all."""
    number = (refused.param or "").removeprefix(REFUSED_DOCUMENT)
    if refused.param == number or not number.isdecimal() or int(number) >= len(part):
        return refused
    return InputRefused(part[int(number)], refused.problem)


class _Result(msgspec.Struct):
    index: int
    relevance_score: float


class _RerankUsage(msgspec.Struct):
    total_tokens: int = 0


class _Billed(msgspec.Struct):
    search_units: int | None = None


class _Meta(msgspec.Struct):
    billed_units: _Billed | None = None


class _RerankBody(msgspec.Struct):
    results: list[_Result]
    model: str = ""
    usage: _RerankUsage | None = None
    meta: _Meta | None = None


def read_ranked(body: bytes, documents: int, top_n: int, headers: Mapping[str, str]) -> RerankReply:
    """A reply that has the best `top_n` of that many documents. Raises ValueError with one word for what is wrong."""
    try:
        reply = msgspec.json.decode(body, type=_RerankBody)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ValueError("form") from None
    if len(reply.results) != top_n:
        raise ValueError("count")
    if len({each.index for each in reply.results if 0 <= each.index < documents}) != top_n:
        raise ValueError("index")
    if not all(math.isfinite(each.relevance_score) for each in reply.results):
        raise ValueError("finite")
    billed = reply.meta.billed_units if reply.meta else None
    return RerankReply(
        results=[Ranked(each.index, each.relevance_score) for each in reply.results],
        model=reply.model,
        tokens=reply.usage.total_tokens if reply.usage else 0,
        searches=billed.search_units if billed else None,
        cost_nanousd=_number(headers.get("x-embedmesh-cost-nanousd")),
        truncated=_number(headers.get("x-embedmesh-truncated")) or 0,
        request_id=headers.get("x-request-id"),
    )


def _number(told: str | None) -> int | None:
    return int(told) if told is not None and told.isdecimal() else None


def _whole(name: Literal["top_n", "batch_size"], options: RerankOptions) -> int | None:
    asked = options.get(name)
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise WrongCall(f"{name} must be at least 1.")
    return asked


def _documents(documents: Iterable[str]) -> list[bytes]:
    """Each as JSON."""
    if isinstance(documents, str):
        raise WrongCall("documents must be a list of texts: [text] for one.")
    found = list(documents)
    if not found:
        raise WrongCall("documents must not be empty.")
    if not all(isinstance(each, str) for each in found):
        raise WrongCall("documents must be texts.")
    return [_json(each) for each in found]


def _cut(sizes: Sequence[int], bytes_max: int, documents_max: int) -> list[range]:
    """The documents of each request, whole searches where several are needed. Raises WrongCall."""
    parts: list[range] = []
    start = 0
    while start < len(sizes):
        end, left = start, bytes_max
        while end < len(sizes) and end - start < documents_max and left >= sizes[end]:
            left -= sizes[end]
            end += 1
        if end == start:
            raise WrongCall(f"Document {start:,} does not fit into a request of {REQUEST_BODY_BYTES_MAX:,} bytes.")
        if end < len(sizes) and end - start > SEARCH_DOCUMENTS:
            end -= (end - start) % SEARCH_DOCUMENTS
        parts.append(range(start, end))
        start = end
    return parts


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        raise WrongCall("A text has half a surrogate pair, which UTF-8 cannot hold. Remove it.") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise WrongCall(f"The arguments are not JSON: {type(error).__name__}.") from None
