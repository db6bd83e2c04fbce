"""What other people's servers really send, over a real socket: taken where its meaning is plain, else refused by name.

Bodies and framings are tables. Each right one must give the same three vectors in order; each wrong one says which
check it failed.
"""

import asyncio
import base64
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.flow.verify import verify
from embedmesh.gateway.nodes.foreign import (
    REPLY_FIELDS,
    UpstreamEmbeddings,
    UpstreamLink,
    _check_unambiguous,
)
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1 import retry_after_s
from embedmesh.upstream.http1_reader import NODE_HEAD_BYTES_MAX
from embedmesh.upstream.server import UpstreamUrl
from tests.flow.world import MODEL
from tests.gateway.test_foreign import CATALOGUE, FOREIGN

COUNTED = Counted(lengths=[3, 4, 5], ids=[[1], [2, 3], [4, 5, 6]], texts=["one", "two", "three"])
PART = Part("up", (0, 1, 2), 12, 0.1)
VECTORS = [np.array(each, "<f4") for each in ([1, 2, 3, 4], [0.5, -0.25, 0, 1], [-1, 1e-3, 7, 0])]
LISTS = [each.tolist() for each in VECTORS]
BASE64 = [base64.b64encode(each.tobytes()).decode() for each in VECTORS]

DOUBLES = [base64.b64encode(each.astype("<f8").tobytes()).decode() for each in VECTORS]


def items(**more: Any) -> list[dict[str, Any]]:
    return [{"object": "embedding", "index": at, "embedding": each} | more for at, each in enumerate(LISTS)]


def usual(**more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 9, "total_tokens": 9}
    return {"object": "list", "data": items(), "model": "theirs", "usage": usage} | more


def without(name: str) -> dict[str, Any]:
    reply = usual()
    del reply[name]
    return reply


def indexed(*indexes: Any) -> dict[str, Any]:
    """Where each of the usual three says that it belongs."""
    return usual(data=[item | {"index": index} for item, index in zip(items(), indexes, strict=True)])


