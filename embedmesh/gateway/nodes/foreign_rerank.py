"""Scores of servers of other makes: by TEI's `/rerank`, or by that of Jina, which Cohere, vLLM, llama.cpp and Infinity
have, too.

At which path a server speaks which form is found out by its first request, which is a probe, and remembered. So is what
it tells of a model whose scores are sigmoids of its logits: these, as most do, or the logits, as llama.cpp does.

A probe is the same question each time. So where its scores once lay outside of 0..1 and now lie within, another server
has taken the address. No caller's scores decide that: some logits lie within 0..1 by chance.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from embedmesh.fleet.examiner import FAR_TEXT, PROBE_QUERY, PROBE_TEXT
from embedmesh.gateway.nodes.foreign_replies import check_once_each, read_reply, whole
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeBroke, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model, Scores
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.refusals import NAME_HINT, SUCCESS, failure_of
from embedmesh.upstream.server import UpstreamServer

NO_SCORES = "the server's reply is of no form of scores"
OTHER_FORM = (400, 404, 405, 415, 422)  # what a server says to a form that it does not speak, or where it does not
LOGIT_MAX = 36.0  # of a sigmoid that is told as 1 or 0; further out a float64 has no other
BYTES_PER_RESULT = 512  # around a document and its score
BYTES_PER_REPLY = 16_384  # around all of them
ECHO_TIMES = 6  # how long a byte of a document is at most that the server sends back, as vLLM does: `\u0001`
LOGITS = {"raw_scores": True, "use_activation": False}  # to Infinity, and to vLLM; others tell the model's own
SCORE_FIELDS = ("results", "data", "index", "relevance_score", "score", "usage", "meta")
"""That we read: each may be in its object once."""
SCORE_NAMES = re.compile(f'"(?:{"|".join(SCORE_FIELDS)})"'.encode()).findall
PROBES = ((PROBE_QUERY, [PROBE_TEXT, FAR_TEXT]), (PROBE_QUERY, [PROBE_TEXT]))
"""The second one is of a server that takes one document a request."""
FLOAT32_MAX = float(np.finfo(np.float32).max)

Numbers = np.ndarray[Any, np.dtype[np.float64]]


class Result(msgspec.Struct):
    """A document's score. A NaN is null in some servers' JSON."""

    index: int | float | str | None = None
    relevance_score: float | None = None
    score: float | None = None  # TEI's word


class Results(msgspec.Struct):
    """A reply of Jina's form. `usage` and `meta` tell the tokens."""

    results: list[Result] | None = None
    data: list[Result] | None = None  # Voyage's word
    usage: Any = None
    meta: Any = None


class Form(NamedTuple):
    """A path, and whether it takes TEI's members or Jina's."""

    path: str
    tei: bool


DECODE_RESULTS = msgspec.json.Decoder(list[Result] | Results).decode


