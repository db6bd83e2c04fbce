"""The gateway's routes over a scripted world, by real HTTP: keys first, right headers, a status for each failure."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import orjson
import pytest

from embedmesh.edge.failures import TABLE
from embedmesh.edge.gateway_app import GatewayApp
from embedmesh.edge.receive import BodyBudget
from embedmesh.fleet.registry import Node
from embedmesh.rules.errors import Failure, NodeBusy, NodeTooSlow, StoreUnavailable, WrongAnswer
from embedmesh.rules.nodes import SHORTAGES
from embedmesh.rules.ports import Caller
from tests.edge.http import request, send, serving
from tests.flow.world import GOOD_KEY, POOR_KEY, SCOPELESS_KEY, ScriptedNodes, make_world, vector_for

BODY = b'{"model":"tiny","input":["abc","d"]}'


def make_app(nodes: ScriptedNodes | None = None, *, in_flight_max: int = 100, count: int = 1) -> GatewayApp:
    world = make_world(nodes, nodes=count)
    return GatewayApp(
        world,
        world.fleet.registry,
        in_flight_max=in_flight_max,
        bodies=BodyBudget(10**8),
        gauges=lambda: {"nodes_ready": 1},
    )


@asynccontextmanager
async def running(app: GatewayApp) -> AsyncIterator[int]:
    async with serving(app.server) as port:
        yield port


async def test_a_request_is_answered_with_every_header() -> None:
    async with running(make_app()) as port:
        reply = await send(port, request(body=BODY, x_request_id="mine"))
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        body = json.loads(reply.body)
        assert [item["embedding"] for item in body["data"]] == [
            orjson.loads(orjson.dumps(vector_for(ids), option=orjson.OPT_SERIALIZE_NUMPY)) for ids in ([4, 5, 6], [7])
        ]
        assert body["usage"] == {"prompt_tokens": 8, "total_tokens": 8}
        assert reply.headers["x-request-id"] == "mine"
        assert reply.headers["x-embedmesh-cost-nanousd"] == "12"
        assert reply.headers["x-embedmesh-node"] == "n0"
        assert reply.headers["x-embedmesh-truncated"] == "0"
        assert int(reply.headers["openai-processing-ms"]) >= 0


OPEN = {("GET", "/health"), ("GET", "/readyz"), ("GET", "/openapi.json"), ("GET", "/docs")}


async def test_no_path_is_open_by_omission() -> None:
    """Every route and method without a key: 401, but for the four that the contract opens."""
    app = make_app()
    async with running(app) as port:
        for path, methods in app.routes().items():
            path = path.replace("*", "acme/tiny")
            for method in ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
                reply = await send(port, request(method, path, BODY if method == "POST" else b"", key=None))
                if method not in methods:
                    assert reply.status == 405
                    assert reply.headers["allow"] == ", ".join(sorted(methods))
                elif (method, path) in OPEN:
                    assert reply.status == 200
                else:
                    assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
                    assert reply.headers["www-authenticate"] == "Bearer"


async def test_identity_comes_before_everything_about_the_body() -> None:
    async with running(make_app()) as port:
        for raw in (
            request(body=b"{", key="em_wrong"),
            request(body=b"x" * 5_000_000, key="em_wrong"),
            request(body=b"{}", key="em_wrong", content_type="text/plain"),
        ):
            assert (await send(port, raw)).status == 401


REFUSED = [
    (request(body=BODY, key=SCOPELESS_KEY), 403, "insufficient_scope", "permission_error"),
    (request(body=BODY, key=POOR_KEY), 429, "insufficient_quota", "insufficient_quota"),
    (request(body=b'{"model":"no","input":"a"}'), 404, "model_not_found", "invalid_request_error"),
    (request(body=b'{"model":"tiny","input":"abcdefghi"}'), 400, "context_length_exceeded", "invalid_request_error"),
    (request(body=b"{}", content_type="text/html"), 415, "unsupported_media_type", "invalid_request_error"),
    (request(body=b" " * (4 * 1024 * 1024 + 1)), 413, "body_too_large", "invalid_request_error"),
    (request(path="/v1/completions", body=b"{}"), 404, "not_found", "invalid_request_error"),
    (request("GET", "/metrics"), 403, "insufficient_scope", "permission_error"),
    (request("GET", "/v1/models/none"), 404, "model_not_found", "invalid_request_error"),
]


@pytest.mark.parametrize(("raw", "status", "code", "kind"), REFUSED)
async def test_refusals(raw: bytes, status: int, code: str, kind: str) -> None:
    nodes = ScriptedNodes()
    app = make_app(nodes)
    async with running(app) as port:
        reply = await send(port, raw)
        assert (reply.status, reply.error["code"], reply.error["type"]) == (status, code, kind)
        assert set(reply.error) == {"message", "type", "param", "code"}
        assert reply.headers["x-request-id"]
        if code == "insufficient_quota":
            assert reply.headers["x-should-retry"] == "false"
            assert "retry-after" not in reply.headers
    assert nodes.asked == []
    assert app.metrics.internal_errors._value.get() == 0


NODES_FAIL = [
    (NodeBusy("x"), 503, "overloaded"),
    (WrongAnswer("x"), 502, "bad_node_response"),
    (NodeTooSlow("x"), 504, "deadline_exceeded"),
]


@pytest.mark.parametrize(("failure", "status", "code"), NODES_FAIL)
async def test_when_nodes_fail(failure: Failure, status: int, code: str) -> None:
    async with running(make_app(ScriptedNodes(failure))) as port:
        reply = await send(port, request(body=BODY))
        assert (reply.status, reply.error["code"], reply.error["type"]) == (status, code, "server_error")
        assert ("retry-after" in reply.headers) is (status == 503)


async def test_a_store_that_takes_no_writes_is_told_and_shows_in_readyz() -> None:
    nodes = ScriptedNodes()
    app = make_app(nodes)
    ledger = app._world.ledger

    async def refuse(hold, claim=None) -> None:
        raise StoreUnavailable("the store is away")

    ledger.hold, ledger.healthy = refuse, lambda: False
    async with running(app) as port:
        reply = await send(port, request(body=BODY))
        assert (reply.status, reply.error["code"]) == (503, "store_unavailable")
        ready = await send(port, request("GET", "/readyz", key=None))
        assert ready.status == 503
        assert json.loads(ready.body)["reasons"] == ["the store does not take writes"]
    assert nodes.asked == []


async def test_readyz_wants_a_real_embedding_of_the_last_15_seconds() -> None:
    app = make_app(count=0)
    async with running(app) as port:
        assert (await send(port, request("GET", "/readyz", key=None))).status == 503
        app._registry.answered_right(app._registry.add(Node("n0", "unix:/nowhere")), ["acme/tiny"])
        assert (await send(port, request("GET", "/readyz", key=None))).status == 200
        app._world.clock.now += 15.1
        late = await send(port, request("GET", "/readyz", key=None))
        assert (late.status, json.loads(late.body)["ready"]) == (503, False)


@pytest.mark.parametrize(("said", "told"), [("cpu", True), ("quota", True), ("<b>what a stranger says</b>", False)])
async def test_readyz_says_that_nodes_are_starved_in_words_of_ours(said: str, told: bool) -> None:
    """They are slow, not gone: it is ready all the same."""
    app = make_app(count=2)
    next(iter(app._registry)).shortage = said
    async with running(app) as port:
        ready = await send(port, request("GET", "/readyz", key=None))
    reasons = [f"1 of 2 nodes starved: {SHORTAGES[said]}"] if told else []
    assert (ready.status, json.loads(ready.body)) == (200, {"ready": True, "reasons": reasons})


async def test_models_are_those_that_live_nodes_serve() -> None:
    app = make_app()
    async with running(app) as port:
        listed = json.loads((await send(port, request("GET", "/v1/models"))).body)
        assert [model["id"] for model in listed["data"]] == ["acme/tiny", "acme/native"]
        assert listed["data"][0] == {
            "id": "acme/tiny",
            "object": "model",
            "created": 0,
            "owned_by": "embedmesh",
            "aliases": ["tiny"],
            "tier": "exact",
            "width": 4,
            "max_tokens": 8,
            "price_nanousd_per_million_tokens": 1_500_000,
            "nodes": 1,
        }
        for path in ("/v1/models/acme/tiny", "/v1/models/acme%2Ftiny", "/v1/models/tiny", "/v1/models/tiny:exact"):
            assert json.loads((await send(port, request("GET", path))).body) == listed["data"][0]
        app._registry.answered_right(next(iter(app._registry)), ["acme/native"])
        listed = json.loads((await send(port, request("GET", "/v1/models"))).body)
        assert [model["id"] for model in listed["data"]] == ["acme/native"]
        assert (await send(port, request("GET", "/v1/models/acme/tiny"))).status == 404


async def test_more_requests_than_may_be_in_flight_are_refused_at_once() -> None:
    gate = asyncio.Event()

    class Waiting(ScriptedNodes):
        async def embed(self, *asked):
            await gate.wait()
            return await super().embed(*asked)

    async with running(make_app(Waiting(), in_flight_max=2)) as port:
        waiting = [asyncio.create_task(send(port, request(body=BODY))) for _ in range(2)]
        await asyncio.sleep(0.05)
        refused = await send(port, request(body=BODY))
        assert (refused.status, refused.error["code"]) == (503, "overloaded")
        gate.set()
        assert [reply.status for reply in await asyncio.gather(*waiting)] == [200, 200]


async def test_bodies_that_do_not_end_keep_nobody_out() -> None:
    async with running(make_app(in_flight_max=2)) as port:
        half = request(body=BODY)[:-5]
        stalled = [await asyncio.open_connection("127.0.0.1", port) for _ in range(10)]
        for _, writer in stalled:
            writer.write(half)
        await asyncio.sleep(0.05)
        assert (await send(port, request(body=BODY))).status == 200
        for _, writer in stalled:
            writer.close()


async def test_metrics_count_outcomes_without_naming_anybody() -> None:
    app = make_app()
    find = app._world.keys.find

    async def find_another(token: str) -> Caller | None:
        return Caller("acct", "key_m", frozenset({"metrics"})) if token == "em_m" else await find(token)

    app._world.keys.find = find_another
    async with running(app) as port:
        await send(port, request(body=BODY))
        await send(port, request(body=b"{"))
        text = (await send(port, request("GET", "/metrics", key="em_m"))).body.decode()
    assert 'embedmesh_requests_total{code="ok"} 1.0' in text
    assert 'embedmesh_requests_total{code="invalid_json"} 1.0' in text
    assert 'embedmesh_tokens_total{model="acme/tiny"} 8.0' in text
    assert 'embedmesh_charged_nanousd_total{model="acme/tiny"} 12.0' in text
    assert "embedmesh_internal_errors_total 0.0" in text
    assert "embedmesh_nodes_ready 1.0" in text
    assert GOOD_KEY not in text and "acct" not in text


async def test_every_code_of_the_table_is_of_the_contracts_list() -> None:
    codes = {
        "invalid_json", "missing_parameter", "unknown_parameter", "invalid_type", "invalid_value", "empty_input",
        "too_many_inputs", "context_length_exceeded", "max_tokens_per_request", "invalid_api_key",
        "insufficient_scope", "model_not_found", "not_found", "method_not_allowed", "request_timeout",
        "body_too_large", "unsupported_media_type", "insufficient_quota", "bad_node_response", "no_node_available",
        "overloaded", "store_unavailable", "deadline_exceeded", "internal_error", "rate_limit_exceeded",
        "idempotency_conflict",
    }  # fmt: skip
    assert {kind.code for kind in TABLE} == codes
