"""The gateway's routes over a scripted world, by real HTTP: keys first, right headers, a status for each failure."""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import orjson
import pytest

from embedmesh.fleet.registry import UPSTREAM, Node
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.failures import TABLE
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import Failure, NodeBusy, NodeTooSlow, StoreUnavailable, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.holds import Claim, Hold, PriorRequest
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import SHORTAGES
from embedmesh.rules.ports import Caller
from tests.flow.world import GOOD_KEY, POOR_KEY, SCOPELESS_KEY, ScriptedNodes, ScriptedWorld, make_world, vector_for
from tests.http.raw import request, send, serving

BODY = b'{"model":"tiny","input":["abc","d"]}'


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not what():
            await asyncio.sleep(0.002)


def make_app(
    nodes: ScriptedNodes | None = None, *, in_flight_max: int = 100, count: int = 1, bodies: BodyBudget | None = None
) -> GatewayApp:
    world = make_world(nodes, nodes=count)
    return GatewayApp(
        world,
        world.fleet.registry,
        in_flight_max=in_flight_max,
        bodies=bodies or BodyBudget(10**8),
        gauges=lambda: {"nodes_ready": 1},
    )


def world_of(app: GatewayApp) -> ScriptedWorld:
    assert isinstance(app._world, ScriptedWorld)
    return app._world


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


