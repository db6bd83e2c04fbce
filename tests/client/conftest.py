"""A gateway for each test, and a call that both clients make."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from embedmesh.client import AsyncClient, Client, CreateEmbeddingResponse
from tests.client.gateway import KEY, ScriptedGateway

Call = Callable[..., CreateEmbeddingResponse]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("EMBEDMESH_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    with ScriptedGateway().running() as running:
        yield running


@pytest.fixture
def pins(gateway: ScriptedGateway, tmp_path: Path) -> Path:
    """A file that pins the gateway's first node."""
    file = tmp_path / "nodes.pub"
    file.write_text(gateway.node.pin)
    return file


OF_CLIENT = {"base_url", "api_key", "pins", "scheme", "max_retries", "ssl_context"}


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest, gateway: ScriptedGateway) -> Call:
    """`embeddings.create` of a new client; arguments are those of the client and of the call."""

    def split(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        of_client = {"base_url": gateway.base_url, "api_key": KEY}
        of_client |= {name: given[name] for name in OF_CLIENT & given.keys()}
        return of_client, {name: value for name, value in given.items() if name not in OF_CLIENT}

    def blocking(**given: Any) -> CreateEmbeddingResponse:
        of_client, of_call = split(given)
        with Client(**of_client) as client:
            return client.embeddings.create(**of_call)

    async def waiting(**given: Any) -> CreateEmbeddingResponse:
        of_client, of_call = split(given)
        async with AsyncClient(**of_client) as client:
            return await client.embeddings.create(**of_call)

    return blocking if request.param == "sync" else lambda **given: asyncio.run(waiting(**given))
