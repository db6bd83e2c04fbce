"""Pairs are counted as they are scored: the query with each document, cut as CrossEncoder cuts, by true lengths."""

import json
import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from embedmesh.flow.count import SPECIALS_MAX, CanPayFor
from embedmesh.flow.count_pairs import count_pairs
from embedmesh.flow.means import Means
from embedmesh.flow.turns import Turns
from embedmesh.rules.embeddings import ENDS_FIRST, ID_BYTES, Counted, numbers_of
from embedmesh.rules.errors import Failure
from embedmesh.rules.limits import RERANK_TOKENS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.reranking import RerankCall, fit_pair
from tests.engine.test_rerankers import GOLDENS, NAMES, cut_pairs
from tests.flow.reranking import BY_SEARCHES, BY_TOKENS, FOREIGN, SPECIALS
from tests.flow.world import LetterTokenizer


class Piecewise(LetterTokenizer):
    """Looks at three letters at a time, never at once; knows how many it has seen."""

    def __init__(self, piece: int = 3) -> None:
        self.piece = piece
        self.chars = 0

    def packed(self, texts: Sequence[str]) -> list[bytes] | None:
        return None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        self.chars += sum(map(len, texts))
        return super().ids(texts)

    def next_cut(self, text: str, start: int) -> int | None:
        return min(len(text), start + self.piece)


LETTERS = LetterTokenizer()


async def counted(
    call: RerankCall, model: Model = BY_TOKENS, tokenizer: Any = LETTERS, can_pay_for: CanPayFor | None = None
) -> Counted:
    return await count_pairs(call, model, tokenizer, Turns(), "acct", can_pay_for)


def pair(query: str, document: str) -> list[int]:
    first, second = LetterTokenizer().ids([query, document])
    return [*first, ENDS_FIRST, *second]


COUNTED = [
    # query, documents, options, the texts of each pair, cut; the room of both texts is 17
    ("ab", ["c", "", "def"], {}, [("ab", "c"), ("ab", ""), ("ab", "def")], 0),
    ("ab", ["c" * 15], {}, [("ab", "c" * 15)], 0),
    ("ab", ["c" * 16, "d"], {}, [("ab", "c" * 15), ("ab", "d")], 1),
    ("a" * 12, ["c" * 12], {}, [("a" * 8, "c" * 9)], 1),
    ("a" * 13, ["c" * 12], {}, [("a" * 9, "c" * 8)], 1),
    ("a" * 90, ["c" * 91, "c" * 89, "c"], {}, [("a" * 8, "c" * 9), ("a" * 9, "c" * 8), ("a" * 16, "c")], 3),
    ("a" * 90, ["c" * 91], {"keep": 89}, [("a" * 9, "c" * 8)], 1),
    ("ab", ["cdefg", "cd"], {"keep": 3}, [("ab", "cde"), ("ab", "cd")], 1),
    ("ab", ["cdefg"], {"keep": 3, "truncate": "none"}, [("ab", "cde")], 1),
    ("ab", ["cdefg"], {"keep": 500}, [("ab", "cdefg")], 0),
]


@pytest.mark.parametrize("tokenizer", [LetterTokenizer(), Piecewise()])
@pytest.mark.parametrize(("query", "documents", "options", "pairs", "cut"), COUNTED)
async def test_pairs_are_those_really_scored(
    query: str,
    documents: list[str],
    options: dict[str, Any],
    pairs: list[tuple[str, str]],
    cut: int,
    tokenizer: LetterTokenizer,
) -> None:
    found = await counted(RerankCall("m", query, documents, **options), tokenizer=tokenizer)
    assert found.ids is not None and found.exact
    assert [numbers_of(ids) for ids in found.ids] == [pair(*each) for each in pairs]
    assert found.lengths == [len(first) + len(second) + SPECIALS for first, second in pairs]
    assert found.truncated == cut
    assert found.texts == [second for _, second in pairs]
    firsts = [first for first, _ in pairs]  # for other makes
    assert (found.query, found.queries) == (max(firsts, key=len), firsts if len(set(firsts)) > 1 else None)