@pytest.mark.parametrize("general", [False, True], ids=["fast_path", "general"])
async def test_the_ledger_has_a_request_under_the_id_that_its_caller_is_shown(
    general: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answered or failed. An id of the caller's own is echoed, and never reaches the ledger."""
    app = make_app(ScriptedNodes(None, None, *[WrongAnswer("no")] * 3))
    held: list[str] = []
    ledger = world_of(app).ledger
    place = ledger.hold

    async def noting(hold: Hold, claim: Claim | None = None) -> PriorRequest | None:
        held.append(hold.hold_id)
        return await place(hold, claim)

    monkeypatch.setattr(ledger, "hold", noting)
    more = {"connection": "close"} if general else {}  # the fast path leaves such a head to the general server
    async with running(app) as port:
        good = await send(port, request(body=BODY, **more))
        chosen = await send(port, request(body=BODY, x_request_id=good.headers["x-request-id"], **more))
        failed = await send(port, request(body=BODY, **more))
    assert (good.status, chosen.status, failed.status) == (200, 200, 502)
    assert held[0] == good.headers["x-request-id"] == good.headers["x-embedmesh-request"]
    assert chosen.headers["x-request-id"] == held[0]
    assert held[1] == chosen.headers["x-embedmesh-request"] != held[0]
    assert held[2] == failed.headers["x-request-id"]


OPEN = {"/health": 200, "/readyz": 200, "/openapi.json": 200, "/docs": 200, "/": 302}
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


async def test_no_path_is_open_by_omission() -> None:
    """Every route, by each of its paths, and every method without a key: 401, but for those that the contract opens."""
    app = make_app()
    routes = dict(app.routes())
    routes |= {path: routes[of] for path, of in OTHER_PATHS.items() if of in routes}
    async with running(app) as port:
        for path, methods in routes.items():
            path = path.replace("*", "acme/tiny")
            for method in METHODS:
                reply = await send(port, request(method, path, BODY if method == "POST" else b"", key=None))
                if method not in methods:
                    assert reply.status == 405
                    allowed = {*methods, "HEAD"} if "GET" in methods else {*methods}
                    assert reply.headers["allow"] == ", ".join(sorted(allowed))
                elif path in OPEN and method != "POST":
                    assert reply.status == OPEN[path]
                else:
                    assert reply.status == 401 and b"The API key is missing or not valid." in reply.body, (method, path)
                    assert reply.headers["www-authenticate"] == "Bearer"


async def head_of(port: int, method: str, path: str, **more: Any) -> bytes:
    """All that comes back on a connection that ends, up to the body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request(method, path, x_request_id="mine", Connection="close", **more))
    head, end, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    assert not body or method != "HEAD"
    return re.sub(rb"\r\nDate: [^\r]*", b"", head) + end


async def test_head_is_answered_wherever_get_is() -> None:
    """With the same status and headers, and no body; elsewhere it is refused as any other method is."""
    app = make_app()
    routes = dict(app.routes())
    routes |= {path: routes[of] for path, of in OTHER_PATHS.items() if of in routes}
    async with running(app) as port:
        for path, methods in routes.items():
            path = path.replace("*", "acme/tiny")
            for key in ("em_good", None):
                head = await head_of(port, "HEAD", path, key=key)
                if "GET" in methods:
                    assert head == await head_of(port, "GET", path, key=key)
                    assert re.search(rb"\r\ncontent-length: [1-9]", head.lower())
                else:
                    assert head.startswith(b"HTTP/1.1 405 ")


async def test_the_root_sends_browsers_to_the_documentation() -> None:
    async with running(make_app()) as port:
        reply = await send(port, request("GET", "/?utm=1", key=None))
        assert (reply.status, reply.headers["location"]) == (302, "/docs")


NEAR_MISSES = [
    ("POST", "/v1/embedding", "POST /v1/embeddings"),
    ("POST", "/api/v1/embeddings", "POST /v1/embeddings"),
    ("POST", "/v1/v1/embeddings", "POST /v1/embeddings"),
    ("POST", "/V1/Embeddings", "POST /v1/embeddings"),
    ("POST", "/v1/embeddings/foo", "POST /v1/embeddings"),
    ("GET", "/v2/embeddings?x=1", "POST /v1/embeddings"),
    ("GET", "/v1/model", "GET /v1/models"),
    ("HEAD", "/v1/model", None),
    ("GET", "/healthz", "GET /health"),
    ("GET", "/.env", None),
    ("POST", "/rerank/", "POST /rerank"),
    ("POST", "/v1/rerank/", "POST /v1/rerank"),
    ("POST", "/v1/reranking", "POST /v1/rerank"),
    ("POST", "/reranking", "POST /rerank"),
    ("POST", "/api/v1/rerank", "POST /v1/rerank"),
    ("POST", "/v3/rerank", "POST /rerank"),
    ("POST", "/v1/chat/completions", None),
]


@pytest.mark.parametrize(("method", "path", "meant"), NEAR_MISSES)
async def test_a_near_miss_is_told_the_right_path(method: str, path: str, meant: str | None) -> None:
    async with running(make_app()) as port:
        if method == "HEAD":
            assert (await head_of(port, method, path)).startswith(b"HTTP/1.1 404 ")
            return
        reply = await send(port, request(method, path, key=None))
        assert (reply.status, reply.error["code"]) == (404, "not_found")
        assert (f"Did you mean {meant}?" in reply.error["message"]) is (meant is not None)


# -- other paths of the same route, and the key in another header --------------------------------------------------


def bare(model: str | None = None) -> bytes:
    return orjson.dumps({"input": ["abc", "d"]} | ({"model": model} if model is not None else {}))


SAME = [
    ("/v1/embeddings", "tiny"),
    ("/v1/embeddings?api-version=2024-10-21", "tiny"),
    ("/v1/embeddings/", "tiny"),
    ("/embeddings", "tiny"),
    ("/openai/v1/embeddings?api-version=preview", "tiny"),
    ("/openai/deployments/tiny/embeddings?api-version=2024-10-21", "tiny"),
    ("/openai/deployments/tiny/embeddings", None),
    ("/openai/deployments/acme/tiny/embeddings", None),
    ("/openai/deployments/acme%2Ftiny/embeddings", "tiny"),
    ("/openai/deployments/tiny:exact/embeddings", "acme/tiny"),
]


@pytest.mark.parametrize(("path", "model"), SAME)
async def test_other_paths_are_the_same_route(path: str, model: str | None) -> None:
    async with running(make_app()) as port:
        reply = await send(port, request(path=path, body=bare(model)))
        assert reply.status == 200
        assert json.loads(reply.body)["data"] == json.loads((await send(port, request(body=BODY))).body)["data"]


MISNAMED = [
    ("/openai/deployments/none/embeddings", None, 404, "model_not_found"),
    ("/openai/deployments/none/embeddings", "tiny", 404, "model_not_found"),
    ("/openai/deployments/tiny/embeddings", "none", 404, "model_not_found"),
    ("/openai/deployments/tiny/embeddings", "acme/native", 400, "invalid_value"),
    ("/openai/deployments//embeddings", "tiny", 404, "not_found"),
    ("/openai/deployments/embeddings", "tiny", 404, "not_found"),
    ("/v1/embeddings", None, 400, "missing_parameter"),
]


@pytest.mark.parametrize(("path", "model", "status", "code"), MISNAMED)
async def test_a_model_that_path_and_body_do_not_agree_about_is_refused(
    path: str, model: str | None, status: int, code: str
) -> None:
    async with running(make_app()) as port:
        reply = await send(port, request(path=path, body=bare(model)))
        assert (reply.status, reply.error["code"]) == (status, code)
        if status == 400 and model is not None:
            assert "acme/native" in reply.error["message"] and "acme/tiny" in reply.error["message"]


async def test_one_idempotency_key_is_not_good_for_two_models_of_paths() -> None:
    """The body is the same, and what is asked is not."""
    async with running(make_app()) as port:
        asked = [
            await send(port, request(path=f"/openai/deployments/{model}/embeddings", body=bare(), Idempotency_Key="k"))
            for model in ("tiny", "acme/native")
        ]
        assert [reply.status for reply in asked] == [200, 409]


KEYS = [
    # the fields that bring a key, and the status
    ({"api_key": "em_good"}, 200),
    ({"api_key": "em_good", "Authorization": "Bearer em_good"}, 200),
    ({"api_key": "em_good", "Authorization": ""}, 200),
    ({"api_key": "em_wrong"}, 401),
    ({"api_key": ""}, 401),
    ({"api_key": "x" * 600}, 401),
    ({"api_key": "em_good", "Authorization": "Bearer em_wrong"}, 400),
    ({"api_key": "em_wrong", "Authorization": "Bearer em_good"}, 400),
    ({"api_key": "em_good", "Authorization": "Basic em_good"}, 400),
]
KEYED = ["/v1/embeddings", "/embeddings", "/v1/models", "/openai/v1/models", "/metrics"]


@pytest.mark.parametrize("path", KEYED)
@pytest.mark.parametrize(("fields", "status"), KEYS, ids=[str(n) for n in range(len(KEYS))])
async def test_the_key_may_come_as_api_key_on_every_route_that_needs_one(
    path: str, fields: dict[str, str], status: int
) -> None:
    """On the fast path, behind it, and where a route has a scope of its own (the good key lacks it)."""
    async with running(make_app()) as port:
        method = "POST" if path.endswith("embeddings") else "GET"
        reply = await send(port, request(method, path, BODY if method == "POST" else b"", key=None, **fields))
        assert reply.status == (403 if status == 200 and path == "/metrics" else status)
        if status == 400:
            assert "api-key" in reply.error["message"]
            assert reply.error["code"] == "invalid_value"
            assert "em_" not in reply.error["message"]


@pytest.mark.parametrize("name", ["Authorization", "api-key", "Idempotency-Key", "Content-Type"])
@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings", "/v1/models"])
async def test_what_says_who_asks_or_what_for_may_stand_once(path: str, name: str) -> None:
    """A proxy before us may read the other one, be they alike or not."""
    values = {"Authorization": "Bearer em_good", "api-key": "em_good", "Content-Type": "application/json"}
    line = f"{name}: {values.get(name, 'k')}\r\n".encode()
    method = "GET" if path == "/v1/models" else "POST"
    async with running(make_app()) as port:
        whole = request(method, path, BODY, Connection="close")
        once = (
            whole if name in ("Authorization", "Content-Type") else whole.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n")
        )
        assert (await send(port, once)).status == 200
        twice = await send(port, once.replace(b"\r\n\r\n", b"\r\n" + line.lower() + b"\r\n"))
        assert (twice.status, twice.error["code"]) == (400, "invalid_value")


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


async def test_a_store_that_takes_no_writes_is_told_and_shows_in_readyz(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = ScriptedNodes()
    app = make_app(nodes)
    ledger = app._world.ledger

    async def refuse(hold: Hold, claim: Claim | None = None) -> None:
        raise StoreUnavailable("the store is away")

    monkeypatch.setattr(ledger, "hold", refuse)
    monkeypatch.setattr(ledger, "healthy", lambda: False)
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
        world_of(app).clock.now += 15.1
        late = await send(port, request("GET", "/readyz", key=None))
        assert (late.status, json.loads(late.body)["ready"]) == (503, False)


async def test_readyz_takes_the_word_of_an_idle_server_of_another_make_until_its_next_probe() -> None:
    """A look sends no probe: anybody may look, and a probe may cost money. Once it has failed, 15 s count again."""
    app = make_app(count=0)
    clock, node = world_of(app).clock, app._registry.add(Node("theirs", "http://x", kind=UPSTREAM, probe_every_s=60.0))
    async with running(app) as port:

        async def status() -> int:
            return (await send(port, request("GET", "/readyz", key=None))).status

        app._registry.answered_right(node, ["acme/tiny"])
        clock.now += 60.0
        assert await status() == 200
        clock.now += 5.0
        assert await status() == 503
        app._registry.answered_right(node, ["acme/tiny"])
        clock.now += 14.0
        app._registry.failed(node, NodeTooSlow("late"))
        assert await status() == 200
        clock.now += 2.0
        assert await status() == 503


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
            "modalities": ["embeddings"],
            "width": 4,
            "max_tokens": 8,
            "price_nanousd_per_million_tokens": 1_500_000,
            "output_price_nanousd_per_million_tokens": 0,
            "image_prices_nanousd": {},
            "scores": None,
            "search_price_nanousd": None,
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
        async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
            await gate.wait()
            return await super().embed(part, model, counted, request_id)

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


async def test_half_bodies_of_one_account_leave_room_for_those_of_others() -> None:
    """By the fast path and by the general server: it is a share of one room; strangers' bodies take none of it."""
    room = BodyBudget(12_000)
    app = make_app(bodies=room)
    whole = request(body=BODY[:-1] + b" " * 4_000 + b"}")
    by_general = whole.replace(b"/v1/embeddings", b"/v1/embeddings?x=1", 1)
    async with running(app) as port:
        stalled = []

        async def stall(raw: bytes) -> None:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw[:-1])
            stalled.append(writer)

        for raw in (whole, by_general):
            await stall(raw)
            await stall(raw.replace(GOOD_KEY.encode(), b"em_nobody"))
        await until(lambda: room.taken > 7_900)
        for raw in (whole, by_general):
            refused = await send(port, raw)
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
            other = await send(port, request(path=raw.split()[1].decode(), body=BODY, key=POOR_KEY))
            assert (other.status, other.error["code"]) == (429, "insufficient_quota")
        assert room.shares._accounts.keys() == {"acct"}
        for writer in stalled:
            writer.close()
        await until(lambda: room.taken == 0)


