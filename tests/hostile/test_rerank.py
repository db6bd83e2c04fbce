"""Whatever body asks for rerank: a call that keeps its promises, or a caller's failure; without money it is cheap."""

import json
import time
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.catalogue import Catalogue
from embedmesh.dialects import tei
from embedmesh.dialects.rerank import rerank_forms
from embedmesh.dialects.reranking import RerankPath
from embedmesh.engine.tokens import ModelTokenizer
from embedmesh.flow.count_pairs import count_pairs
from embedmesh.flow.paid import serve
from embedmesh.flow.rerank import Rerank
from embedmesh.rules.errors import CallerFailure, Failure
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, RERANK_DOCUMENTS_MAX
from tests.data import quick_or
from tests.engine.tiny import make_folder
from tests.flow.reranking import BY_TOKENS, SPECIALS, ranking_world
from tests.flow.world import MODEL, PENNY_KEY, LetterTokenizer, ScriptedWorld, undelivered
from tests.hostile.test_fuzz import MESSAGE_CHARS_MAX, dumped, values
from tests.hostile.test_refused_is_cheap import (
    DECODES_MAX,
    HELD_S_MAX,
    LISTS,
    TEXTS,
    TRIES_MAX,
    Stepped,
    decode_s,
    least,
)

CATALOGUE = Catalogue((MODEL, BY_TOKENS))
V1, V2, PLAIN = rerank_forms(lambda failure: "server_error")
WORLD = msgspec.structs.replace(ranking_world(), catalogue=CATALOGUE)

text = st.text(max_size=20)
documents = st.lists(st.one_of(text, st.builds(lambda each: {"text": each}, text)), min_size=1, max_size=6)
good = st.fixed_dictionaries(
    {"query": st.text(min_size=1, max_size=9)},
    optional={
        "documents": documents,
        "texts": st.lists(text, min_size=1, max_size=6),
        "model": st.sampled_from([BY_TOKENS.id, MODEL.id, None]),
        "top_n": st.integers(1, 9),
        "truncate": st.sampled_from([True, False, "none", "END"]),
        "max_tokens_per_doc": st.integers(1, 9),
        "raw_scores": st.booleans(),
        "return_documents": st.booleans(),
    },
)
NAMES = st.sampled_from([*V1.form.__struct_fields__, *tei.TeiRerank.__struct_fields__, "image", ""])
almost_good = st.builds(lambda whole, name, value: whole | {name: value}, good, NAMES, values)


async def check(body: bytes) -> None:
    """In every form: what comes out keeps its promises, and the only exception is a CallerFailure in its envelope."""
    for form in (V1, V2, tei.RERANK, RerankPath("texts", tei.RERANK, PLAIN)):
        try:
            asked = Rerank(form).parse(WORLD, RequestHead(), body)
            call, model = asked.call, asked.model
            counted = await count_pairs(call, model, LetterTokenizer(), WORLD.turns, "a")
        except CallerFailure as failure:
            assert 10 < len(failure.message) <= MESSAGE_CHARS_MAX
            told = json.loads(form.envelope(failure))
            assert failure.message in (told["error"], told.get("message"))
            continue
        assert model is BY_TOKENS and call.query and 1 <= len(call.documents) <= RERANK_DOCUMENTS_MAX
        assert all(type(each) is str for each in call.documents)
        assert len(counted.lengths) == len(call.documents) and max(counted.lengths) <= model.max_tokens
        assert min(counted.lengths) >= SPECIALS + 1


@settings(max_examples=quick_or(200, quick=60), deadline=None, derandomize=True)
@given(body=st.one_of(almost_good.map(dumped), good.map(dumped), values.map(dumped), st.binary(max_size=200)))
async def test_any_body_is_a_call_or_a_refusal(body: bytes) -> None:
    await check(body)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    body = dumped(draw(good))
    start = draw(st.integers(0, len(body)))
    end = draw(st.integers(start, min(len(body), start + 12)))
    return body[:start] + draw(st.one_of(st.binary(max_size=8), st.just(body[start:end] * 2))) + body[end:]


