"""What is counted is what is embedded: prompts, cuts and special tokens included; ids are never guessed."""

from collections.abc import Sequence

import msgspec
import pytest

from embedmesh.flow.count import SPECIALS_MAX, count, count_now
from embedmesh.flow.turns import Turns
from embedmesh.rules.embeddings import Call
from embedmesh.rules.errors import Failure
from embedmesh.rules.limits import REQUEST_TOKENS_MAX
from embedmesh.rules.models import Model
from tests.flow.world import MODEL, NATIVE, LetterTokenizer, Shift3

TOKENIZER = LetterTokenizer()


def letters(text: str) -> list[int]:
    return TOKENIZER.ids([text])[0]


COUNTED = [
    # call, model, ids, tokens, truncated
    (Call("m", texts=["abc"]), MODEL, [letters("abc")], 5, 0),
    (Call("m", texts=["a", "bc"]), MODEL, [letters("a"), letters("bc")], 7, 0),
    (Call("m", texts=["abcdef"]), MODEL, [letters("abcdef")], 8, 0),
    (Call("m", texts=["abcdefg"], truncate="end"), MODEL, [letters("abcdef")], 8, 1),
    (Call("m", texts=["abcdefg"], truncate="start"), MODEL, [letters("bcdefg")], 8, 1),
    (Call("m", texts=["a", "abcdefgh"], truncate="end"), MODEL, [letters("a"), letters("abcdef")], 11, 1),
    (Call("m", texts=["abc"], role="query"), MODEL, [letters("q: abc")], 8, 0),
    (Call("m", texts=["abcd"], role="query", truncate="end"), MODEL, [letters("q: abc")], 8, 1),
    (Call("m", texts=["abcd"], role="query", truncate="start"), MODEL, [letters("q: bcd")], 8, 1),
    (Call("m", texts=["abc"], role="document"), MODEL, [letters("abc")], 5, 0),
    (Call("m", texts=["abc", "abcdef"], truncate="end", keep=5), MODEL, [letters("abc"), letters("abc")], 10, 1),
    (Call("m", texts=["abcdef"], truncate="start", keep=4), MODEL, [letters("ef")], 4, 1),
    (Call("m", texts=["abcdefgh"], truncate="end", keep=8), MODEL, [letters("abcdef")], 8, 1),
    (Call("m", texts=["abc"], role="query", truncate="end", keep=6), MODEL, [letters("q: a")], 6, 1),
    (Call("m", texts=["abc"], role="query", truncate="start", keep=6), MODEL, [letters("q: c")], 6, 1),
    (Call("m", ids=[[1, 2, 3]], truncate="end", keep=3), NATIVE, [[1]], 3, 1),
    (Call("m", ids=[[3, 4]]), MODEL, [letters("ab")], 4, 0),
    (Call("m", ids=[[3, 4], [5]]), MODEL, [letters("ab"), letters("c")], 7, 0),
    (Call("m", ids=[[3, 4]], role="query"), MODEL, [letters("q: ab")], 7, 0),
    (Call("m", ids=[[3, 4]]), NATIVE, [[3, 4]], 4, 0),
    (Call("m", ids=[list(range(1, 9))], truncate="end"), NATIVE, [[1, 2, 3, 4, 5, 6]], 8, 1),
]


@pytest.mark.parametrize(("call", "model", "ids", "tokens", "truncated"), COUNTED)
def test_tokens_are_those_really_embedded(
    call: Call, model: Model, ids: list[list[int]], tokens: int, truncated: int
) -> None:
    counted = count_now(call, model, TOKENIZER, Shift3())
    assert (counted.ids, counted.tokens, counted.truncated) == (ids, tokens, truncated)
    if counted.texts is not None:
        assert TOKENIZER.ids(counted.texts) == ids, "who takes texts gets the same inputs"