@settings(max_examples=60, deadline=None)
@example(query=30, documents=[30, 31, 29, 8, 9], keep=None, max_tokens=20)
@example(query=30, documents=[31, 29], keep=30, max_tokens=20)
@given(
    query=st.integers(1, 40),
    documents=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    keep=st.none() | st.integers(1, 40),
    max_tokens=st.integers(6, 24),
)
async def test_any_pair_is_cut_by_its_true_lengths(
    query: int, documents: list[int], keep: int | None, max_tokens: int
) -> None:
    """Read piece by piece and as far as needed, each text is cut as if both had been read to their ends."""
    call = RerankCall("m", "q" * query, ["d" * each for each in documents], keep=keep)
    room = max_tokens - SPECIALS
    fits = [fit_pair(query, each if keep is None else min(each, keep), room) for each in documents]
    for tokenizer in (Piecewise(), Piecewise(7), LetterTokenizer()):
        found = await counted(call, msgspec.structs.replace(BY_TOKENS, max_tokens=max_tokens), tokenizer)
        assert found.ids is not None
        assert [numbers_of(ids) for ids in found.ids] == [pair("q" * first, "d" * second) for first, second in fits]
        assert found.lengths == [first + second + SPECIALS for first, second in fits]
        assert found.truncated == sum(
            (first, second) != (query, each) for (first, second), each in zip(fits, documents, strict=True)
        )
        firsts = ["q" * first for first, _ in fits]
        assert (found.query, found.queries) == (max(firsts), firsts if len(set(firsts)) > 1 else None)


REFUSED = [
    # query, documents, model, code, param
    ("ab", ["c", "d" * 16], BY_TOKENS, "context_length_exceeded", "documents.1"),
    ("ab", ["c", "d" * 90], BY_TOKENS, "context_length_exceeded", "documents.1"),
    ("a" * 18, ["c"], BY_TOKENS, "context_length_exceeded", "query"),
    ("a" * 17, ["c"], BY_TOKENS, "context_length_exceeded", "documents.0"),
]


@pytest.mark.parametrize("tokenizer", [LetterTokenizer(), Piecewise()])
@pytest.mark.parametrize(("query", "documents", "model", "code", "param"), REFUSED)
async def test_what_must_not_be_cut_is_refused_by_name(
    query: str, documents: list[str], model: Model, code: str, param: str, tokenizer: LetterTokenizer
) -> None:
    with pytest.raises(Failure) as refused:
        await counted(RerankCall("m", query, documents, truncate="none"), model, tokenizer)
    assert (refused.value.code, refused.value.param) == (code, param)


async def test_more_tokens_than_a_request_may_have_are_refused() -> None:
    """As many as 2,048 documents of 512 tokens are accepted."""
    wide = msgspec.structs.replace(BY_TOKENS, max_tokens=512)
    fits = ["d" * (512 - SPECIALS - 2)] * 2_048
    assert (await counted(RerankCall("m", "qu", fits), wide)).tokens == RERANK_TOKENS_MAX
    with pytest.raises(Failure) as refused:
        await counted(RerankCall("m", "qu", [*fits, ""]), wide)
    assert (refused.value.code, refused.value.param) == ("max_tokens_per_request", "documents")


async def test_a_text_that_cannot_be_cut_is_named() -> None:
    class Stuck(Piecewise):
        def next_cut(self, text: str, start: int) -> int | None:
            return None if "x" in text else super().next_cut(text, start)

    for query, documents, param in (("ax", ["b"], "query"), ("a", ["b", "xb"], "documents.1")):
        with pytest.raises(Failure) as refused:
            await counted(RerankCall("m", query, documents), tokenizer=Stuck())
        assert (refused.value.code, refused.value.param) == ("context_length_exceeded", param)


async def test_texts_are_counted_only_as_far_as_the_caller_can_pay() -> None:
    """By tokens as they come; by searches, whose number is known, before any."""

    async def means(model: Model) -> Any:
        price = 2_000_000_000 if model is BY_SEARCHES else 1_000_000
        return Means(300, price).check

    tokenizer = Piecewise(1_000)
    few = RerankCall("m", "abc", ["d" * 900] * 40)
    with pytest.raises(Failure) as refused:
        await counted(few, tokenizer=tokenizer, can_pay_for=means)
    assert refused.value.code == "insufficient_quota"
    assert 3 < tokenizer.chars < 20_000, "fifteen pairs of twenty tokens can be paid"
    tokenizer.chars = 0
    with pytest.raises(Failure) as refused:
        await counted(few, BY_SEARCHES, tokenizer, means)
    assert (refused.value.code, tokenizer.chars) == ("insufficient_quota", 0)


