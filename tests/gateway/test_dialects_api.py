"""Other APIs' routes over a scripted world, by real HTTP: right vectors, one charge, failures in their own envelope."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.models import Model
from tests.flow.world import (
    GOOD_KEY,
    MODEL,
    POOR_KEY,
    SCOPELESS_KEY,
    ScriptedNodes,
    ScriptedWorld,
    make_world,
    vector_for,
)
from tests.http.raw import Raw, request, send, serving

Json = dict[str, Any]


@asynccontextmanager
async def gateway_of(*models: Model, nodes: ScriptedNodes | None = None) -> AsyncIterator[tuple[int, ScriptedWorld]]:
    """A gateway with these models alone, all served by one node."""
    world = make_world(nodes)
    world.fleet.registry.answered_right(world.node("n0"), [model.id for model in models])
    world = msgspec.structs.replace(world, catalogue=Catalogue(models))
    app = GatewayApp(world, world.fleet.registry, in_flight_max=100, bodies=BodyBudget(10**8), gauges=dict)
    async with serving(app.server) as port:
        yield port, world
    assert app.metrics.internal_errors._value.get() == 0


def post(path: str, body: Json, key: str | None = GOOD_KEY, **headers: str) -> bytes:
    return request("POST", path, json.dumps(body).encode(), key=key, **headers)


ONE = {"content": {"parts": [{"text": "abc"}]}}
WAYS: list[tuple[str, Json, str, str]] = [  # path, body, where the vectors are, where the failure's words are
    ("/api/embed", {"model": "tiny", "input": ["abc", "d"]}, "embeddings", "error"),
    ("/api/embeddings", {"model": "tiny", "prompt": "abc"}, "embedding", "error"),
    (
        "/v2/embed",
        {"model": "tiny", "texts": ["abc", "d"], "embedding_types": ["float"]},
        "embeddings.float",
        "message",
    ),
    ("/v1/embed", {"model": "tiny", "texts": ["abc", "d"]}, "embeddings", "message"),
    ("/embed", {"inputs": ["abc", "d"]}, "", "error"),
    ("/", {"inputs": "abc"}, "", "error"),
    ("/tei/tiny/embed", {"inputs": ["abc", "d"]}, "", "error"),
    ("/v1beta/models/tiny:embedContent", ONE, "embedding.values", "error.message"),
    ("/v1/models/tiny:batchEmbedContents", {"requests": [ONE]}, "embeddings.0.values", "error.message"),
]


def at(value: Any, path: str) -> Any:
    for name in filter(None, path.split(".")):
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


@pytest.mark.parametrize(("path", "body", "where", "told"), WAYS, ids=[way[0] for way in WAYS])
async def test_each_route_gives_the_same_vectors_and_charges_once(path: str, body: Json, where: str, told: str) -> None:
    async with gateway_of(MODEL) as (port, world):
        reply = await send(port, post(path, body))
        assert reply.status == 200, reply.body
        found = np.atleast_2d(np.array(at(json.loads(reply.body), where), "<f4"))
        right = np.array([vector_for([4, 5, 6]), vector_for([7])])[: len(found)]
        assert np.abs(found - right).max() < 1e-6
        assert [what for what, _ in world.ledger.log] == ["hold", "capture"]
        assert reply.headers["x-embedmesh-cost-nanousd"] == str(world.ledger.log[-1][1])


@pytest.mark.parametrize(("path", "body", "where", "told"), WAYS, ids=[way[0] for way in WAYS])
async def test_each_route_tells_its_failures_in_its_own_envelope(path: str, body: Json, where: str, told: str) -> None:
    async with gateway_of(MODEL) as (port, world):
        for raw, status in (
            (post(path, body, None), 401),
            (post(path, body, SCOPELESS_KEY), 403),
            (post(path, body | {"zzz": 1}), 400),
            (request("POST", path, b'{"a'), 400),
            (post(path, body, POOR_KEY), 429),
            (request("POST", path, b" " * (4 * 1024 * 1024 + 1)), 413),
        ):
            reply = await send(port, raw)
            assert reply.status == status, (path, status, reply.body)
            words = at(json.loads(reply.body), told)
            assert isinstance(words, str) and words
            assert "code" in json.loads(reply.body).get("error", {}) or told != "error.message"
        assert world.ledger.log == []


async def test_googles_clients_send_the_key_in_a_header_of_their_own() -> None:
    path = "/v1beta/models/tiny:embedContent"
    async with gateway_of(MODEL) as (port, _):
        assert (await send(port, post(path, ONE, None, x_goog_api_key=GOOD_KEY))).status == 200
        assert (await send(port, post(path, ONE, None, x_goog_api_key="em_wrong"))).status == 401
        assert (await send(port, post("/embed", {"inputs": "a"}, None, x_goog_api_key=GOOD_KEY))).status == 401


async def test_what_is_told_of_models_and_what_no_model_does() -> None:
    async with gateway_of(MODEL) as (port, _):

        async def got(path: str) -> Any:
            return json.loads((await send(port, request("GET", path))).body)

        assert [each["name"] for each in (await got("/api/tags"))["models"]] == [MODEL.id]
        assert (await got("/api/version"))["version"]
        shown = json.loads((await send(port, post("/api/show", {"model": "tiny:latest"}))).body)
        assert shown["model_info"]["embedmesh.embedding_length"] == 4
        assert (await got("/info"))["model_type"] == {"embedding": {}}
        assert (await got("/tei/tiny/info")) == await got("/info")
        refused: Raw = await send(port, post("/embed_all", {"inputs": "a"}))
        assert refused.status == 400 and "/embed_all" in refused.error["message"]
