"""How many tokens the pairs of a rerank request are, and the ids that the node will score.

A pair is the query and a document, with the special tokens of a pair. The query is counted once, and charged with every
document. Texts are counted as far as the cut of their pair needs it, and as the caller can pay.
"""

from collections.abc import Generator
from itertools import repeat
from operator import add, floordiv

from embedmesh.flow.beginnings import Beginning, beginnings
from embedmesh.flow.count import SPECIALS_MAX, CanPay, CanPayFor
from embedmesh.flow.turns import Turns
from embedmesh.rules.embeddings import ID_BYTES, Counted, bytes_of
from embedmesh.rules.errors import ContextLengthExceeded, InvalidValue, MaxTokensPerRequest
from embedmesh.rules.limits import RERANK_TOKENS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Tokenizer
from embedmesh.rules.reranking import RerankCall, fit_pair, searches_of

QUERY = "query"
SOON_TOKENS_MAX = 64 * 1024  # of pairs that are made at once: a quarter of a megabyte of ids
COMPARED_TOKENS = 4_096  # of two texts that are read on to tell which is longer: some milliseconds


async def count_pairs(
    call: RerankCall,
    model: Model,
    tokenizer: Tokenizer | None,
    turns: Turns,
    account_id: str,
    can_pay_for: CanPayFor | None = None,
) -> Counted:
    """The pairs' ids and their number. Raises a CallerFailure that names the query or the document at fault.

    Without a tokenizer the bytes of both texts bound the tokens of a pair. Counting that may take longer than a
    millisecond is done off the event loop, in turns, and only as far as the caller can pay. `can_pay_for` is asked for
    searches where the model is paid by searches.
    """
    counted = _soon(call, model, tokenizer)
    if counted is not None:
        return counted
    can_pay = await can_pay_for(model) if can_pay_for is not None else None
    if can_pay is not None and model.search_price is not None:
        can_pay(searches_of(len(call.documents)))
        can_pay = None
    return await turns.run(account_id, _count(call, model, tokenizer, can_pay))


