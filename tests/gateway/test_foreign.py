"""A server of another make over a real socket: what it says is checked, and put into our order and form."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.gateway.nodes.foreign import UpstreamLink
from embedmesh.gateway.nodes.traced import TracedServer
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import InvalidValue, NodeBroke, NodeBusy, NodeFailure, UpstreamRefused, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import GenerationRequest
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import RERANK, Model
from embedmesh.rules.traces import asking_as, traceparent_of
from embedmesh.upstream.server import UpstreamUrl, parse_url
from tests.flow.world import MODEL, vector_for

FOREIGN = Model(id="acme/foreign", width=4, max_tokens=100, price=1)
JUDGE = Model(id="acme/judge", width=1, max_tokens=100, price=1, modalities=RERANK)
CATALOGUE = Catalogue((MODEL, FOREIGN, JUDGE))
TEXTS = ["one", "zwei \u00e4", "\U0001f600 three"]
COUNTED = Counted(lengths=[3, 4, 5], ids=[[1], [2, 3], [4, 5, 6]], texts=TEXTS)
PART = Part("up", (0, 1, 2), 12, 0.1)
VECTORS = [vector_for([at]) for at in range(3)]

Asked = tuple[dict[str, str], dict[str, Any]]
Reply = tuple[int, bytes]


def floats(vectors: list[np.ndarray] = VECTORS, **more: Any) -> dict[str, Any]:
    """The usual reply, with numbers."""
    data = [{"object": "embedding", "index": at, "embedding": each.tolist()} for at, each in enumerate(vectors)]
    return {"object": "list", "data": data, "model": "theirs", "usage": {"prompt_tokens": 9, "total_tokens": 9}} | more


def as_base64(vectors: list[np.ndarray] = VECTORS) -> dict[str, Any]:
    reply = floats(vectors)
    for item, vector in zip(reply["data"], vectors, strict=True):
        item["embedding"] = base64.b64encode(vector.tobytes()).decode()
    return reply


def ok(reply: Any) -> Reply:
    return 200, json.dumps(reply).encode()


@asynccontextmanager
async def server(answer: Callable[[Asked], Reply]) -> AsyncIterator[tuple[int, list[Asked]]]:
    """A server on loopback that answers by rule, and what it was asked."""
    asked: list[Asked] = []
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                writer.close()
                return
            first, *lines = head.strip().split("\r\n")
            headers = {"": first} | {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            asked.append((headers, json.loads(body)))
            status, reply = answer(asked[-1])
            writer.write(
                f"HTTP/1.1 {status} X\r\nContent-Length: {len(reply)}\r\nRetry-After: 2\r\n\r\n".encode() + reply
            )

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], asked
    finally:
        listening.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)


def link(port: int, model: Model = MODEL, token: str = "", **offer: Any) -> UpstreamLink:
    offered = Offer(model.id, model.width, model.max_tokens, model.digest, model.tier, **offer)
    return UpstreamLink(UpstreamUrl(False, "127.0.0.1", port, "/v1"), (offered,), CATALOGUE, token)


def rows(reply: EmbedVectors) -> np.ndarray:
    return np.frombuffer(reply.data, "<f4").reshape(-1, 4)


@pytest.mark.parametrize("form", [floats, as_base64])
async def test_vectors_come_back_in_either_form(form: Callable[[], dict[str, Any]]) -> None:
    async with server(lambda asked: ok(form())) as (port, asked):
        reply = await link(port, token="sesame", name="theirs", prefix="p: ").embed(PART, MODEL, COUNTED, "req_1")
    assert np.array_equal(rows(reply), VECTORS)
    assert reply.tokens == 12, "we have counted: their count does not matter"
    headers, body = asked[0]
    assert headers[""] == "POST /v1/embeddings HTTP/1.1"
    assert headers["authorization"] == "Bearer sesame"
    assert headers["host"] == f"127.0.0.1:{port}"
    assert body == {"model": "theirs", "input": ["p: " + text for text in TEXTS], "encoding_format": "base64"}


async def test_a_part_asks_for_its_own_inputs_and_the_order_is_by_index() -> None:
    def answer(asked: Asked) -> Reply:
        reply = floats([vector_for([len(text)]) for text in asked[1]["input"]])
        reply["data"].reverse()
        return ok(reply)

    async with server(answer) as (port, asked):
        reply = await link(port).embed(Part("up", (2, 0), 8, 0.1), MODEL, COUNTED, "req_1")
    assert asked[0][1]["input"] == [TEXTS[2], TEXTS[0]]
    assert np.array_equal(rows(reply), [vector_for([len(TEXTS[2])]), vector_for([len(TEXTS[0])])])


async def test_a_server_that_does_not_know_base64_is_asked_without_and_remembered() -> None:
    async with server(lambda asked: (422, b"{}") if "encoding_format" in asked[1] else ok(floats())) as (port, asked):
        one = link(port)
        for _ in range(3):
            assert np.array_equal(rows(await one.embed(PART, MODEL, COUNTED, "req_1")), VECTORS)
    assert ["encoding_format" in body for _, body in asked] == [True, False, False, False]


async def test_one_that_knows_it_and_says_400_is_believed() -> None:
    replies = iter([ok(as_base64()), (400, b"{}")])
    async with server(lambda asked: next(replies)) as (port, asked):
        one = link(port)
        await one.embed(PART, MODEL, COUNTED, "req_1")
        with pytest.raises(UpstreamRefused):
            await one.embed(PART, MODEL, COUNTED, "req_1")
    assert len(asked) == 2


def changed(**member: Any) -> dict[str, Any]:
    reply = floats()
    reply["data"][1] |= member
    return reply


STATUSES = [(400, UpstreamRefused), (413, UpstreamRefused), (422, UpstreamRefused), (429, NodeBusy), (503, NodeBusy)]
STATUSES += [(401, NodeBroke), (403, NodeBroke), (404, NodeBroke), (500, NodeBroke), (302, NodeBroke)]
WRONG: list[tuple[Reply, type[NodeFailure]]] = [
    *(((status, b"{}"), failure) for status, failure in STATUSES),
    (ok([]), WrongAnswer),
    ((200, b"<html>"), WrongAnswer),
    ((200, b'{"data": [{"index": 0, "embedding": [NaN,1,2,3]}]}'), WrongAnswer),
    ((200, b"[" * 100_000), WrongAnswer),
    (ok(floats(VECTORS[:2])), WrongAnswer),
    (ok(floats([*VECTORS, VECTORS[0]])), WrongAnswer),
    (ok(changed(index=0)), WrongAnswer),
    (ok(changed(index=3)), WrongAnswer),
    (ok(changed(index=-1)), WrongAnswer),
    (ok(changed(index="one")), WrongAnswer),
    (ok(changed(embedding=None)), WrongAnswer),
    (ok(changed(embedding=[1.0, 2.0, 3.0])), WrongAnswer),
    (ok(changed(embedding=[1.0] * 5)), WrongAnswer),
    (ok(changed(embedding=["a"] * 4)), WrongAnswer),
    (ok(changed(embedding="AAAA")), WrongAnswer),
    (ok(changed(embedding=base64.b64encode(VECTORS[0].tobytes()).decode().rstrip("=") + "*")), WrongAnswer),
    (ok(changed(embedding=base64.b64encode(VECTORS[0].tobytes()).decode() + "\n")), WrongAnswer),
    (ok(changed(embedding=[1.0] * 100_000)), WrongAnswer),
]


@pytest.mark.parametrize(("reply", "failure"), WRONG)
async def test_what_is_not_a_right_reply_is_a_failure_of_the_server(reply: Reply, failure: type[NodeFailure]) -> None:
    async with server(lambda asked: reply) as (port, _):
        with pytest.raises(failure) as raised:
            await link(port).embed(PART, MODEL, COUNTED, "req_1")
    if isinstance(raised.value, NodeBusy):
        assert raised.value.retry_after_s == 2


USAGES = [({"prompt_tokens": 7}, 7), ({"prompt_tokens": 500}, 30), ({"prompt_tokens": 0}, 30), ({}, 30), (None, 30)]


@pytest.mark.parametrize(("usage", "tokens"), USAGES)
async def test_where_nobody_here_can_count_the_servers_usage_counts_within_our_bound(usage: Any, tokens: int) -> None:
    counted = Counted(lengths=[10, 10, 10], texts=TEXTS, exact=False)
    part = Part("up", (0, 1, 2), 30, 0.1)
    async with server(lambda asked: ok(floats(usage=usage))) as (port, _):
        assert (await link(port, FOREIGN).embed(part, FOREIGN, counted, "req_1")).tokens == tokens


async def test_vectors_of_a_model_that_normalizes_have_unit_length_whatever_the_server_does() -> None:
    async with server(lambda asked: ok(floats([7 * each for each in VECTORS]))) as (port, _):
        one = link(port)
        one._normalizing = {MODEL.id}
        assert np.allclose(rows(await one.embed(PART, MODEL, COUNTED, "req_1")), VECTORS, atol=1e-7)


async def test_a_vector_in_the_other_byte_order_is_not_scaled_into_one_that_looks_right() -> None:
    """Its components may all be finite and not zero: then only its length tells."""
    swapped = [np.array(each, ">f4") for each in VECTORS]
    async with server(lambda asked: ok(as_base64(swapped))) as (port, _):
        one = link(port)
        one._normalizing = {MODEL.id}
        with pytest.raises(WrongAnswer, match="longer than any model"):
            await one.embed(PART, MODEL, COUNTED, "req_1")


async def test_what_is_traced_is_told_in_the_head_and_nowhere_else() -> None:
    """Vectors and chat alike, whole or streamed, by the one place where requests are written."""
    async with server(lambda asked: ok(floats())) as (port, asked):
        offered = (Offer(MODEL.id, MODEL.width, MODEL.max_tokens, MODEL.digest, MODEL.tier),)
        url = UpstreamUrl(False, "127.0.0.1", port, "/v1")
        traced = UpstreamLink(url, offered, CATALOGUE, "", server=TracedServer)
        await traced.embed(PART, MODEL, COUNTED, "req_1")
        with asking_as("req_1", traceparent_of(1, 2)):
            await traced.embed(PART, MODEL, COUNTED, "req_1")
            await traced.generate(MODEL, GenerationRequest("chat", {"messages": []}, 10_000))
        traced.close()
    assert [headers.get("traceparent") for headers, _ in asked] == [None, *[traceparent_of(1, 2)] * 2]
    assert asked[0][1] == asked[1][1]


async def test_what_it_serves_is_what_the_operator_said() -> None:
    (served,) = (await link(1).served()).data
    assert (served.id, served.width, served.digest) == (MODEL.id, MODEL.width, MODEL.digest)
    with pytest.raises(NodeBroke):
        await link(1).embed(PART, FOREIGN, COUNTED, "req_1")


URLS = [
    ("http://10.0.0.7:8080", UpstreamUrl(False, "10.0.0.7", 8080, "/v1")),
    ("http://10.0.0.7:8080/", UpstreamUrl(False, "10.0.0.7", 8080, "/v1")),
    ("https://api.example", UpstreamUrl(True, "api.example", 443, "/v1")),
    ("https://api.example/openai/v1/", UpstreamUrl(True, "api.example", 443, "/openai/v1")),
    ("http://[::1]:99/x", UpstreamUrl(False, "::1", 99, "/x")),
]


@pytest.mark.parametrize(("url", "expected"), URLS)
def test_an_operators_address_is_understood(url: str, expected: UpstreamUrl) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ftp://x",
        "http://",
        "http://a@b",
        "http://x:0/",
        "http://x:99999",
        "http://x/?q",
        "http://x/#f",
        "http://x/ y",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidValue):
        parse_url(url)


def test_a_token_is_no_part_of_what_is_shown_of_a_record() -> None:
    assert "token" not in {field.name for field in msgspec.structs.fields(Offer)}


@pytest.mark.parametrize("model", [MODEL, JUDGE])
async def test_what_a_server_says_of_a_request_has_our_name_for_the_model(model: Model) -> None:
    """Theirs may be a path. Callers are told what it says."""
    said = b'{"error": {"message": "/srv/models/7 takes no such input"}}'
    counted = Counted(lengths=[3], texts=["one"], query="two")
    async with server(lambda asked: (400, said)) as (port, _):
        offer = Offer(model.id, model.width, model.max_tokens, model.digest, model.tier, name="/srv/models/7")
        one = UpstreamLink(parse_url(f"http://127.0.0.1:{port}"), (offer,), CATALOGUE, "")
        one._rerank._spoke = True
        with pytest.raises(UpstreamRefused) as raised:
            await one.embed(Part("up", (0,), 3, 0.1), model, counted, "req_1")
    assert raised.value.said == f"{model.id} takes no such input"