REFUSED = [
    # call, model, decoder, code, param
    (Call("m", texts=["abcdefg"], single=True), MODEL, None, "context_length_exceeded", "input"),
    (Call("m", texts=["a", "abcdefg"]), MODEL, None, "context_length_exceeded", "input.1"),
    (Call("m", ids=[[1, 2, 3, 4, 5, 6, 7]], single=True), NATIVE, None, "context_length_exceeded", "input"),
    (Call("m", ids=[[3, 4]], single=True), MODEL, None, "invalid_value", "input"),
    (Call("m", ids=[[3], [3, 31]]), MODEL, Shift3(), "invalid_value", "input.1"),
    (Call("m", ids=[[1], [2, 32]]), NATIVE, None, "invalid_value", "input.1"),
    (Call("m", ids=[[31]], single=True), NATIVE, None, "invalid_value", "input"),
    (Call("m", ids=[[0]]), NATIVE, None, "invalid_value", "input.0"),
    (Call("m", texts=["a"], truncate="end", keep=2), MODEL, None, "invalid_value", "truncate_prompt_tokens"),
    (
        Call("m", texts=["a"], role="query", truncate="start", keep=5),
        MODEL,
        None,
        "invalid_value",
        "truncate_prompt_tokens",
    ),
]


@pytest.mark.parametrize(("call", "model", "decoder", "code", "param"), REFUSED)
def test_what_cannot_be_embedded_is_refused_by_name(
    call: Call, model: Model, decoder: Shift3 | None, code: str, param: str
) -> None:
    with pytest.raises(Failure) as refused:
        count_now(call, model, TOKENIZER, decoder)
    assert (refused.value.code, refused.value.param) == (code, param)


def test_more_than_300_000_tokens_in_all_are_refused() -> None:
    """300,000 are accepted, one input more is not."""
    fits = REQUEST_TOKENS_MAX // 150
    wide = LetterTokenizer()
    roomy = type(MODEL)(id="w", folder="/", width=4, max_tokens=150, price=1, digest="")
    text = "a" * 148
    assert count_now(Call("m", texts=[text] * fits), roomy, wide, None).tokens == REQUEST_TOKENS_MAX
    with pytest.raises(Failure) as refused:
        count_now(Call("m", texts=[text] * fits + ["a"]), roomy, wide, None)
    assert (refused.value.code, refused.value.param) == ("max_tokens_per_request", "input")


async def test_long_texts_are_counted_off_the_event_loop() -> None:
    """A megabyte of text must not stop the loop; the answer is the same as on it."""
    import threading

    seen: set[bool] = set()

    class Telling(LetterTokenizer):
        def ids(self, texts: Sequence[str]) -> list[list[int]]:
            seen.add(threading.current_thread() is threading.main_thread())
            return super().ids(texts)

    call = Call("m", texts=["a" * 100_000], truncate="end")
    assert (await count(call, MODEL, Telling(), None, Turns(), "acct")).tokens == 8
    assert seen == {False}
    seen.clear()
    await count(Call("m", texts=["a"]), MODEL, Telling(), None, Turns(), "acct")
    assert seen == {True}


FOREIGN = Model(id="acme/foreign", width=4, max_tokens=8, price=1, prompts={"query": "q: "})


async def test_without_a_tokenizer_bytes_bound_the_tokens_and_texts_are_what_is_sent() -> None:
    counted = await count(Call("m", texts=["abc", "\u00e4"], role="query"), FOREIGN, None, None, Turns(), "acct")
    assert (counted.texts, counted.ids, counted.exact) == (["q: abc", "q: \u00e4"], None, False)
    assert counted.lengths == [6 + SPECIALS_MAX, 5 + SPECIALS_MAX]


@pytest.mark.parametrize(
    ("call", "param"), [(Call("m", texts=["abc"], truncate="end"), "truncate"), (Call("m", ids=[[3]]), "input")]
)
def test_without_a_tokenizer_nothing_is_cut_and_no_id_is_guessed(call: Call, param: str) -> None:
    with pytest.raises(Failure) as refused:
        count_now(call, msgspec.structs.replace(FOREIGN, token_ids="native"), None, None)
    assert refused.value.param == param
