"""`embedmesh.client`'s sealed chats, sync and async, at a real gateway and a sidecar; no text stays anywhere."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from atoma_sdk import AtomaSDK

from embedmesh.client import AsyncClient, CallRefused, Client, NodeNotTrusted
from embedmesh.signing.identity import Identity
from embedmesh.signing.public_lines import node_line
from tests.gateway.mesh import free_port
from tests.story.conftest import Note
from tests.story.endpoint import wait_until
from tests.story.sidecar import CHAT, Sidecar, sidecar_mesh

SENTINEL = "zanzibar quixotic nutmeg"
TEXT = f"the words {SENTINEL} are nobody else's"
MESSAGES = [{"role": "user", "content": TEXT}]
COST = (3 + 8) * 1_000 + 8 * 3_000


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar_mesh(tmp_path_factory.mktemp("chat"), pace_s=0.01) as mesh:
        yield mesh


@pytest.fixture
def client(mesh: Sidecar) -> Iterator[Client]:
    endpoint = mesh.endpoint
    with Client(base_url=endpoint.base_url, api_key=endpoint.api_key, pins=mesh.identity, confidential=True) as made:
        yield made


def test_whole(client: Client, mesh: Sidecar) -> None:
    before = mesh.endpoint.account().balance_nanousd
    reply = client.chat.completions.create(model=CHAT, messages=MESSAGES, max_tokens=40)
    assert reply.choices[0].message.content == TEXT and reply.choices[0].finish_reason == "stop"
    assert reply.usage is not None and reply.usage.total_tokens == 19
    assert reply.node_id is not None and reply.node_id.startswith("node_")
    assert before - mesh.endpoint.account().balance_nanousd == COST


def test_stream(client: Client, mesh: Sidecar) -> None:
    before = mesh.endpoint.account().balance_nanousd
    with client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8
    assert before - mesh.endpoint.account().balance_nanousd == COST


async def test_async(mesh: Sidecar) -> None:
    """The same; several at one time."""
    endpoint = mesh.endpoint
    async with AsyncClient(base_url=endpoint.base_url, api_key=endpoint.api_key, pins=mesh.identity) as client:
        chat = client.chat.completions

        async def stream() -> str:
            chunks = [
                chunk
                async for chunk in await chat.create(model=CHAT, messages=MESSAGES, stream=True, confidential=True)
            ]
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

        assert await asyncio.gather(*(stream() for _ in range(8))) == [TEXT] * 8
        whole = await chat.create(model=CHAT, messages=MESSAGES, confidential=True)
        assert whole.choices[0].message.content == TEXT


def test_who_leaves_pays_what_was_handed_over(client: Client, mesh: Sidecar, note: Note) -> None:
    """And the server beside the sidecar is stopped within 100 ms."""
    before = mesh.endpoint.account().balance_nanousd
    words = " ".join(["word"] * 200)
    ask = [{"role": "user", "content": words}]
    with client.chat.completions.create(model=CHAT, messages=ask, max_tokens=300, stream=True) as stream:
        next(stream)
    left = time.monotonic()
    wait_until("the server sees its reader go", lambda: bool(mesh.server.left), 5)
    note("the caller of a sealed stream leaves, its server sees it", (mesh.server.left[-1] - left) * 1000, "ms")
    assert mesh.server.left[-1] - left <= 0.1
    paid = before - mesh.endpoint.account().balance_nanousd
    assert 1_000 < paid < 203 * 1_000 + 60 * 3_000


def test_refusals(client: Client, mesh: Sidecar, tmp_path: Path) -> None:
    """What the node says is for the caller alone; a node that is not pinned gets nothing."""
    with pytest.raises(CallRefused) as refused:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=9)
    assert refused.value.sealed and refused.value.param == "temperature"
    with pytest.raises(CallRefused) as refused:
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=9, stream=True)
    assert refused.value.sealed and refused.value.param == "temperature"
    other = tmp_path / "other.pub"
    other.write_text(node_line(Identity.new().public_key) + "\n")
    asked = len(mesh.server.bodies)
    access: dict[str, Any] = {"base_url": mesh.endpoint.base_url, "api_key": mesh.endpoint.api_key, "max_retries": 0}
    with Client(**access, pins=other, confidential=True) as stranger, pytest.raises((NodeNotTrusted, CallRefused)):
        stranger.chat.completions.create(model=CHAT, messages=MESSAGES)
    assert len(mesh.server.bodies) == asked


def test_a_server_that_breaks_off_costs_nothing(client: Client, mesh: Sidecar) -> None:
    """What came of the answer is known to be a part."""
    before = mesh.endpoint.account().balance_nanousd
    mesh.server.words_max = 3
    try:
        said: list[str | None] = []
        stream = client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True)
        with pytest.raises(CallRefused) as refused:
            said.extend(chunk.choices[0].delta.content for chunk in stream)
    finally:
        mesh.server.words_max = 10_000
    assert said == ["the", " words", f" {SENTINEL.split()[0]}"][: len(said)] and not refused.value.sealed
    assert mesh.endpoint.account().balance_nanousd == before


def test_an_ordinary_chat_never_goes_to_a_sidecar(mesh: Sidecar) -> None:
    """It is refused at once where no other node has the model."""
    asked = len(mesh.server.bodies)
    reply = mesh.endpoint.http.post(
        f"{mesh.endpoint.base_url}/chat/completions", json={"model": CHAT, "messages": MESSAGES}
    )
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "no_node_available")
    assert len(mesh.server.bodies) == asked


def test_nothing_of_the_texts_is_left(client: Client, mesh: Sidecar) -> None:
    """In no store, log, metric or receipt of gateway and node; also not of a refused request."""
    client.chat.completions.create(model=CHAT, messages=MESSAGES)
    list(client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True))
    with pytest.raises(CallRefused):
        client.chat.completions.create(model=CHAT, messages=MESSAGES, temperature=9)
    endpoint = mesh.endpoint
    with AtomaSDK(bearer_auth=endpoint.api_key, server_url=endpoint.root) as sdk:
        sdk.confidential_chat.create(model=CHAT, messages=MESSAGES)
        with sdk.confidential_chat.create_stream(model=CHAT, messages=MESSAGES) as events:
            assert list(events)
    endpoint.account()
    words = [word.encode() for word in SENTINEL.split()]
    looked = [path for folder in (endpoint.data_dir, mesh.data_dir) for path in folder.rglob("*") if path.is_file()]
    looked += [endpoint.log, endpoint.said, mesh.log]
    assert len(looked) > 6
    for path in looked:
        data = path.read_bytes()
        assert not any(word in data for word in words), path
    page = endpoint.get("/metrics", endpoint.admin_key).content
    assert page and not any(word in page for word in words)


def test_at_an_address(tmp_path: Path) -> None:
    """A sidecar that its gateway reaches over TLS, instead of on connections that it dialled: the same."""
    with sidecar_mesh(tmp_path, address=f"https://127.0.0.1:{free_port()}") as mesh:
        access: dict[str, Any] = {"base_url": mesh.endpoint.base_url, "api_key": mesh.endpoint.api_key}
        with Client(**access, pins=mesh.identity, confidential=True) as client:
            chunks = list(client.chat.completions.create(model=CHAT, messages=MESSAGES, stream=True))
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
            assert client.chat.completions.create(model=CHAT, messages=MESSAGES).choices[0].message.content == TEXT