async def test_who_does_not_read_pages_that_anybody_may_ask_for_keeps_them_from_nobody_else() -> None:
    """Few are sent at one time, from one address a share of these; what needs no key and is small has no such bound."""
    app = make_app()
    async with running(app) as port:
        while app.pages.room.shares.take("127.0.0.1", 1):
            pass
        taken = app.pages.room.taken
        for path in ("/docs", "/openapi.json"):
            refused = await send(port, request("GET", path, key=None))
            assert (refused.status, refused.error["code"]) == (503, "overloaded")
        assert (await send(port, request("GET", "/health", key=None))).status == 200
        app.pages.room.give_back("127.0.0.1", taken)
        for path in ("/docs", "/openapi.json"):
            assert (await send(port, request("GET", path, key=None))).status == 200
        assert app.pages.room.taken == 0


async def test_metrics_count_outcomes_without_naming_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    app = make_app()
    find = app._world.keys.find

    async def find_another(token: str) -> Caller | None:
        return Caller("acct", "key_m", frozenset({"metrics"})) if token == "em_m" else await find(token)

    monkeypatch.setattr(app._world.keys, "find", find_another)
    async with running(app) as port:
        await send(port, request(body=BODY))
        await send(port, request(body=b"{"))
        text = (await send(port, request("GET", "/metrics", key="em_m"))).body.decode()
    assert 'embedmesh_requests_total{code="ok",model="acme/tiny",route="/v1/embeddings"} 1.0' in text
    assert 'embedmesh_requests_total{code="invalid_json",model="",route="/v1/embeddings"} 1.0' in text
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
        "idempotency_conflict", "lock_not_found", "lock_used", "lock_expired", "key_mismatch", "confidential_refused",
        "unsupported_modality", "storage_quota", "storage_full", "job_over",
    }  # fmt: skip
    assert {kind.code for kind in TABLE} == codes