async def test_long_texts_are_counted_off_the_event_loop_and_no_further_than_needed() -> None:
    """A query of a megabyte is read to where it is cut, unless a document is as long and its order must be known."""
    threads: set[bool] = set()

    class Telling(Piecewise):
        def ids(self, texts: Sequence[str]) -> list[list[int]]:
            threads.add(threading.current_thread() is threading.main_thread())
            return super().ids(texts)

    tokenizer = Telling(1_000)
    await counted(RerankCall("m", "q" * 10**6, ["d", "e" * 10]), tokenizer=tokenizer)
    assert threads == {False} and tokenizer.chars < 5_000
    tokenizer.chars = 0
    await counted(RerankCall("m", "q" * 10**6, ["d" * 3_500]), tokenizer=tokenizer)
    assert 7_000 < tokenizer.chars < 10_000
    tokenizer.chars = 0
    even = msgspec.structs.replace(BY_TOKENS, max_tokens=21)
    await counted(RerankCall("m", "q" * 10**6, ["d" * 50_000]), even, tokenizer)
    assert tokenizer.chars < 5_000


async def test_two_very_long_texts_are_not_read_to_their_ends() -> None:
    """They cost the caller one pair; which is longer by a token is told for texts of 4,096 tokens, no further."""
    for query, document in (("a" * 40_000, "c" * 50_000), ("a" * 50_000, "c" * 40_000)):
        letters = Piecewise()
        found = await counted(RerankCall(BY_TOKENS.id, query, [document]), tokenizer=letters)
        assert found.ids is not None
        assert [numbers_of(each) for each in found.ids] == [pair("a" * 8, "c" * 9)]
        assert letters.chars < 2 * 4_096 + 200


async def test_without_a_tokenizer_bytes_bound_a_pair_and_so_does_the_model() -> None:
    found = await counted(RerankCall("m", "\u00e4b", ["c", "d" * 500], truncate="none"), FOREIGN, None)
    assert (found.query, found.texts, found.ids, found.exact) == ("\u00e4b", ["c", "d" * 500], None, False)
    assert found.lengths == [3 + 1 + SPECIALS_MAX, FOREIGN.max_tokens]
    for call, param in (
        (RerankCall("m", "a", ["b"], truncate="none", keep=3), "max_tokens_per_doc"),
        (RerankCall("m", "a", ["b"], truncate="end"), "truncate"),
    ):
        with pytest.raises(Failure) as refused:
            await counted(call, FOREIGN, None)
        assert refused.value.param == param, "nobody here can cut"


@pytest.mark.parametrize("name", NAMES)
async def test_with_a_models_own_tokenizer_pairs_are_those_of_crossencoder(name: str) -> None:
    """Golden pairs, and texts of many pieces, whichever is longer; what other makes get has no more tokens."""
    tokenizer, expected = cut_pairs(name)
    model = msgspec.structs.replace(BY_TOKENS, max_tokens=tokenizer.max_tokens)
    pairs: list[list[str]] = json.loads((GOLDENS / name / "pairs.json").read_text(encoding="utf-8"))
    long = " ".join(str(number) for number in range(2_000))
    for query, document in ((long, long + " more"), (long + " more", long), ("short one", long), (long, "")):
        pairs.append([query, document])
        one, other = tokenizer.ids([query, document])
        kept = fit_pair(len(one), len(other), model.max_tokens - tokenizer.specials - len(tokenizer.between))
        expected.append(tokenizer.pair(one[: kept[0]], other[: kept[1]]))
    for (query, document), ids in zip(pairs, expected, strict=True):
        found = await counted(RerankCall("m", query, [document]), model, tokenizer)
        assert found.ids is not None and list(found.ids) == [ids]
        assert found.lengths == [len(ids) // ID_BYTES + tokenizer.specials] and found.lengths[0] <= model.max_tokens
        assert found.texts is not None and found.query is not None
        assert sum(map(len, tokenizer.ids([found.query, found.texts[0]]))) <= found.lengths[0]