@settings(max_examples=quick_or(200, quick=60), deadline=None, derandomize=True)
@given(body=damaged())
async def test_a_right_request_with_a_piece_cut_out_or_repeated(body: bytes) -> None:
    await check(body)


async def test_what_is_very_large_or_deep_is_refused() -> None:
    for body in (
        b"[" * 3_000_000,
        b'{"documents":' * 300_000,
        b'{"query":"a","texts":' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"query":"a","documents":[' + b'{"text":"a"},' * 300_000 + b"{}]}",
        b'{"query":"a","documents":[{' + b'"a":1,' * 600_000 + b'"text":""}]}',
        b'{"query":"a","documents":["a"],"top_n":' + b"9" * 1_000_000 + b"}",
        b'{"' + b"x" * 4_000_000 + b'":1}',
    ):
        await check(body)


DOCUMENT = b'{"text":"' + b"w1 w2 " * 300 + b'"},'
FORMS = {  # what is before and behind that of which there is as much as a body may have
    "query": (b'{"texts":["a"],"query":"', b'"}'),
    "text": (b'{"query":"a","texts":["', b'"]}'),
    "list": (b'{"query":"a","documents":[', b'"a"]}'),
    "pairs": (b'{"query":"' + b"w1 " * 200_000 + b'","documents":[', b'"a"]}'),
}


def body_of(kind: str) -> bytes:
    """As large as a body may be, or a little smaller."""
    what, _, name = kind.partition(": ")
    before, after = FORMS[what]
    fill = TEXTS.get(name) or LISTS.get(name) or DOCUMENT
    room = REQUEST_BODY_BYTES_MAX - len(before) - len(after)
    return before + (fill * (room // len(fill)) or fill[:room]) + after


KINDS = [
    *(f"{what}: {name}" for what in ("query", "text") for name in ("marks", "random words", "spaces", "ideographs")),
    "text: half a pair",
    "text: added tokens",
    *(f"list: {name}" for name in ("ids", "short texts", "texts of 2 kB", "arrays", "objects", "nulls")),
    "list: right documents",
    "pairs: right documents",
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> ScriptedWorld:
    tokenizer = ModelTokenizer(make_folder(tmp_path_factory.mktemp("model") / "tiny"), BY_TOKENS.max_tokens)
    tokenizer.ids(["w1"])
    world = ranking_world()
    return msgspec.structs.replace(world, catalogue=CATALOGUE, tokenizers={BY_TOKENS.id: tokenizer})


async def refuse(world: ScriptedWorld, body: bytes) -> tuple[str, float, float]:
    """As in tests.hostile.test_refused_is_cheap."""

    async def receive(account_id: str) -> bytes:
        return body

    operation: Any = Rerank(RerankPath("texts", tei.RERANK, PLAIN))
    stepped = Stepped(serve(world, operation, RequestHead(f"Bearer {PENNY_KEY}"), receive, undelivered))
    begun = time.process_time()
    with pytest.raises(Failure) as refused:
        await stepped
    return refused.value.code, time.process_time() - begun, stepped.held_s


@pytest.mark.parametrize("kind", KINDS)
async def test_any_body_of_who_cannot_pay_is_refused_cheaply(world: ScriptedWorld, kind: str) -> None:
    """Of a key that has less than the request may cost: the body is parsed, and counted as far as it could pay."""
    body = body_of(kind)
    tries, decodes = [await refuse(world, body)], [decode_s()]
    while len(tries) < TRIES_MAX and not (
        least(tries, 1) <= DECODES_MAX * min(decodes) and least(tries, 2) <= HELD_S_MAX
    ):
        tries.append(await refuse(world, body))
        decodes.append(decode_s())
    assert least(tries, 1) <= DECODES_MAX * min(decodes), tries
    assert least(tries, 2) <= HELD_S_MAX
    assert world.ledger.log == [] and world.client.asked == []