def _soon(call: RerankCall, model: Model, tokenizer: Tokenizer | None) -> Counted | None:
    """Count short texts whose pairs fit at once; None for anything else."""
    if tokenizer is None:
        return None
    packed = tokenizer.packed([call.query, *call.documents])
    if packed is None:
        return None
    query, *documents = packed
    sizes = list(map(floordiv, map(len, documents), repeat(ID_BYTES)))
    if call.keep is not None and max(sizes) > call.keep:
        return None
    lengths = list(map(add, sizes, repeat(len(query) // ID_BYTES + _specials(tokenizer))))
    if max(lengths) > model.max_tokens or sum(lengths) > SOON_TOKENS_MAX:
        return None
    return Counted(lengths, list(map(tokenizer.pair, repeat(query), documents)), call.documents, query=call.query)


def _count(
    call: RerankCall, model: Model, tokenizer: Tokenizer | None, can_pay: CanPay | None
) -> Generator[None, None, Counted]:
    """Yields every few milliseconds."""
    if tokenizer is None:
        yield
        return _bound(call, model, can_pay)
    counting = _PairCounting(call, model, tokenizer, can_pay)
    yield from counting.take()
    return counting.counted()


class _PairCounting:
    """The progress of counting one call's pairs."""

    def __init__(self, call: RerankCall, model: Model, tokenizer: Tokenizer, can_pay: CanPay | None) -> None:
        self._call = call
        self._model = model
        self._tokenizer = tokenizer
        self._can_pay = can_pay
        self._specials = _specials(tokenizer)
        self._room = model.max_tokens - self._specials
        self._compared = max(self._room, COMPARED_TOKENS)
        self._query = Beginning(call.query, self._room)
        self._ids: list[bytes] = []
        self._lengths: list[int] = []
        self._texts: list[str] = []
        self._queries: dict[int, str] = {}  # by how many of its tokens pairs have: what they stand for
        self._kept_of_query: list[int] = []  # by each pair
        self._truncated = 0
        self._tokens = 0

    def counted(self) -> Counted:
        queries = self._queries
        varying = None if len(queries) == 1 else [queries[kept] for kept in self._kept_of_query]
        query = queries[max(queries)]
        return Counted(self._lengths, self._ids, self._texts, self._truncated, query=query, queries=varying)

    def take(self) -> Generator[None, None, None]:
        """Count the query, and then pair by pair."""
        call, query, documents = self._call, self._query, self._call.documents
        _check(len(documents) * self._specials, self._can_pay)  # at least
        while query.wants_more:
            query.read_on(self._tokenizer, QUERY)
            yield
        if query.count > self._room:
            self._may_cut("The query has", query.count, exact=query.is_whole, name=QUERY)
        _check(len(documents) * (min(query.count, self._room) + self._specials), self._can_pay)
        query_ids = bytes_of(query.ids[: self._room])
        for index, document in enumerate(
            beginnings(self._tokenizer, documents, min(self._room, call.keep or self._room))
        ):
            name = f"documents.{index}"
            while document.wants_more:
                document.read_on(self._tokenizer, name)
                yield
            yield from self._compare(document, name)
            self._add(query_ids, document, name)
            yield

    def _compare(self, document: Beginning, name: str) -> Generator[None, None, None]:
        """Where both texts are longer than a pair may be, and its room is odd: read on until it is known which is
        longer, for that one has a token more. Of texts that are both very long it is the document: reading them to
        their ends would cost a thousand times what the pair does."""
        query, tokenizer = self._query, self._tokenizer
        if self._room % 2 == 0 or query.count <= self._room:
            return
        while not (query.is_whole and self._known(document)):
            if min(query.count, self._kept(document)) >= self._compared:
                return
            if query.is_whole and self._kept(document) >= query.count:
                return
            if self._known(document) and self._kept(document) < query.count:
                return
            behind, its_name = (document, name) if query.is_whole else (query, QUERY)
            if not self._known(document) and document.count < query.count:
                behind, its_name = document, name
            behind.read_on(tokenizer, its_name)
            yield

    def _kept(self, document: Beginning) -> int:
        """The document's tokens, as far as they were counted and the caller wants them kept."""
        return document.count if self._call.keep is None else min(document.count, self._call.keep)

    def _known(self, document: Beginning) -> bool:
        """Whether that is all of them."""
        return document.is_whole or (self._call.keep is not None and document.count >= self._call.keep)

    def _add(self, query_ids: bytes, document: Beginning, name: str) -> None:
        """Add the next pair."""
        query, kept = self._query, self._kept(document)
        compared = min(query.count, self._compared), min(kept, self._compared)
        of_query, of_document = fit_pair(*compared, self._room)
        if of_query + of_document < query.count + kept:
            tokens = query.count + kept
            self._may_cut("This document and the query have", tokens, exact=self._known(document), name=name)
        if of_query not in self._queries:
            cut_query = of_query < query.count
            self._queries[of_query] = query.clip(self._tokenizer, of_query) if cut_query else query.text
        self._kept_of_query.append(of_query)
        cut = of_document < document.count
        self._truncated += cut or of_query < query.count
        self._texts.append(document.clip(self._tokenizer, of_document) if cut else document.text)
        self._ids.append(self._tokenizer.pair(query_ids[: of_query * ID_BYTES], document.ids[:of_document]))
        self._lengths.append(of_query + of_document + self._specials)
        self._tokens += self._lengths[-1]
        _check(self._tokens, self._can_pay)

    def _may_cut(self, what: str, tokens: int, *, exact: bool, name: str) -> None:
        """Raise ContextLengthExceeded if pairs must not be cut."""
        if self._call.truncate == "none":
            raise ContextLengthExceeded(
                f"{what} {'' if exact else 'more than '}{tokens + self._specials:,} tokens; the model takes at most "
                f"{self._model.max_tokens:,}. Shorten it, or let `truncate` cut it.",
                param=name,
            )


def _bound(call: RerankCall, model: Model, can_pay: CanPay | None) -> Counted:
    """The bound for a model without a tokenizer here: a token is a byte at least, and a pair fits the model."""
    if call.keep is not None or call.truncate != "none":
        raise InvalidValue(
            "This model's tokens cannot be counted here, so its documents cannot be cut. Shorten them yourself.",
            param="truncate" if call.keep is None else "max_tokens_per_doc",
        )
    query = len(call.query.encode()) + SPECIALS_MAX
    lengths = [min(query + len(document.encode()), model.max_tokens) for document in call.documents]
    _check(sum(lengths), can_pay)
    return Counted(lengths, texts=call.documents, exact=False, query=call.query)


def _specials(tokenizer: Tokenizer) -> int:
    """Special tokens of a pair."""
    return tokenizer.specials + len(tokenizer.between)


def _check(tokens: int, can_pay: CanPay | None) -> None:
    """Raise a CallerFailure if a request cannot have that many tokens, or the caller cannot pay them."""
    if tokens > RERANK_TOKENS_MAX:
        raise MaxTokensPerRequest(
            f"All pairs together have more than {RERANK_TOKENS_MAX:,} tokens, the query counted with each document, "
            "which is what one request takes. Split it.",
            param="documents",
        )
    if can_pay is not None:
        can_pay(tokens)
