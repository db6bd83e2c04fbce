"""atoma-sdk 0.1.3 for Python, unmodified, at its confidential chat and images: a sidecar beside a small server."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from atoma_sdk import AtomaSDK
from atoma_sdk.models import APIError

from tests.story.sidecar import CHAT, PAINTER, Sidecar, sidecar_mesh

TEXT = "repeat these seven words to me now"
HELLO: list[Any] = [{"role": "user", "content": TEXT}]


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with sidecar_mesh(tmp_path_factory.mktemp("sidecar")) as mesh:
        yield mesh


@pytest.fixture
def sdk(mesh: Sidecar) -> Iterator[AtomaSDK]:
    with AtomaSDK(bearer_auth=mesh.endpoint.api_key, server_url=mesh.endpoint.root) as made:
        yield made


def test_chat(sdk: AtomaSDK, mesh: Sidecar) -> None:
    """A whole answer: it is charged by what the node has signed, which the server has said."""
    before = mesh.endpoint.account().balance_nanousd
    reply = sdk.confidential_chat.create(model=CHAT, messages=HELLO, max_tokens=50)
    assert reply.choices[0].message.content == TEXT
    assert reply.usage and (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (10, 7)
    assert before - mesh.endpoint.account().balance_nanousd == 10 * 1_000 + 7 * 3_000
    assert mesh.server.bodies[-1]["max_tokens"] == 50 and mesh.server.bodies[-1]["model"] == "their-chat"


def test_stream(sdk: AtomaSDK, mesh: Sidecar) -> None:
    """Event by event; the last one that it shows says why the answer ended."""
    before = mesh.endpoint.account().balance_nanousd
    with sdk.confidential_chat.create_stream(model=CHAT, messages=HELLO, max_tokens=50) as events:
        chunks = [event.data for event in events]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert before - mesh.endpoint.account().balance_nanousd == 10 * 1_000 + 7 * 3_000


def test_image(sdk: AtomaSDK, mesh: Sidecar) -> None:
    before = mesh.endpoint.account().balance_nanousd
    reply = sdk.confidential_images.generate(model=PAINTER, prompt="a blue house", n=1, size="512x512")
    assert reply.data[0].url.startswith("data:image/png;base64,")
    assert before - mesh.endpoint.account().balance_nanousd == 5_000_000


def test_a_refusal_is_shown(sdk: AtomaSDK, mesh: Sidecar) -> None:
    with pytest.raises(APIError) as refused:
        sdk.confidential_chat.create(model=CHAT, messages=[])
    assert json.loads(refused.value.body)["error"]["code"] == "confidential_refused"