class UpstreamRerank:
    """One server that reranks. `path` is that of its URL."""

    def __init__(self, server: UpstreamServer, path: str) -> None:
        self._server = server
        above = path.removesuffix("/v1")  # where TEI has it, and Infinity if nothing is said
        self._forms = [Form(f"{path}/rerank", tei=False), Form(f"{above}/rerank", tei=True)]
        if above != path:
            self._forms.append(Form(f"{above}/rerank", tei=False))
        self._speaks = False  # whether the first form was right in the last reply
        self._spoke = False  # whether it ever was
        self._tells: dict[str, Scores] = {}  # by model: what a reply of Jina's form has for sigmoids
        self._probed_logits: set[tuple[str, int]] = set()  # by model and number of documents: its probe had logits

    async def score(self, part: Part, model: Model, counted: Counted, offer: Offer) -> EmbedVectors:
        """Logits of the part's pairs, as `NodeLink.embed`."""
        assert counted.query is not None
        if counted.queries is None:
            scores, told = await self._scores(model, counted, counted.query, part.rows, offer)
        else:  # a request for each: a server takes one query at a time
            by_query: dict[str, list[int]] = {}
            for at, row in enumerate(part.rows):
                by_query.setdefault(counted.queries[row], []).append(at)
            scores, told = np.empty(len(part.rows)), None
            for query, places in by_query.items():
                rows = [part.rows[at] for at in places]
                scores[places], _ = await self._scores(model, counted, query, rows, offer)
        tokens = part.tokens if counted.exact else min(_tokens(told) or part.tokens, part.tokens)
        return EmbedVectors(tokens, scores.astype("<f4").tobytes())

    async def _scores(
        self, model: Model, counted: Counted, query: str, rows: Sequence[int], offer: Offer
    ) -> tuple[Numbers, Results | None]:
        """Logits of these documents for a query, and what the reply tells beside. Raises a NodeFailure."""
        assert counted.texts is not None
        documents = [counted.texts[row] for row in rows]
        texts = [offer.prefix + document for document in documents]
        echo = ECHO_TIMES * sum(len(text.encode()) for text in texts)
        limit = echo + len(texts) * BYTES_PER_RESULT + BYTES_PER_REPLY
        form, reply = await self._ask(model, offer, query, texts, limit)
        results, told = read_reply(reply, _decoded, NO_SCORES)
        scores = _in_rows(results, len(texts))
        if not form.tei and model.scores == "sigmoid":
            if (query, documents) in PROBES:
                self._probed(model.id, scores)
            scores = self._logits(model, scores)
        if not (np.abs(scores) <= FLOAT32_MAX).all():
            raise WrongAnswer("a score is not finite", check=Check.FINITE)
        return scores, told

    async def _ask(
        self, model: Model, offer: Offer, query: str, texts: list[str], limit: int
    ) -> tuple[Form, Http1Reply]:
        """A successful reply, and of which form it is. Where that is not known, all are tried, the last one first."""
        refused: list[tuple[Form, Http1Reply]] = []
        for form in tuple(self._forms):
            if form.tei:  # what is too long is never cut there: it was counted here
                body: dict[str, Any] = {"query": query, "texts": texts, "raw_scores": True, "truncate": False}
            else:  # without `top_n` all are told
                body = {"model": offer.name or offer.id, "query": query, "documents": texts}
                if model.scores == "raw":
                    body |= LOGITS
            reply = await self._server.exchange(form.path, body, limit)
            if reply.status in SUCCESS:
                self._forms.remove(form)
                self._forms.insert(0, form)
                self._speaks = self._spoke = True
                return form, reply
            if reply.status not in OTHER_FORM:
                raise failure_of(reply.status, reply.headers, reply.body)
            refused.append((form, reply))
            if self._speaks:
                break
        self._speaks = False  # another server may be there tomorrow
        (_, first), *_ = refused
        if self._spoke:
            raise failure_of(first.status, first.headers, first.body)
        said = ", ".join(f"HTTP {reply.status} at {form.path}" for form, reply in refused)
        raise NodeBroke(f"it has no rerank that we know: {said}{NAME_HINT}", check=Check.STATUS_4XX)

    def _probed(self, model_id: str, scores: Numbers) -> None:
        """See whether another server answers a probe than the one that told logits."""
        probe = (model_id, len(scores))
        if _outside(scores):
            self._probed_logits.add(probe)
        elif probe in self._probed_logits and np.isfinite(scores).all():
            self._probed_logits.remove(probe)
            self._tells.pop(model_id, None)

    def _logits(self, model: Model, scores: Numbers) -> Numbers:
        """Logits of what a reply of Jina's form has for sigmoids. Raises WrongAnswer."""
        outside = _outside(scores)
        if self._tells.setdefault(model.id, "raw" if outside else "sigmoid") == "raw":
            return scores
        if outside:
            del self._tells[model.id]
            raise WrongAnswer("a score is not within 0 and 1, as those before were", check=Check.ENCODING)
        with np.errstate(divide="ignore"):
            logits: Numbers = np.clip(np.log(scores) - np.log1p(-scores), -LOGIT_MAX, LOGIT_MAX)
        return logits


def _outside(scores: Numbers) -> bool:
    """Whether one of them is no sigmoid."""
    return bool(((scores < 0.0) | (scores > 1.0)).any())


def _decoded(body: bytes) -> tuple[list[Result], Results | None]:
    """The results of a reply, and all of it if it is an object. Raises ValueError where it can be read in two ways."""
    answer = DECODE_RESULTS(body)
    told = None if isinstance(answer, list) else answer
    lists = (
        [answer] if isinstance(answer, list) else [each for each in (answer.results, answer.data) if each is not None]
    )
    if len(lists) != 1:
        raise ValueError("not one list of results")
    (results,) = lists
    must = 0 if told is None else 1 + (told.usage is not None) + (told.meta is not None)
    for each in results:
        must += (each.index is not None) + (each.relevance_score is not None) + (each.score is not None)
    if b"\\" in body or len(SCORE_NAMES(body)) != must:
        check_once_each(body, SCORE_FIELDS)
    return results, told


def _in_rows(results: list[Result], count: int) -> Numbers:
    """The scores in the order of the documents. Raises WrongAnswer."""
    if len(results) != count:
        raise WrongAnswer("the server answered with a wrong number of scores", check=Check.COUNT)
    scores = np.full(count, np.nan)
    taken: set[int] = set()
    for each in results:
        index = whole(each.index)
        if index is None or index >= count or index in taken:
            raise WrongAnswer("the server's indexes are not those of the documents, once each", check=Check.ORDER)
        taken.add(index)
        said = {each.relevance_score, each.score} - {None}
        if len(said) > 1:
            raise WrongAnswer("a document has two scores", check=Check.FORM)
        for score in said:
            scores[index] = score
    return scores


def _tokens(told: Results | None) -> int:
    """What the server counted; 0 where it does not say."""
    if told is None:
        return 0
    meta = told.meta if isinstance(told.meta, dict) else {}
    places = [
        (told.usage, "total_tokens"),
        (told.usage, "prompt_tokens"),
        (meta.get("tokens"), "input_tokens"),
        (meta.get("billed_units"), "input_tokens"),
    ]
    counts = (whole(place.get(name)) for place, name in places if isinstance(place, dict))
    return next((count for count in counts if count), 0)