# -- bodies ------------------------------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (None, [], {}, 0, -1.5, "text", True)
USAGES: list[Any] = [
    *ODD,
    {"prompt_tokens": None, "total_tokens": None},
    {"prompt_tokens": 3.0, "total_tokens": 3.0},
    {"prompt_tokens": "3", "total_tokens": "3"},
    {"prompt_tokens": "many"},
    {"prompt_tokens": -1},
    {"prompt_tokens": True},
    {"prompt_tokens": 1e300},
    {"prompt_tokens": "9" * 5_000},
    {"prompt_tokens": {"text": 3}},
    {"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0, "prompt_tokens_details": None, "cost": 0.1},
]

SHAPES: dict[str, dict[str, Any]] = {
    # as their servers answer `POST /v1/embeddings`
    "OpenAI": usual(model="text-embedding-3-small"),
    "Azure": usual(model="ada") | {"id": "chatcmpl-1"},
    "TEI": usual(data=items(), model="BAAI/bge", usage={"prompt_tokens": 512, "total_tokens": 512}),
    "vLLM": usual(
        id="embd-3f", created=1764400000, usage={"prompt_tokens": 9, "total_tokens": 9, "completion_tokens": 0}
    ),
    "Infinity": usual(id="infinity-1b", created=1764400000, data=items(), usage={"prompt_tokens": 38}),
    "Ollama": {"object": "list", "data": items(), "model": "all-minilm", "usage": {"prompt_tokens": 9}},
    "llama.cpp": {"model": "m", "object": "list", "usage": {"prompt_tokens": 9, "total_tokens": 9}, "data": items()},
    "LocalAI": usual(created=1764400000, id="1f", usage={"prompt_tokens": 0, "completion_tokens": 0}),
    "LM Studio": usual(model="text-embedding-nomic", usage={"prompt_tokens": 0, "total_tokens": 0}),
    "Mistral": usual(id="a1", usage={"prompt_audio_seconds": None, "prompt_tokens": 9, "completion_tokens": 0}),
    "Voyage": {"object": "list", "data": items(), "model": "voyage-3", "usage": {"total_tokens": 9}},
    "Jina": usual(data=[item | {"truncated": None} for item in items()]),
}

RIGHT_BODIES: dict[str, str] = {
    **{make: json.dumps(shape) for make, shape in SHAPES.items()},
    **{f"usage {at}": json.dumps(usual(usage=usage)) for at, usage in enumerate(USAGES)},
    **{f"{name} missing": json.dumps(without(name)) for name in ("object", "model", "usage")},
    **{
        f"{name} is {odd!r}": json.dumps(usual(**{name: odd}))
        for name in ("object", "model", "id", "created", "error")
        for odd in ODD
    },
    **{f"object of items is {odd!r}": json.dumps(usual(data=items(object=odd))) for odd in ODD},
    "nothing but data": json.dumps({"data": [{"embedding": each} for each in LISTS]}),
    "members of others": json.dumps(
        usual(data=items(text="a text", tokens=[1, 2], data=[], usage={}), more={"data": 1})
    ),
    "a model called data": json.dumps(usual(model="data", id="embedding", system="index")),
    "escapes": json.dumps(usual(model='z\u00e4hl \u6570\u636e \U0001f600 " \\')),
    "not ASCII": json.dumps(usual(model="z\u00e4hl"), ensure_ascii=False),
    "no index": json.dumps(usual(data=[{"embedding": each} for each in LISTS])),
    "index null": json.dumps(indexed(None, None, None)),
    "index 0.0": json.dumps(indexed(0.0, 1.0, 2.0)),
    "index as texts": json.dumps(indexed("0", "1", "2")),
    "index of several kinds": json.dumps(indexed(0, "1", 2.0)),
    "backwards": json.dumps(usual(data=items()[::-1])),
    "any order": json.dumps(usual(data=[items()[at] for at in (1, 2, 0)])),
    "base64": json.dumps(usual(data=[{"index": at, "embedding": each} for at, each in enumerate(BASE64)])),
    "both forms": json.dumps(usual(data=[{"embedding": each} for each in (LISTS[0], BASE64[1], LISTS[2])])),
    "whole numbers": json.dumps(usual()).replace("1.0, 2.0, 3.0, 4.0", "1, 2, 3.0, 4e0"),
    "white space": "\r\n\t " + json.dumps(usual(), indent=4) + " \r\n\n",
    "byte order mark": "\ufeff" + json.dumps(usual()),
    "compact": json.dumps(usual(), separators=(",", ":")),
}

WHOLE = json.dumps(usual())
WRONG_BODIES: dict[str, tuple[str, Check]] = {
    # what can be read in two ways, or is no answer
    "data twice": (WHOLE[:-1] + ', "data": []}', Check.FORM),
    "the same data twice": (WHOLE[:-1] + f', "data": {json.dumps(items())}}}', Check.FORM),
    "data twice, one spelt otherwise": (
        WHOLE.replace('"data"', '"d\\u0061ta"')[:-1] + f', "data": {json.dumps(items())}}}',
        Check.FORM,
    ),
    "data twice, empty first": ('{"data": [], ' + WHOLE[1:], Check.FORM),
    "an embedding twice": (
        WHOLE.replace('"embedding": [1.0', '"embedding": [0.0, 0, 0, 1], "embedding": [1.0'),
        Check.FORM,
    ),
    "an embedding in place of its object": (
        WHOLE.replace('"object": "embedding", ', '"object": "x", "embedding": [0.0, 0, 0, 1], '),
        Check.FORM,
    ),
    "an index twice": (WHOLE.replace('"index": 1', '"index": 2, "index": 1'), Check.FORM),
    "usage twice": (WHOLE[:-1] + ', "usage": {"prompt_tokens": 1}}', Check.FORM),
    "index of a second, no index of others": (json.dumps(indexed(None, 1, None)), Check.ORDER),
    "index twice the same": (json.dumps(indexed(0, 0, 2)), Check.ORDER),
    "all the first": (json.dumps(indexed(0, 0, 0)), Check.ORDER),
    "from one on": (json.dumps(indexed(1, 2, 3)), Check.ORDER),
    "index below 0": (json.dumps(indexed(-1, 0, 1)), Check.ORDER),
    "half an index": (json.dumps(indexed(0, 0.5, 2)), Check.ORDER),
    "index true": (json.dumps(indexed(0, True, 2)), Check.FORM),
    "index a word": (json.dumps(indexed(0, "one", 2)), Check.ORDER),
    "index a list": (json.dumps(indexed(0, [1], 2)), Check.FORM),
    "a row missing": (json.dumps(usual(data=items()[:2])), Check.COUNT),
    "a row too many": (json.dumps(usual(data=[*items(), items()[0]])), Check.COUNT),
    "none": (json.dumps(usual(data=[])), Check.COUNT),
    "data null": (json.dumps(usual(data=None)), Check.FORM),
    "no data": (json.dumps({"object": "list"}), Check.FORM),
    "an error with a success": (json.dumps({"error": {"message": "no model is loaded"}}), Check.FORM),
    "the rows alone": (json.dumps(LISTS), Check.FORM),
    "rows by another name": (json.dumps({"embeddings": LISTS}), Check.FORM),
    "rows in rows": (json.dumps(usual(data=[{"embedding": [each]} for each in LISTS])), Check.FORM),
    "too narrow": (json.dumps(usual(data=[{"embedding": each[:3]} for each in LISTS])), Check.WIDTH),
    "too wide": (json.dumps(usual(data=[{"embedding": [*each, 1.0]} for each in LISTS])), Check.WIDTH),
    "float64 in base64": (json.dumps(usual(data=[{"embedding": each} for each in DOUBLES])), Check.WIDTH),
    "not base64": (json.dumps(usual(data=[{"embedding": each[:-1] + "*"} for each in BASE64])), Check.ENCODING),
    "too large for float32": (WHOLE.replace("1.0, 2.0", "1e300, 2.0"), Check.FINITE),
    "too large for a float": (WHOLE.replace("1.0, 2.0", "1" + "0" * 400 + ", 2.0"), Check.FORM),
    "all zeros": (WHOLE.replace("1.0, 2.0, 3.0, 4.0", "0, 0.0, -0.0, 0"), Check.ZERO),
    "a component true": (WHOLE.replace("1.0, 2.0", "true, 2.0"), Check.FORM),
    "a component null": (WHOLE.replace("1.0, 2.0", "null, 2.0"), Check.FORM),
    "a component a text": (WHOLE.replace("1.0, 2.0", '"1.0", 2.0'), Check.FORM),
    "a component NaN": (WHOLE.replace("1.0, 2.0", "NaN, 2.0"), Check.FORM),
    "a component Infinity": (WHOLE.replace("1.0, 2.0", "Infinity, 2.0"), Check.FORM),
    "half": (WHOLE[: len(WHOLE) // 2], Check.FORM),
    "two values": (WHOLE + WHOLE, Check.FORM),
    "empty": ("", Check.FORM),
    "a page": ("<html>maintenance</html>", Check.FORM),
    "events": ("data: " + WHOLE + "\n\n", Check.FORM),
    "deep": ('{"data": ' + "[" * 15_000, Check.FORM),
    "deep where nobody looks": (WHOLE[:-1] + ', "more": ' + "[" * 15_000, Check.FORM),
}  # fmt: skip


@asynccontextmanager
async def saying(*replies: bytes, close: bool = False) -> AsyncIterator[tuple[int, list[bytes]]]:
    """A server that answers by these bytes, the last for ever; and the heads of what it was asked."""
    asked: list[bytes] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                asked.append(head)
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                await reader.readexactly(int(length))
                writer.write(replies[min(len(asked), len(replies)) - 1])
                await writer.drain()
                if close:
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], asked
    finally:
        listening.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def http(body: bytes, head: str = "", status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body


def link(port: int, model: Model = MODEL) -> UpstreamLink:
    offer = Offer(model.id, model.width, model.max_tokens, model.digest, model.tier)
    return UpstreamLink(UpstreamUrl(False, "127.0.0.1", port, "/v1"), (offer,), CATALOGUE, "")


async def ask(port: int) -> EmbedVectors:
    async with asyncio.timeout(10):  # nothing here may hang
        reply = await link(port).embed(PART, MODEL, COUNTED, "req_1")
    verify(reply, MODEL, PART, True)
    return reply


def rows(reply: EmbedVectors) -> np.ndarray:
    return np.frombuffer(reply.data, "<f4").reshape(-1, 4)


@pytest.mark.parametrize("body", RIGHT_BODIES.values(), ids=RIGHT_BODIES)
async def test_what_is_not_needed_never_spoils_a_right_answer(body: str) -> None:
    async with saying(http(body.encode())) as (port, _):
        reply = await ask(port)
    assert np.array_equal(rows(reply), VECTORS)
    assert reply.tokens == 12, "we have counted: their count does not matter"


@pytest.mark.parametrize(("body", "check"), WRONG_BODIES.values(), ids=WRONG_BODIES)
async def test_what_is_ambiguous_or_no_answer_is_refused_by_the_check_it_fails(body: str, check: Check) -> None:
    async with saying(http(body.encode())) as (port, _):
        with pytest.raises(WrongAnswer) as raised:
            await ask(port)
    assert raised.value.check is check


WORDS = st.sampled_from(["data", "embedding", "index", "usage", "object", "x"])
PAIRS = st.lists(
    st.one_of(
        st.tuples(st.just("embedding"), st.just([1.0, 2.0, 3.0, 4.0])),
        st.tuples(st.just("index"), st.sampled_from([0, 1, 0.0, "1", None])),
        st.tuples(st.sampled_from(["object", "x", "usage"]), WORDS),
    ),
    max_size=5,
)
MORE = st.lists(st.tuples(st.sampled_from(["usage", "model", "object", "x", "index"]), WORDS), max_size=4)


def spelt(pairs: list[tuple[str, Any]]) -> str:
    """A JSON object with these members, also the same twice; a value that is a tuple is spelt already."""
    values = [value[0] if isinstance(value, tuple) else json.dumps(value) for _, value in pairs]
    return "{" + ", ".join(f"{json.dumps(name)}: {value}" for (name, _), value in zip(pairs, values, strict=True)) + "}"


@given(several=st.lists(PAIRS, max_size=3), more=MORE, twice=st.booleans())
def test_a_member_that_stands_twice_is_found_wherever_its_name_stands_else(
    several: list[list[tuple[str, Any]]], more: list[tuple[str, Any]], twice: bool
) -> None:
    """The quick way to see it is never fooled, and never sees what is not there."""
    data = ("[" + ", ".join(spelt([("embedding", LISTS[0]), *pairs]) for pairs in several) + "]",)
    top: list[tuple[str, Any]] = [("data", data), *more, *([("data", data)] if twice else [])]
    body = spelt(top).encode()
    objects = [[name for name, _ in top], *(["embedding", *(name for name, _ in pairs)] for pairs in several)]
    ambiguous = any(names.count(name) > 1 for names in objects for name in REPLY_FIELDS)
    answer = msgspec.json.decode(body, type=UpstreamEmbeddings)
    with pytest.raises(ValueError, match="twice") if ambiguous else nullcontext():
        _check_unambiguous(body, answer)


TOKENS = [
    ({"prompt_tokens": 3.0}, 3),
    ({"prompt_tokens": "3"}, 3),
    ({"total_tokens": 3}, 3),
    ({"prompt_tokens": 3.5}, 30),
]
TOKENS += [
    ({"prompt_tokens": None, "total_tokens": "3"}, 3),
    ({"prompt_tokens": -3}, 30),
    ({"prompt_tokens": True}, 30),
]
TOKENS += [({"prompt_tokens": 1e300}, 30), ({"prompt_tokens": "9" * 5_000}, 30), ({"prompt_tokens": "three"}, 30)]


@pytest.mark.parametrize(("usage", "tokens"), TOKENS)
async def test_where_their_count_is_needed_it_is_read_in_any_plain_form(usage: dict[str, Any], tokens: int) -> None:
    """Else our bound stands: nothing odd makes a request dearer than that, or free."""
    counted = Counted(lengths=[10, 10, 10], texts=["one", "two", "three"], exact=False)
    async with saying(http(json.dumps(usual(usage=usage)).encode())) as (port, _):
        reply = await link(port, FOREIGN).embed(Part("up", (0, 1, 2), 30, 0.1), FOREIGN, counted, "req_1")
    assert reply.tokens == tokens


# -- framing -----------------------------------------------------------------------------------------------------------

BODY = WHOLE.encode()
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = b"%x\r\n%b\r\n%x;part=2\r\n%b\r\n0\r\n" % (100, BODY[:100], len(BODY) - 100, BODY[100:])

RIGHT_REPLIES: dict[str, bytes] = {
    "content type with charset": http(BODY, "Content-Type: application/json; charset=utf-8\r\n"),
    "text/json": http(BODY, "Content-Type: text/json\r\n"),
    "text/plain": http(BODY, "Content-Type: text/plain\r\n"),
    "no content type": http(BODY),
    "identity said": http(BODY, "Content-Encoding: identity\r\n"),
    "201": http(BODY, status="201 Created"),
    "203": http(BODY, status="203 Non-Authoritative Information"),
    "no reason": http(BODY, status="200"),
    "chunked": OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED + b"\r\n",
    "odd-cased names": OK + b"TRANSFER-encoding: Chunked\r\n\r\n" + CHUNKED + b"\r\n",
    "trailers": OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED + b"X-Sum: 1\r\nContent-Encoding: gzip\r\n\r\n",
    "lower-case names": OK + b"content-length:%d\r\nserver:x\r\n\r\n" % len(BODY) + BODY,
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n" + http(BODY),
    "early hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\nContent-Encoding: gzip\r\n\r\n" * 3 + http(BODY),
    "closes after each": http(BODY, "Connection: close\r\n"),
    "keeps alive for a while": http(BODY, "Connection: Keep-Alive\r\nKeep-Alive: timeout=5, max=100\r\n"),
    "offers another protocol": http(BODY, "Connection: Upgrade\r\nUpgrade: h2c\r\n"),
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "many headers": http(BODY, "".join(f"X-{at}: {at}\r\n" for at in range(200))),
    "empty and odd values": http(BODY, "X-Empty:\r\nX-Latin: \xe4\r\nSet-Cookie: a=1\r\nSet-Cookie: b=2\r\n"),
    "a line before and after": b"\r\n" + http(BODY) + b"\r\n",
}
ENDED_BY_CLOSING: dict[str, bytes] = {
    "no length": OK + b"\r\n" + BODY,
    "no length, closing announced": OK + b"Connection: close\r\n\r\n" + BODY,
    "HTTP/1.0 without length": b"HTTP/1.0 200 OK\r\nServer: old\r\n\r\n" + BODY,
    "no length after an interim reply": b"HTTP/1.1 100 Continue\r\nContent-Length: 0\r\n\r\n" + OK + b"\r\n" + BODY,
}
WRONG_REPLIES: dict[str, tuple[bytes, Check]] = {
    "length twice": (OK + b"Content-Length: %d\r\n" % len(BODY) * 2 + b"\r\n" + BODY, Check.HTTP),
    "two lengths": (http(BODY, "Content-Length: 5\r\n"), Check.HTTP),
    "lengths in one": (OK + b"Content-Length: 5, 5\r\n\r\n12345", Check.HTTP),
    "length and chunks": (http(BODY, "Transfer-Encoding: chunked\r\n"), Check.HTTP),
    "folded header": (http(BODY, "X-Long: a\r\n b\r\n"), Check.HTTP),
    "blank before the colon": (OK + b"Content-Length : 5\r\n\r\n12345", Check.HTTP),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n", Check.HTTP),
    "HTTP/2": (b"HTTP/2 200 OK\r\nContent-Length: 0\r\n\r\n", Check.HTTP),
    "another protocol": (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nx", Check.HTTP),
    "a head without end": (OK + b"X-Long: " + b"x" * 2 * NODE_HEAD_BYTES_MAX, Check.HTTP),
    "a head that is too long": (http(BODY, f"X-Long: {'x' * NODE_HEAD_BYTES_MAX}\r\n"), Check.HTTP),
    "interim replies without end": (b"HTTP/1.1 102 Processing\r\nX: y\r\n\r\n" * 2_000, Check.HTTP),
    "too large": (http(b" " * 200_000 + BODY), Check.HTTP),
    "gzip, unasked": (http(gzip.compress(BODY), "Content-Encoding: gzip\r\n"), Check.FORM),
    "202": (http(BODY, status="202 Accepted"), Check.STATUS_OTHER),
    "204": (OK.replace(b"200 OK", b"204 No Content") + b"\r\n", Check.STATUS_OTHER),
    "206": (http(BODY, status="206 Partial Content"), Check.STATUS_OTHER),
    "302": (http(b"", "Location: /x\r\n", "302 Found"), Check.STATUS_OTHER),
    "304": (OK.replace(b"200 OK", b"304 Not Modified") + b"Content-Length: 5\r\n\r\n", Check.STATUS_OTHER),
    "400": (http(BODY, status="400 Bad Request"), Check.STATUS_4XX),
    "401": (http(BODY, status="401 Unauthorized"), Check.ACCESS),
    "403": (http(BODY, status="403 Forbidden"), Check.ACCESS),
    "404": (http(BODY, status="404 Not Found"), Check.STATUS_4XX),
    "408": (http(BODY, status="408 Request Timeout"), Check.BUSY),
    "413": (http(BODY, status="413 Content Too Large"), Check.STATUS_4XX),
    "429": (http(BODY, status="429 Too Many Requests"), Check.BUSY),
    "500": (http(BODY, status="500 Internal Server Error"), Check.STATUS_5XX),
    "503": (http(BODY, status="503 Service Unavailable"), Check.BUSY),
    "599": (http(BODY, status="599 X"), Check.STATUS_5XX),
}
CUT: dict[str, bytes] = {
    "nothing": b"",
    "half a head": OK[:10],
    "half a body": http(BODY)[:-100],
    "half of the chunks": (OK + b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED)[:-100],
    "half a body that closing ends": (OK + b"\r\n" + BODY)[:-100],
    "nothing but an interim reply": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("reply", RIGHT_REPLIES.values(), ids=RIGHT_REPLIES)
async def test_any_reply_that_http_allows_is_read_and_the_next_one_too(reply: bytes) -> None:
    """And again: what one reply leaves behind on its connection does not spoil the next."""
    async with saying(reply) as (port, asked):
        one = link(port)
        for _ in range(3):
            async with asyncio.timeout(10):
                assert np.array_equal(rows(await one.embed(PART, MODEL, COUNTED, "req_1")), VECTORS)
        one.close()
    assert len(asked) == 3
    assert b"\r\nAccept-Encoding: identity\r\n" in asked[0]


@pytest.mark.parametrize("reply", [*ENDED_BY_CLOSING.values(), http(BODY)], ids=[*ENDED_BY_CLOSING, "silently closed"])
async def test_a_reply_may_end_with_its_connection(reply: bytes) -> None:
    async with saying(reply, close=True) as (port, _):
        one = link(port)
        for _ in range(2):
            async with asyncio.timeout(10):
                assert np.array_equal(rows(await one.embed(PART, MODEL, COUNTED, "req_1")), VECTORS)


@pytest.mark.parametrize(("reply", "check"), WRONG_REPLIES.values(), ids=WRONG_REPLIES)
async def test_what_is_no_reply_says_which_check_it_failed(reply: bytes, check: Check) -> None:
    async with saying(reply) as (port, _):
        with pytest.raises(NodeFailure) as raised:
            await ask(port)
    assert raised.value.check is check


@pytest.mark.parametrize("reply", CUT.values(), ids=CUT)
async def test_a_connection_that_breaks_is_no_wrong_answer(reply: bytes) -> None:
    """A server that dies in the middle of many replies must not look like one that lies."""
    async with saying(reply, close=True) as (port, _):
        with pytest.raises(NodeFailure) as raised:
            await ask(port)
    assert raised.value.check is Check.CLOSED


async def test_nobody_there_is_told_as_that() -> None:
    async with saying(b"") as (port, _):
        pass
    with pytest.raises(NodeFailure) as raised:
        await ask(port)
    assert raised.value.check is Check.CONNECT


NOW = b"Sun, 29 Nov 2026 10:00:00 GMT"
WAITS: list[tuple[dict[bytes, bytes], float]] = [
    ({}, 0.0),
    ({b"retry-after": b"7"}, 7.0),
    ({b"retry-after": b"1.5"}, 1.5),
    ({b"retry-after": b"-3"}, 0.0),
    ({b"retry-after": b"nan"}, 0.0),
    ({b"retry-after": b"soon"}, 0.0),
    ({b"retry-after": b"\xff"}, 0.0),
    ({b"retry-after": b"7", b"retry-after-ms": b"250"}, 0.25),
    ({b"retry-after": b"7", b"retry-after-ms": b"x"}, 0.0),
    ({b"retry-after": b"Sun, 29 Nov 2026 10:00:20 GMT", b"date": NOW}, 20.0),
    ({b"retry-after": b"Sun, 29 Nov 2026 09:00:00 GMT", b"date": NOW}, 0.0),
    ({b"retry-after": b"Sun, 29 Nov 2026 10:00:20 GMT"}, 0.0),
    ({b"retry-after": b"Sun, 29 Nov 2026 10:00:20", b"date": NOW}, 0.0),
    ({b"retry-after": b"Sun, 99 Nov 2026 10:00:20 GMT", b"date": NOW}, 0.0),
]


@pytest.mark.parametrize(("headers", "wait_s"), WAITS)
def test_when_a_server_wants_to_be_asked_again_is_read_in_any_form(headers: dict[bytes, bytes], wait_s: float) -> None:
    assert retry_after_s(headers) == wait_s


async def test_any_refusal_may_say_when_to_come_again() -> None:
    for status in ("401 Unauthorized", "422 Unprocessable", "429 Too Many Requests", "500 Internal Server Error"):
        async with saying(http(b"{}", "Retry-After: 20\r\n", status)) as (port, _):
            with pytest.raises(NodeFailure) as raised:
                await ask(port)
        assert raised.value.retry_after_s == 20.0


async def test_one_that_no_longer_knows_base64_is_asked_without_in_time() -> None:
    """A server behind the same address may be another one tomorrow."""
    refused = http(b"{}", status="400 Bad Request")
    async with saying(http(BODY), refused, refused, http(BODY)) as (port, asked):
        one = link(port)
        await one.embed(PART, MODEL, COUNTED, "req_1")
        with pytest.raises(NodeFailure):
            await one.embed(PART, MODEL, COUNTED, "req_1")
        assert np.array_equal(rows(await one.embed(PART, MODEL, COUNTED, "req_1")), VECTORS)
    assert len(asked) == 4
