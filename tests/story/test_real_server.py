"""A real server of another make, through our link: llama.cpp's, with a tiny random model that is made here.

Installed by `make upstreams`, which also runs it for embeddings; without it these tests are skipped.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.rig.http import Wire, http_request
from bench.rig.install import STAMP, healthy, python_of
from bench.rig.processes import HOST, Process, free_port
from bench.upstreams import tiny_llama
from bench.upstreams.tiny_llama import CONTEXT
from embedmesh.catalogue import Catalogue
from embedmesh.gateway.nodes.foreign import UpstreamLink
from embedmesh.rules.errors import NodeBroke, UpstreamRefused
from embedmesh.rules.generation import Generating, GenerationRequest
from embedmesh.rules.membership import Offer
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.upstream.server import UpstreamUrl
from tests.flow.world import MODEL

pytestmark = pytest.mark.story

TINY = Model(id="tests/tiny-llama", width=0, max_tokens=CONTEXT, price=1, modalities=("chat", "completions"))
SCRIPT = Path(tiny_llama.__file__).with_name("llamacpp.py")
KEY = "sesame"
START_S, STOP_S = 30.0, 2.0
QUESTION = "Gr\u00fc\u00dfe \U0001f600?"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Its port."""
    python, folder = python_of("xllamacpp"), tmp_path_factory.mktemp("llamacpp")
    if not (python.parent.parent / STAMP).exists():
        pytest.skip("xllamacpp is not installed here: `make upstreams` does it")
    tiny_llama.make(folder / "tiny.gguf")
    port = free_port()
    command = [str(python), str(SCRIPT), str(folder / "tiny.gguf"), str(port), KEY, "generates"]
    process = Process(command, folder / "llamacpp.log", stop_s=STOP_S)
    with healthy(process, port, START_S):
        yield port


@pytest.fixture
async def link(server: int) -> AsyncIterator[UpstreamLink]:
    made = link_to(server)
    yield made
    made.close()


def link_to(port: int, token: str = KEY) -> UpstreamLink:
    offer = Offer(TINY.id, TINY.width, TINY.max_tokens, TINY.digest, TINY.tier, name="whatever")
    return UpstreamLink(UpstreamUrl(False, HOST, port, "/v1"), (offer,), Catalogue((MODEL, TINY)), token)


def asked(modality: Generating, tokens: int, text: str = QUESTION, **more: Any) -> GenerationRequest:
    body = {"messages": [{"role": "user", "content": text}]} if modality == "chat" else {"prompt": text}
    return GenerationRequest(modality, body | {"max_tokens": tokens, "temperature": 0} | more, 10_000_000)


async def whole(link: UpstreamLink, question: GenerationRequest) -> dict[str, Any]:
    async with asyncio.timeout(20):
        return dict(json.loads(await link.generate(TINY, question)))


def text_of(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or "")


@pytest.mark.parametrize("modality", ["chat", "completions"])
async def test_a_stream_says_what_a_whole_reply_says(link: UpstreamLink, modality: Generating) -> None:
    """Text, finish and usage, though the usage comes in two ways; and the connection serves both."""
    reply = await whole(link, asked(modality, 9))
    async with asyncio.timeout(20):
        stream = await link.stream(TINY, asked(modality, 9))
        events = []
        while (event := await stream.next()) is not None:
            events.append(json.loads(event))
    assert stream.end == "done"
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(map(text_of, choices)) == text_of(reply["choices"][0]) != ""
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    (usage,) = [event["usage"] for event in events if event.get("usage")]
    assert usage["completion_tokens"] == reply["usage"]["completion_tokens"] == 9
    assert usage["prompt_tokens"] == reply["usage"]["prompt_tokens"] > len(QUESTION)


async def test_a_probe_of_one_token(link: UpstreamLink) -> None:
    assert (await whole(link, asked("chat", 1)))["usage"]["completion_tokens"] == 1


async def test_a_text_that_ends_it(link: UpstreamLink) -> None:
    said = text_of((await whole(link, asked("completions", 9)))["choices"][0])
    reply = await whole(link, asked("completions", 9, stop=[said[4]]))
    assert reply["choices"][0]["finish_reason"] == "stop"
    assert text_of(reply["choices"][0]) == said.partition(said[4])[0]


@pytest.mark.parametrize("modality", ["chat", "completions"])
async def test_a_context_that_does_not_suffice(link: UpstreamLink, modality: Generating) -> None:
    question = asked(modality, 9, "x" * (CONTEXT + 1))
    for ask in (link.generate, link.stream):
        with pytest.raises(UpstreamRefused) as refused:
            await ask(TINY, question)
        assert refused.value.too_long and f"{CONTEXT} tokens" in refused.value.said


async def test_a_request_that_it_calls_wrong(link: UpstreamLink) -> None:
    """Its words, for the caller."""
    with pytest.raises(UpstreamRefused) as refused:
        await link.generate(TINY, GenerationRequest("chat", {"messages": 7, "max_tokens": 1}, 10_000))
    assert refused.value.said and not refused.value.too_long


async def test_a_wrong_token(server: int) -> None:
    link = link_to(server, "wrong")
    with pytest.raises(NodeBroke, match="is its token right") as refused:
        await link.stream(TINY, asked("chat", 1))
    assert refused.value.check is Check.ACCESS
    link.close()


async def test_it_stops_when_its_caller_has_gone(link: UpstreamLink, server: int) -> None:
    """It would speak for seconds."""
    stream = await link.stream(TINY, asked("chat", 3_000))
    for _ in range(5):
        await stream.next()
    assert any(slot["is_processing"] for slot in await slots(server))
    at = time.monotonic()
    stream.close()
    async with asyncio.timeout(5):
        while any(slot["is_processing"] for slot in await slots(server)):
            await asyncio.sleep(0.01)
    assert time.monotonic() - at < 1.0


async def slots(port: int) -> list[dict[str, Any]]:
    """What it is doing."""

    def ask() -> list[dict[str, Any]]:
        with Wire((HOST, port), 5.0) as wire:
            return list(wire.ask(http_request("GET", "/slots", key=KEY)).json())

    return await asyncio.to_thread(ask)
