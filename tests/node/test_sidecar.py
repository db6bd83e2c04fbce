"""A sidecar: sealed chat, completions and images of a server beside it, in both schemes, over real sockets."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.flow.prompt_bounds import sealed_input_max
from embedmesh.node.refusals import REFUSAL_S
from embedmesh.node.sidecar import choose_offers
from embedmesh.node.sidecar_answers import fit_prompt
from embedmesh.rules.confidential import SDK_SCHEME, Scheme, SealedCall
from embedmesh.rules.errors import NodeBroke, NodeFailure, SetupError
from embedmesh.rules.generation import Generating
from embedmesh.rules.models import Modality, Model
from embedmesh.rules.sealed_generation import CheckedEvent, SealedGeneration
from embedmesh.settings import NodeSettings
from tests.little_server import LittleServer
from tests.node.little_sidecar import BOUNDS, CHAT, PAINTER, LittleSidecar, little_sidecar, terms_of
from tests.node.sealing import SCHEMES, SealedBy

TEXT = "one two three four five"
HELLO: dict[str, Any] = {"model": CHAT.id, "messages": [{"role": "user", "content": TEXT}]}
STREAM = HELLO | {"stream": True}
PICTURE = {"model": PAINTER.id, "prompt": "a house"}
each_scheme = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture
def server() -> Iterator[LittleServer]:
    with LittleServer() as made:
        yield made


async def whole(node: LittleSidecar, sealed: SealedBy, modality: Generating = "chat") -> CheckedEvent:
    """As a gateway asks."""
    return await node.sidecars.generate(terms_of(sealed.call), sealed.call, modality, BOUNDS, "req_1")


async def streamed(node: LittleSidecar, sealed: SealedBy, modality: Generating = "chat") -> list[CheckedEvent]:
    """The same, to its end."""
    stream = await node.sidecars.stream(terms_of(sealed.call), sealed.call, modality, BOUNDS, "req_1")
    events = []
    while (event := await stream.next()) is not None:
        events.append(event)
    return events


def refusal(sealed: SealedBy, event: CheckedEvent) -> Any:
    """What the caller alone reads; None where nothing is sealed."""
    assert event.statement.status == 400 and event.statement.final
    if not event.answer.sealed:
        return None
    raw = sealed.opener()(event.answer, True) if event.statement.stream else sealed.opened(event.answer)
    return json.loads(raw)["error"]


@each_scheme
@pytest.mark.parametrize(
    ("modality", "asked", "said"),
    [
        ("chat", HELLO, lambda reply: reply["choices"][0]["message"]["content"]),
        ("completions", {"model": CHAT.id, "prompt": TEXT}, lambda reply: reply["choices"][0]["text"]),
    ],
)
async def test_a_whole_answer(
    server: LittleServer, tmp_path: Path, scheme: Scheme, modality: Generating, asked: Any, said: Any
) -> None:
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(scheme, modality, asked)
        event = await whole(node, sealed, modality)
        reply = json.loads(sealed.opened(event.answer))
    assert said(reply) == TEXT and reply["model"] == CHAT.id
    usage = reply["usage"]
    assert (event.statement.input, event.statement.output) == (usage["prompt_tokens"], usage["completion_tokens"])
    assert (event.statement.input, event.statement.output, event.statement.estimated) == (8, 5, False)
    assert server.bodies[-1]["model"] == "theirs" and server.bodies[-1]["max_tokens"] == CHAT.output_max


@each_scheme
async def test_a_stream(server: LittleServer, tmp_path: Path, scheme: Scheme) -> None:
    """Each event is under its own nonce; the last one says why the answer ended, and how many tokens it was."""
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(scheme, "chat", STREAM, stream=True)
        events = await streamed(node, sealed)
    opens = sealed.opener()
    chunks = [json.loads(opens(event.answer, event.statement.final)) for event in events]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == TEXT
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["stop"]
    assert [event.statement.final for event in events] == [False] * 5 + [True]
    assert [event.statement.estimated for event in events] == [True] * 5 + [False]
    assert (events[-1].statement.input, events[-1].statement.output, events[-1].statement.estimated) == (8, 5, False)
    if scheme == SDK_SCHEME:
        nonces = {event.answer.nonce for event in events} | {sealed.call.nonce}
        assert len(nonces) == len(events) + 1
        assert len({nonce[:4] for nonce in nonces}) == 2, "four random bytes, and a counter"
    assert len({event.answer.sealed for event in events}) == len(events)


async def test_no_two_events_of_a_node_have_one_nonce(server: LittleServer, tmp_path: Path) -> None:
    """Of all streams under one key, also those of several at one time."""
    async with little_sidecar(server, tmp_path) as node:
        calls = [node.seal(SDK_SCHEME, "chat", STREAM, stream=True) for _ in range(20)]
        answers = await asyncio.gather(*(streamed(node, sealed) for sealed in calls))
    nonces = [event.answer.nonce for events in answers for event in events]
    assert len(nonces) == len(set(nonces)) == 20 * 6


@each_scheme
async def test_usage_is_told_inside_where_it_is_asked_for(server: LittleServer, tmp_path: Path, scheme: Scheme) -> None:
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(scheme, "chat", STREAM | {"stream_options": {"include_usage": True}}, stream=True)
        events = await streamed(node, sealed)
    opens = sealed.opener()
    chunks = [json.loads(opens(event.answer, event.statement.final)) for event in events]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 5
    assert events[-1].statement.final and chunks[-2]["choices"][0]["finish_reason"] == "stop"


@each_scheme
async def test_an_image(server: LittleServer, tmp_path: Path, scheme: Scheme) -> None:
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(scheme, "images", PICTURE | {"size": "2x2"})
        event = await whole(node, sealed, "images")
        reply = json.loads(sealed.opened(event.answer))
        assert (event.statement.images, event.statement.size, event.statement.input) == (1, "2x2", 0)
        assert reply["data"][0]["url"].startswith("data:image/png;base64,")
        more = node.seal(scheme, "images", PICTURE | {"n": 2})
        assert refusal(more, await whole(node, more, "images"))["param"] == "n"


@pytest.mark.parametrize(
    ("asked", "units", "sent"), [(None, 100, 84), (30, 100, 30), (500, 100, 84), (None, 1_000, 256)]
)
async def test_the_output_is_limited_to_what_the_lock_leaves(
    server: LittleServer, tmp_path: Path, asked: int | None, units: int, sent: int
) -> None:
    """Callers of the SDKs cannot raise the lock: 16 tokens are about the input."""
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(SDK_SCHEME, "chat", HELLO | ({} if asked is None else {"max_tokens": asked}), units=units)
        event = await node.sidecars.generate(terms_of(sealed.call, units), sealed.call, "chat", BOUNDS, "req_1")
    assert event.statement.status == 200
    assert abs(server.bodies[-1]["max_tokens"] - sent) <= 2


async def test_a_whole_answer_that_no_gateway_takes_is_not_made(server: LittleServer, tmp_path: Path) -> None:
    """Or gateways would count it against the node, whose caller has asked for it."""
    asked = HELLO | {"max_tokens": 4_000, "logprobs": True, "top_logprobs": 20}
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(SDK_SCHEME, "chat", asked, units=8_192)
        event = await node.sidecars.generate(terms_of(sealed.call, 8_192), sealed.call, "chat", BOUNDS, "req_1")
        assert refusal(sealed, event)["param"] == "max_tokens"
    assert not server.bodies


def test_no_more_input_is_believed_than_gateways_do() -> None:
    """A server may write numbers out, as JSON that is made anew does: four bytes become eighteen."""
    numbers = "1e15," * 1_000
    tool = f'{{"type": "function", "function": {{"name": "a", "parameters": {{"enum": [{numbers}0]}}}}}}'
    text = f'{{"model": "{CHAT.id}", "messages": [{{"role": "user", "content": "x"}}], "tools": [{tool}]}}'
    body, model = text.encode(), msgspec.structs.replace(CHAT, max_tokens=100_000)
    call = SealedCall(SDK_SCHEME, CHAT.id, CHAT.id, 41, 100_000, bytes(32), b"")
    fitted = fit_prompt(body, SealedGeneration(call), "chat", Catalogue((model,)))
    assert 1 < fitted.most.input <= sealed_input_max(len(body), model)


async def test_a_prompt_that_the_lock_does_not_cover(server: LittleServer, tmp_path: Path) -> None:
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(SDK_SCHEME, "chat", HELLO, units=10)
        assert refusal(sealed, await whole(node, sealed))["code"] == "max_tokens_per_request"
    assert not server.bodies


@pytest.mark.parametrize("told", [None, {"prompt_tokens": 9_000, "completion_tokens": 5, "total_tokens": 9_005}])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_server_counts_is_believed_within_its_bounds(
    tmp_path: Path, told: dict[str, int] | None, stream: bool
) -> None:
    """Else the node's own count is signed, marked, and never above the lock."""
    with LittleServer(usage=told if told is not None else False) as server:
        async with little_sidecar(server, tmp_path) as node:
            sealed = node.seal(SDK_SCHEME, "chat", STREAM if stream else HELLO, stream=stream)
            statement = (
                (await streamed(node, sealed))[-1].statement if stream else (await whole(node, sealed)).statement
            )
    assert statement.estimated and 5 < statement.input < 40
    assert statement.output == (-(-len(TEXT) // 4) if told is None else told["completion_tokens"])


@each_scheme
@pytest.mark.parametrize("stream", [False, True])
async def test_what_the_server_refuses_is_said_to_the_caller_alone(
    tmp_path: Path, scheme: Scheme, stream: bool
) -> None:
    with LittleServer(refuse=(400, "I do not like these words")) as server:
        async with little_sidecar(server, tmp_path) as node:
            sealed = node.seal(scheme, "chat", STREAM if stream else HELLO, stream=stream)
            event = (await streamed(node, sealed))[0] if stream else await whole(node, sealed)
            assert "I do not like these words" in refusal(sealed, event)["message"]
            assert b"like" not in event.answer.statement


@each_scheme
@pytest.mark.parametrize("stream", [False, True])
async def test_a_replay_gets_the_one_refusal(
    server: LittleServer, tmp_path: Path, scheme: Scheme, stream: bool
) -> None:
    """As does what was sealed for another key. It says nothing, and takes its time."""
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(scheme, "chat", STREAM if stream else HELLO, stream=stream)

        async def ask(one: SealedBy) -> CheckedEvent:
            return (await streamed(node, one))[-1] if stream else await whole(node, one)

        assert (await ask(sealed)).statement.status == 200
        changed = sealed.but(ciphertext=sealed.call.ciphertext[:-1] + bytes([sealed.call.ciphertext[-1] ^ 1]))
        for wrong in (sealed, changed, sealed.but(node_key=bytes(32))):
            begun = time.monotonic()
            event = await ask(wrong)
            assert refusal(wrong, event) is None and time.monotonic() - begun >= REFUSAL_S
    assert len(server.bodies) == 1


async def test_the_words_around_a_request_are_held_to_those_inside(server: LittleServer, tmp_path: Path) -> None:
    """Our own scheme binds what is asked for; in the SDKs' one the node compares what it can."""
    async with little_sidecar(server, tmp_path) as node:
        hpke = node.seal("hpke-1", "chat", STREAM, stream=True)
        assert refusal(hpke, await whole(node, hpke)) is None, "not as a stream"
        completion = node.seal("hpke-1", "completions", {"model": CHAT.id, "prompt": TEXT})
        assert refusal(completion, await whole(node, completion)) is None, "not as a chat"
        by_sdk = node.seal(SDK_SCHEME, "chat", STREAM, stream=True)
        assert refusal(by_sdk, await whole(node, by_sdk))["param"] == "stream"
        other = node.seal(SDK_SCHEME, "chat", HELLO)
        other = other.but(model=PAINTER.id, model_name=PAINTER.id)
        assert refusal(other, await whole(node, other))["param"] == "model"
    assert not server.bodies


@pytest.mark.parametrize("body", [{}, {"model": CHAT.id}, HELLO | {"temperature": 9}, HELLO | {"no_such": 1}])
async def test_the_sealed_request_is_validated_as_any_other(
    server: LittleServer, tmp_path: Path, body: dict[str, Any]
) -> None:
    async with little_sidecar(server, tmp_path) as node:
        sealed = node.seal(SDK_SCHEME, "chat", {"model": CHAT.id} | body if body else {"model": CHAT.id, "messages": 1})
        assert refusal(sealed, await whole(node, sealed))["type"] == "invalid_request_error"
    assert not server.bodies


async def test_a_server_that_breaks_off_cuts_the_stream(tmp_path: Path) -> None:
    """No final event: nobody takes the part for the whole."""
    with LittleServer(words_max=3) as server:
        async with little_sidecar(server, tmp_path) as node:
            sealed = node.seal("hpke-1", "chat", STREAM, stream=True)
            stream = await node.sidecars.stream(terms_of(sealed.call), sealed.call, "chat", BOUNDS, "req_1")
            events = []
            with pytest.raises(NodeFailure):
                while (event := await stream.next()) is not None:
                    events.append(event)
    assert 0 < len(events) <= 3 and not any(event.statement.final for event in events)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_gateway_that_leaves_a_stream_stops_the_server(tmp_path: Path, waits: bool) -> None:
    """Within 100 ms its connection is closed, whether the gateway waited for the next event or not."""
    with LittleServer(pace_s=0.02, endless=True) as server:
        async with little_sidecar(server, tmp_path) as node:
            sealed = node.seal("hpke-1", "chat", STREAM, stream=True)
            got = await node.sidecars.stream(terms_of(sealed.call), sealed.call, "chat", BOUNDS, "req_1")
            await got.next()
            waiting = asyncio.ensure_future(got.next()) if waits else None
            await asyncio.sleep(0.01)
            got.close()
            if waiting is not None:
                with pytest.raises(NodeBroke):
                    await waiting
            assert await until_left(server) <= 0.1


async def test_a_gateway_that_leaves_a_whole_answer_stops_the_server(tmp_path: Path) -> None:
    with LittleServer(delay_s=30.0) as server:
        async with little_sidecar(server, tmp_path) as node:
            asking = asyncio.ensure_future(whole(node, node.seal("hpke-1", "chat", HELLO)))
            while not server.bodies:
                await asyncio.sleep(0.005)
            asking.cancel()
            assert await until_left(server) <= 0.1


async def until_left(server: LittleServer) -> float:
    """Seconds from now until it saw its reader go."""
    begun = time.monotonic()
    while not server.left:
        assert time.monotonic() - begun < 5
        await asyncio.sleep(0.002)
    return server.left[0] - begun


async def test_nothing_is_read_ahead(tmp_path: Path) -> None:
    """A gateway that does not read slows the server down: what is on the way fits the sockets' buffers."""
    long = "word" * 250
    with LittleServer(endless=True) as server:
        async with little_sidecar(server, tmp_path) as node:
            asked = STREAM | {"messages": [{"role": "user", "content": " ".join([long] * 20)}], "max_tokens": 256}
            sealed = node.seal("hpke-1", "chat", asked, stream=True, units=100_000)
            bounds = msgspec.structs.replace(BOUNDS, input=100_000, tokens=100_000, bytes=10**9)
            got = await node.sidecars.stream(terms_of(sealed.call, 100_000), sealed.call, "chat", bounds, "req_1")
            await got.next()
            await asyncio.sleep(1.0)
            settled = server.events
            await asyncio.sleep(0.5)
            assert server.events == settled < 5_000, "it waits"
            got.close()


@pytest.mark.parametrize(
    ("modality", "why"), [("rerank", "reranks: no sealed"), ("embeddings", "makes vectors: a node")]
)
def test_a_model_that_a_sidecar_cannot_seal_is_refused_for_what_it_does(modality: Modality, why: str) -> None:
    model = Model(id="acme/other", width=1, max_tokens=64, price=1, modalities=(modality,))
    with pytest.raises(SetupError, match=f"'acme/other' {why}"):
        choose_offers(NodeSettings(data_dir=Path("/"), model=("acme/other",)), Catalogue((CHAT, model)))


async def test_plain_requests_are_refused(server: LittleServer, tmp_path: Path) -> None:
    async with little_sidecar(server, tmp_path):
        transport = httpx.AsyncHTTPTransport(uds=str(tmp_path / "s.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://node") as http:
            for path in (
                "chat/completions",
                "completions",
                "images/generations",
                "embeddings",
                "confidential/embeddings",
            ):
                assert (await http.post(f"/v1/{path}", json=HELLO)).status_code == 404
            listed = (await http.get("/v1/models")).json()
            assert [(one["id"], one["width"]) for one in listed["data"]] == [(CHAT.id, 0), (PAINTER.id, 0)]
            assert (await http.get("/readyz")).status_code == 200
    assert not server.bodies
