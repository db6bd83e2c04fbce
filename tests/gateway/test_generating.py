"""Chat, completions and images of a server of another make, over real sockets: a node that speaks, right or wrong."""

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from bench.faultnode import speech
from bench.faultnode.recorded import RECORDED, Recorded
from bench.faultnode.speaking import SpeakingNode, speaking
from bench.faultnode.speech import CALLS, text
from bench.faultnode.speech_acts import Order
from bench.faultnode.speech_modes import SPEECH_MODES
from embedmesh.catalogue import Catalogue
from embedmesh.gateway.nodes.foreign import UpstreamLink
from embedmesh.gateway.nodes.links import NodeClients
from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import (
    NodeBroke,
    NodeBusy,
    NodeFailure,
    NodeRefused,
    NodeUnreachable,
    NotAsAsked,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import Generating, GenerationRequest, NodeStream
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.generating import UpstreamStream
from embedmesh.upstream.pools import tcp_pool, unix_pool
from embedmesh.upstream.refusals import SAID_CHARS_MAX, failure_in, failure_of
from embedmesh.upstream.server import UpstreamUrl

CHAT = Model(id="acme/chat", width=0, max_tokens=4096, price=1, modalities=("chat", "completions", "images"))
PART = Part("up", (), 100, 1.0)
SOON_S = 5.0
LIMIT = 4 * 1024 * 1024


def asked(modality: Generating = "chat", limit: int = LIMIT, *, stream: bool = False, **more: Any) -> GenerationRequest:
    bodies: dict[Generating, dict[str, Any]] = {
        "chat": {"messages": [{"role": "user", "content": "Gr\u00fc\u00dfe \U0001f600"}]},
        "completions": {"prompt": "Once"},
        "images": {"prompt": "A cat"},
    }
    return GenerationRequest(modality, bodies[modality] | more, limit, stream)


def link_to(port: int, name: str = "theirs", token: str = "") -> UpstreamLink:
    offer = Offer(CHAT.id, CHAT.width, CHAT.max_tokens, CHAT.digest, CHAT.tier, name=name)
    return UpstreamLink(UpstreamUrl(False, "127.0.0.1", port, "/v1"), (offer,), Catalogue((CHAT,)), token)


@asynccontextmanager
async def pair(mode: str = "honest", **more: Any) -> AsyncIterator[tuple[SpeakingNode, NodeClients]]:
    """A node that speaks in that mode, and a gateway's clients, which know it."""
    async with speaking(Order(mode, **more)) as (node, port):
        clients = NodeClients()
        clients.add("up", link_to(port))
        try:
            yield node, clients
        finally:
            clients.close()


async def streamed(clients: NodeClients, question: GenerationRequest | None = None) -> NodeStream:
    async with asyncio.timeout(SOON_S):
        return await clients.stream(PART, CHAT, question or asked(stream=True), "req_1")


async def events_of(stream: NodeStream) -> list[Any]:
    """All of them, read as JSON."""
    found = []
    async with asyncio.timeout(SOON_S):
        while (event := await stream.next()) is not None:
            found.append(json.loads(event))
    return found


async def generated(clients: NodeClients, question: GenerationRequest | None = None) -> Any:
    async with asyncio.timeout(SOON_S):
        return json.loads(await clients.generate(PART, CHAT, question or asked(), "req_1"))


def said(events: list[Any], index: int = 0) -> str:
    """The text of one choice."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


# -- right answers, however they are written ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [name for name, mode in SPEECH_MODES.items() if mode.odd])
@pytest.mark.parametrize("modality", ["chat", "completions"])
async def test_a_right_stream_is_the_same_however_it_is_written(modality: Generating, mode: str) -> None:
    """Twice over, so that the connection's second use is seen, too."""
    async with pair(mode, pace_s=0.000_1) as (node, clients):
        for _ in range(2):
            stream = await streamed(clients, asked(modality, stream=True, n=2))
            events = await events_of(stream)
            assert said(events, 0) == said(events, 1) == text(speech.TOKENS)
            told = [event["usage"] for event in events if "usage" in event]
            assert len(told) == (0 if mode == "refuses-options" else 1)
            assert stream.end == {"no-done": "whole"}.get(mode, "done")
            stream.close()
            assert await stream.next() is None, "it stays ended"
            await asyncio.sleep(0.01)
        assert node.connections == (2 if mode == "closing" else 1)
        assert not any(each.left for each in node.heard)


@pytest.mark.parametrize("modality", ["chat", "completions"])
async def test_a_whole_reply(modality: Generating) -> None:
    async with pair() as (node, clients):
        for _ in range(2):
            reply = await generated(clients, asked(modality, n=2, temperature=0))
            choice = reply["choices"][1]
            assert (choice["message"]["content"] if modality == "chat" else choice["text"]) == text(speech.TOKENS)
        assert node.connections == 1
        body = node.heard[-1].body
        assert body["model"] == "theirs" and body["temperature"] == 0
        assert "stream" not in body and "stream_options" not in body


async def test_images() -> None:
    async with pair() as (_, clients):
        reply = await generated(clients, asked("images", n=3, size="32x16"))
    assert [base64.b64decode(each["b64_json"])[:4] for each in reply["data"]] == [b"\x89PNG"] * 3


async def test_what_is_sent() -> None:
    """What was validated, the server's own name for the model, and the members of streams; the token in its header."""
    async with speaking() as (node, port):
        for name, sent in (("theirs", "theirs"), ("", CHAT.id)):
            link = link_to(port, name, token="sesame")
            question = asked(stream=True, max_tokens=5, stream_options={"include_usage": False}, model="no")
            stream = await link.stream(CHAT, question)
            await events_of(stream)
            link.close()
            assert node.heard[-1].body == question.body | {
                "model": sent,
                "stream": True,
                "stream_options": {"include_usage": True},
            }


async def test_a_server_that_refuses_stream_options_is_asked_without_and_remembered() -> None:
    async with pair("refuses-options") as (node, clients):
        for requests in (2, 3, 4):
            assert said(await events_of(await streamed(clients))) == text(speech.TOKENS)
            assert len(node.heard) == requests
        assert "stream_options" not in node.heard[-1].body


async def test_a_server_that_took_stream_options_is_not_asked_twice_for_another_reason() -> None:
    async with pair() as (node, clients):
        await events_of(await streamed(clients))
        node.order = Order("refuse-400")
        with pytest.raises(UpstreamRefused):
            await streamed(clients)
        assert len(node.heard) == 2
        node.order = Order("refuses-options")
        assert said(await events_of(await streamed(clients))) == text(speech.TOKENS), "it was replaced by an older one"
        assert len(node.heard) == 4


async def test_a_request_that_is_too_long_is_not_asked_twice() -> None:
    async with pair("too-long") as (node, clients):
        with pytest.raises(UpstreamRefused) as refused:
            await streamed(clients)
        assert refused.value.too_long and len(node.heard) == 1


@pytest.mark.parametrize("recorded", RECORDED, ids=lambda recorded: recorded.name)
async def test_recorded_streams_over_a_socket(recorded: Recorded) -> None:
    """A few bytes a write, and the whole at once."""
    found = []
    for at in (7, 0):
        async with pair(f"as-{recorded.name.replace('_', '-')}", at=at) as (_, clients):
            found.append(await events_of(await streamed(clients)))
    assert found[0] == found[1] and len(found[0]) == recorded.events


# -- failures ----------------------------------------------------------------------------------------------------------

AT_ONCE: dict[str, tuple[type[NodeFailure], Check]] = {
    "close-at-once": (NodeBroke, Check.CLOSED),
    "reset-at-once": (NodeBroke, Check.CLOSED),
    "error-200": (NodeBroke, Check.STATUS_5XX),
    "busy-429": (NodeBusy, Check.BUSY),
    "busy-503": (NodeBusy, Check.BUSY),
    "error-500": (NodeBroke, Check.STATUS_5XX),
    "refuse-400": (UpstreamRefused, Check.STATUS_4XX),
    "refuse-401": (NodeBroke, Check.ACCESS),
    "refuse-404": (NotAsAsked, Check.STATUS_4XX),
    "too-long": (UpstreamRefused, Check.STATUS_4XX),
}
IN_STREAMS = AT_ONCE | {
    "html": (WrongAnswer, Check.FORM),
    "errs-first": (NodeBroke, Check.STATUS_5XX),
    "too-long-first": (UpstreamRefused, Check.STATUS_4XX),
    "empty": (NodeBroke, Check.FORM),
    "done-only": (NodeBroke, Check.FORM),
}


@pytest.mark.parametrize("mode", IN_STREAMS)
async def test_a_stream_that_fails_before_its_first_event(mode: str) -> None:
    async with pair(mode) as (node, clients):
        with pytest.raises(NodeFailure) as failed:
            await (await streamed(clients)).next()
        assert (type(failed.value), failed.value.check) == IN_STREAMS[mode]
        assert failed.value.retry_after_s == (1.0 if mode.startswith("busy") else 0.0)
        async with asyncio.timeout(SOON_S):
            while any(each.ended_at is None for each in node.heard):
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("mode", AT_ONCE)
async def test_a_whole_reply_that_fails(mode: str) -> None:
    async with pair(mode) as (_, clients):
        with pytest.raises(NodeFailure) as failed:
            await generated(clients)
        assert (type(failed.value), failed.value.check) == AT_ONCE[mode]


@pytest.mark.parametrize(
    "mode, events, failure",
    [
        ("dies", 3, NodeBroke),
        ("resets", 3, NodeBroke),
        ("errs", 3, NodeBroke),
        ("large-event", 1, WrongAnswer),
    ],
)
async def test_a_stream_that_fails_in_the_middle(mode: str, events: int, failure: type[NodeFailure]) -> None:
    """What came before is handed out; the failure comes again whenever it is asked again."""
    async with pair(mode, pace_s=0.005) as (_, clients):
        stream = await streamed(clients)
        for _ in range(events):
            assert await stream.next() is not None
        for _ in range(2):
            with pytest.raises(failure):
                async with asyncio.timeout(SOON_S):
                    await stream.next()
        assert stream.end is None


async def test_what_follows_an_error_does_not_count() -> None:
    """Though it came in the same read, and the reply is whole."""
    body = b'data: {}\n\ndata: {"error": {"message": "x", "code": 500}}\n\ndata: {}\n\ndata: [DONE]\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: %d\r\n\r\n" % len(body)
    async with raw(head + body) as port:
        link = link_to(port)
        stream = await link.stream(CHAT, asked(stream=True))
        assert await stream.next() == b"{}"
        for _ in range(2):
            with pytest.raises(NodeBroke):
                await stream.next()
        assert stream.end is None
        link.close()


@pytest.mark.parametrize("mode, end", [("no-finish", "done"), ("no-end", "whole"), ("after-done", "done")])
async def test_what_ended_a_stream_is_told(mode: str, end: str) -> None:
    """Nothing after [DONE] is read."""
    async with pair(mode) as (_, clients):
        stream = await streamed(clients)
        found = await events_of(stream)
        assert said(found) == text(speech.TOKENS) and stream.end == end


async def test_a_stream_that_only_the_connection_ended_may_have_been_cut() -> None:
    """It says so, unless [DONE] has come."""
    body = b"data: {}\n\ndata: {}\n"
    for tail, end, events in ((b"", "closed", 1), (b"\ndata: [DONE]", "done", 2), (b"\ndata: [DONE]\n\n", "done", 2)):
        async with raw(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n" + body + tail) as port:
            link = link_to(port)
            stream = await link.stream(CHAT, asked(stream=True))
            assert (len(await events_of(stream)), stream.end) == (events, end)
            link.close()


@asynccontextmanager
async def raw(answer: bytes) -> AsyncIterator[int]:
    """A server that says this to every request, and hangs up."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


@pytest.mark.parametrize(
    "head, body, failure",
    [
        ("", b'{"choices": []}', None),
        ("", b"\xef\xbb\xbf{}", None),
        ("", b'{"choices": [', NodeBroke),
        ("Content-Encoding: gzip\r\nContent-Length: 2\r\n", b"{}", WrongAnswer),
        ("Content-Encoding: Identity\r\nContent-Length: 2\r\n", b"{}", None),
        ("Content-Length: 99\r\n", b"{}", NodeBroke),
        ("Content-Length: 200\r\n", b"{" + b" " * 198 + b"}", WrongAnswer),
        ("Content-Length: 30\r\n", b'{"error":null,"choices":[]}   ', None),
    ],
)
async def test_framing_of_a_whole_reply(head: str, body: bytes, failure: type[NodeFailure] | None) -> None:
    """A reply that only the connection's end ends must be JSON; one that is too large is refused."""
    async with raw(f"HTTP/1.1 200 OK\r\n{head}\r\n".encode() + body) as port:
        link, limit = link_to(port), 100 - 16 * 1024
        try:
            question = asked(limit=limit if len(body) > 100 else LIMIT)
            if failure is None:
                json.loads(await link.generate(CHAT, question))
            else:
                with pytest.raises(failure):
                    await link.generate(CHAT, question)
        finally:
            link.close()


async def test_a_stream_has_no_more_bytes_than_asked_for() -> None:
    async with pair("endless") as (node, clients):
        stream = await streamed(clients, asked(limit=50_000, stream=True))
        size = 0
        with pytest.raises(WrongAnswer):
            while True:
                size += len(await stream.next() or b"")
        assert 30_000 < size < 50_000
        async with asyncio.timeout(SOON_S):
            while not node.heard[0].left:
                await asyncio.sleep(0.001)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_sends_too_much_is_not_sent_away_for_it(stream: bool) -> None:
    """Its caller may have made it long: three of them would take the node from all others."""
    async with pair(tokens=20_000) as (_, clients):
        with pytest.raises(NotAsAsked):
            if stream:
                await events_of(await streamed(clients, asked(limit=300, stream=True)))
            await clients.generate(PART, CHAT, asked(limit=100), "req_1")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_has_no_such_path_is_not_sent_away_for_it(stream: bool) -> None:
    """It may do well what others ask for; where it is set up wrong, probes tell."""
    async with raw(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n") as port:
        link = link_to(port)
        try:
            with pytest.raises(NotAsAsked) as failed:
                await (link.stream if stream else link.generate)(CHAT, asked("completions", stream=stream))
            assert failed.value.check is Check.STATUS_4XX and "404" in failed.value.message
        finally:
            link.close()


async def test_a_stream_that_is_asked_for_and_not_given() -> None:
    """A whole reply to a request for a stream is none."""
    for kind, body, failure in (
        ("application/json", b'{"choices": []}', WrongAnswer),
        ("application/json; charset=utf-8", b'{"error": {"message": "x", "code": 400}}', UpstreamRefused),
        ("text/event-stream\r\nContent-Encoding: gzip", b"\x1f\x8b", WrongAnswer),
    ):
        async with raw(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n\r\n".encode() + body) as port:
            link = link_to(port)
            with pytest.raises(failure):
                await link.stream(CHAT, asked(stream=True))
            link.close()


async def test_a_refusal_that_is_cut_or_huge_still_has_its_status() -> None:
    """It is not read whole."""
    for head, body in (("Content-Length: 99\r\n", b'{"err'), ("", b"x" * 3_000_000)):
        async with raw(f"HTTP/1.1 500 X\r\n{head}\r\n".encode() + body) as port:
            link = link_to(port)
            with pytest.raises(NodeBroke, match="HTTP 500"):
                async with asyncio.timeout(SOON_S):
                    await link.stream(CHAT, asked(stream=True))
            link.close()


# -- leaving -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["honest", "endless", "stalls", "hang"])
async def test_a_node_sees_within_100_ms_that_its_caller_has_gone(mode: str) -> None:
    """A stream that is closed, also while somebody waits for its next event; and a head that is not waited for."""
    async with pair(mode, pace_s=0.01, tokens=100_000) as (node, clients):
        if mode == "hang":
            waiting = asyncio.ensure_future(streamed(clients))
            while not node.heard:
                await asyncio.sleep(0.001)
            at = time.monotonic()
            waiting.cancel()
        else:
            stream = await streamed(clients)
            for _ in range(3):
                await stream.next()
            waiting_next = asyncio.ensure_future(stream.next())
            await asyncio.sleep(0)
            at = time.monotonic()
            stream.close()
            if mode == "stalls":
                with pytest.raises(NodeBroke):
                    await asyncio.wait_for(waiting_next, SOON_S)
            waiting_next.cancel()
        async with asyncio.timeout(SOON_S):
            while not node.heard[0].left:
                await asyncio.sleep(0.001)
        ended_at = node.heard[0].ended_at
        assert ended_at is not None and ended_at - at < 0.1
        written = node.heard[0].written
        await asyncio.sleep(0.03)
        assert node.heard[0].written == written, "it has stopped"


async def test_a_whole_reply_that_nobody_waits_for_stops_the_node() -> None:
    async with pair("hang") as (node, clients):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await clients.generate(PART, CHAT, asked(), "req_1")
        async with asyncio.timeout(SOON_S):
            while not node.heard[0].left:
                await asyncio.sleep(0.001)


async def test_a_slow_reader_holds_the_node_back() -> None:
    """It does not make 50 MB for somebody who reads a little."""
    async with pair("endless") as (node, clients):
        stream = await streamed(clients, asked(limit=1 << 30, stream=True))
        written = -1
        while written != node.heard[0].written:
            written = node.heard[0].written
            await stream.next()
            await asyncio.sleep(0.1)
        assert isinstance(stream, UpstreamStream)
        held = sum(map(len, stream._events)) + stream._body._unread
        assert held < 128 * 1024
        stream.close()


# -- tools, as far as they pass through here ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [name for name in SPEECH_MODES if name.startswith("tools")])
async def test_the_scripted_tools_are_the_known_ones(mode: str) -> None:
    """Assembled by index, or in order where there is none."""
    async with pair(mode) as (_, clients):
        events = await events_of(await streamed(clients))
    names: dict[int, str] = {}
    arguments: dict[int, str] = {}
    for event in events:
        for choice in event["choices"]:
            for place, call in enumerate(choice["delta"].get("tool_calls") or ()):
                index = call.get("index", len(names) if mode == "tools-no-index" else place)
                names[index] = names.get(index, "") + (call["function"].get("name") or "")
                arguments[index] = arguments.get(index, "") + (call["function"].get("arguments") or "")
    found = list(zip(names.values(), arguments.values(), strict=True))
    assert found == [(call.name, call.arguments) for call in CALLS[: len(found)]]
    assert len(found) == (2 if mode in ("tools-interleaved", "tools-no-index", "tools-at-once") else 1)


# -- what refusals say -------------------------------------------------------------------------------------------------

SAYS = [
    # body, what the caller may read, whether the context does not suffice
    ({"error": {"message": "No such tool.", "code": None}}, "No such tool.", False),
    ({"error": "No such tool."}, "No such tool.", False),
    ({"detail": "No such tool."}, "No such tool.", False),
    ({"detail": [{"loc": ["body", "n"], "msg": "n is too large"}]}, "n is too large", False),
    ({"object": "error", "message": "Bad.", "type": "BadRequestError", "code": 400}, "Bad.", False),
    ({"message": "Bad."}, "Bad.", False),
    ({"error": {"message": "Bad\x00 \n\t \x1b[31mred\u202e text"}}, "Bad [31mred text", False),
    ({"error": {"message": "\u00e4" * 10_000}}, "\u00e4" * SAID_CHARS_MAX, False),
    ({"error": {"message": 7}}, "", False),
    ([], "", False),
    ({}, "", False),
    ({"error": {"message": "x", "code": "context_length_exceeded"}}, "x", True),
    ({"error": {"message": "x", "type": "exceed_context_size_error", "code": 400}}, "x", True),
    *(({"error": words}, words, True) for words in (
        "This model's maximum context length is 128 tokens.",
        "the request exceeds the available context size, try increasing it",
        "The input (9 tokens) is longer than the model's context length (8 tokens).",
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 8",
        "Input validation error: `inputs` must have less than 8 tokens. Given: 9",
    )),
]  # fmt: skip


@pytest.mark.parametrize("body, words, too_long", SAYS)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_a_refusal_says(body: Any, words: str, too_long: bool, status: int) -> None:
    failure = failure_of(status, {}, json.dumps(body).encode())
    assert isinstance(failure, UpstreamRefused)
    assert (failure.said, failure.too_long) == (words, too_long)
    assert words not in failure.message or not words, "the message is logged"


@pytest.mark.parametrize("body", [b"", b"<html>", b"\xff", b"[" * 10_000, b'"error"'])
def test_a_refusal_that_says_nothing(body: bytes) -> None:
    failure = failure_of(400, {}, body)
    assert isinstance(failure, UpstreamRefused) and failure.said == ""
    assert failure_in(body) is None


@pytest.mark.parametrize(
    "event, failure",
    [
        ({"error": {"message": "x", "code": 400}}, UpstreamRefused),
        ({"error": {"message": "x", "code": "context_length_exceeded"}}, UpstreamRefused),
        ({"error": {"message": "x", "type": "BadRequestError"}}, UpstreamRefused),
        ({"error": {"message": "x", "code": 503}}, NodeBusy),
        ({"error": {"message": "x", "code": True}}, NodeBroke),
        ({"error": {"message": "x"}, "status": 429}, NodeBusy),
        ({"object": "error", "message": "x", "code": 422}, UpstreamRefused),
        ({"error": "overloaded"}, NodeBroke),
        ({"error": None, "choices": []}, None),
        ({"id": "an error", "choices": []}, None),
    ],
)
def test_errors_under_a_success(event: Any, failure: type[NodeFailure] | None) -> None:
    found = failure_in(json.dumps(event).encode())
    assert type(found) is (type(None) if failure is None else failure)


async def test_a_refusal_does_not_tell_the_servers_name_for_the_model() -> None:
    body = b'{"error": {"message": "theirs takes no tools"}}'
    async with raw(b"HTTP/1.1 400 X\r\nContent-Length: %d\r\n\r\n" % len(body) + body) as port:
        link = link_to(port)
        for ask in (link.generate, link.stream):
            with pytest.raises(UpstreamRefused) as refused:
                await ask(CHAT, asked())
            assert refused.value.said == "acme/chat takes no tools"
        link.close()


# -- which node --------------------------------------------------------------------------------------------------------


async def test_nodes_of_our_own_and_nodes_that_are_gone() -> None:
    clients = NodeClients()
    clients.add("own", OwnLink(unix_pool("/nowhere"), SystemClock()))
    own, gone = Part("own", (), 1, 1.0), Part("gone", (), 1, 1.0)
    for part, failure in ((own, NodeRefused), (gone, NodeUnreachable)):
        for ask in (clients.generate, clients.stream):
            with pytest.raises(failure):
                await ask(part, CHAT, asked(), "req_1")
    async with speaking() as (_, port):
        link = link_to(port)
        with pytest.raises(NodeBroke):
            await link.generate(Model(id="other", width=0, max_tokens=1, price=1), asked())
        link.close()


async def test_the_standing_order_is_set_over_http() -> None:
    async with speaking() as (node, port):
        pool = tcp_pool("127.0.0.1", port)
        order = b'{"mode": "refuse-404", "tokens": 3}'
        head = b"POST /control HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n" % len(order)
        reply = await pool.exchange(lambda: head + order, LIMIT)
        pool.close()
    assert node.order == Order("refuse-404", tokens=3)
    assert json.loads(reply.body)["order"]["mode"] == "refuse-404"


async def test_an_order_in_the_prompt() -> None:
    """One request is answered by it; what nobody understands is no answer at all."""
    async with pair() as (node, clients):
        order = asked(stream=True, messages=[{"role": "user", "content": "<<no-finish at=1 tokens=3>>"}])
        assert said(await events_of(await streamed(clients, order))) == text(3)
        assert said(await events_of(await streamed(clients))) == text(speech.TOKENS)
        assert node.heard[0].order == Order("no-finish", 1, 3)
