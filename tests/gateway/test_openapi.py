"""The OpenAPI document says what the gateway does: same routes, same members, same failures, same headers."""

import base64
import json
import re
import shlex
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from embedmesh import __version__
from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.dialects.openai.parse import parse
from embedmesh.fleet.registry import Node
from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.fleet_api import ACTIONS
from embedmesh.gateway.api.openapi import document
from embedmesh.gateway.api.pages.samples import CURL, ORIGIN, SAMPLES
from embedmesh.gateway.api.rerank_api import RERANK_CURL, RERANK_SAMPLES
from embedmesh.gateway.api.table import APIS
from embedmesh.http.failures import TABLE
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import CallerFailure, NodeBusy, NodeTooSlow, WrongAnswer
from embedmesh.rules.membership import Heartbeat, SignedHead
from embedmesh.rules.ports import Caller, RememberedKeys
from embedmesh.signing import atoma
from embedmesh.signing.invites import Invite
from embedmesh.signing.receipts import RECEIPTS_PURPOSE, head_message
from tests.flow.sealed import DictLocks, SealedNode
from tests.flow.world import CATALOGUE, GOOD_KEY, POOR_KEY, SCOPELESS_KEY, ScriptedNodes, make_world
from tests.gateway.mesh import Applicant, Gateway, gateway, memory_folder, until
from tests.http.raw import Raw, request, send, serving

METRICS_KEY = "em_metrics"
API = document(__version__)
EMBEDDINGS = API["paths"]["/v1/embeddings"]["post"]
ON_EVERY_REPLY = {"content-type", "content-length", "date", "server", "connection"}  # HTTP's own, not the API's
SOMETIMES = (
    "x-ratelimit-",
    "idempotent-replayed",
    "x-embedmesh-request",
    "x-embedmesh-cached",
    "x-embedmesh-ignored",
)  # a limit; it was kept


class KeyRingWithMetrics:
    """The scripted world's keys, and one that may read metrics."""

    def __init__(self, keys: RememberedKeys) -> None:
        self._keys = keys

    async def find(self, token: str) -> Caller | None:
        if token == METRICS_KEY:
            return Caller("acct", "key_m", frozenset({"metrics"}))
        return await self._keys.find(token)

    def known(self, token: str, now: float) -> Caller | None:
        return self._keys.known(token, now)


def make_app(nodes: ScriptedNodes | None = None, *, count: int = 1) -> GatewayApp:
    world = make_world(nodes, nodes=count)
    world = msgspec.structs.replace(world, keys=KeyRingWithMetrics(world.keys))
    return GatewayApp(
        world,
        world.fleet.registry,
        in_flight_max=100,
        bodies=BodyBudget(10**8),
        gauges=dict,
        confidential=(DictLocks(world), SealedNode(world)),
    )


def errors_by(schema: dict[str, Any], value: object) -> list[str]:
    """What a schema of the document says against a value."""
    whole = {"allOf": [schema], "components": API["components"]}
    return [error.message for error in Draft202012Validator(whole).iter_errors(value)]


def test_it_is_a_valid_openapi_31_document() -> None:
    assert API["openapi"].startswith("3.1")
    assert [str(error) for error in OpenAPIV31SpecValidator(json.loads(json.dumps(API))).iter_errors()] == []


@pytest.fixture
async def complete() -> AsyncIterator[Gateway]:
    """A whole gateway: callers', nodes' and operators' routes."""
    with memory_folder() as folder:
        async with gateway(folder) as made:
            yield made


async def test_every_route_is_documented_and_every_documented_route_exists(complete: Gateway) -> None:
    """A gateway serves all APIs of the route table, from which the document is made, and no others."""
    routes = complete.app.routes()
    there = {(path, method.lower()) for path, methods in routes.items() for method in methods}
    documented = {(re.sub("{.+}", "*", path), method) for path, methods in API["paths"].items() for method in methods}
    assert documented == there


def test_only_what_is_paid_leaves_the_check_of_the_key_to_the_flow() -> None:
    """The router checks the keys of all other routes, before anything else of a request."""
    rows = [row for api in APIS for row in api.ROUTES if row.raw is not None and row.raw.key_checked_by_flow]
    assert [row.path for row in rows] == [
        "/v1/embeddings",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/tei/{id}/rerank",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/images/generations",
        "/v1/confidential/embeddings",
        "/v1/confidential/chat/completions",
        "/v1/confidential/completions",
        "/v1/confidential/images/generations",
        "/api/embed",
        "/api/embeddings",
        "/v2/embed",
        "/v1/embed",
        "/embed",
        "/",
        "/tei/{id}/embed",
        "/v1beta/models/{id}:embedContent",
        "/v1beta/models/{id}:batchEmbedContents",
    ]


async def test_every_action_of_an_operator_is_documented() -> None:
    [_, action] = API["paths"]["/v1/admin/nodes/{node_id}/{action}"]["post"]["parameters"]
    assert action["schema"]["enum"] == [*ACTIONS, "weight"]


async def test_a_route_needs_a_key_or_a_signature_exactly_where_the_document_says_so(complete: Gateway) -> None:
    for path, methods in API["paths"].items():
        asked = re.sub(r"{\w+}", "tiny", path)
        for method, operation in methods.items():
            body = b"{}" if method == "post" else b""
            raw = request(method.upper(), asked, body, key=None, upgrade="embedmesh-node")
            reply = await send(complete.port, raw)
            assert (reply.status == 401) == bool(operation["security"]), path
            if reply.status == 401:
                check_reply(path, method, reply)


async def test_each_tag_has_routes_and_callers_come_first() -> None:
    used = [operation["tags"][0] for methods in API["paths"].values() for operation in methods.values()]
    assert list(dict.fromkeys(used)) == [tag["name"] for tag in API["tags"]]
    assert [tag["name"] for tag in API["tags"] if tag.get("x-embedmesh-aside")] == ["Nodes", "Administration"]
    names = [operation["operationId"] for methods in API["paths"].values() for operation in methods.values()]
    assert len(names) == len(set(names))


# -- what is sent --------------------------------------------------------------------------------------------------


ACCEPTED = [
    {"model": "tiny", "input": "a"},
    {"model": "tiny", "input": ["a", "b"]},
    {"model": "tiny", "input": [1, 2]},
    {"model": "tiny", "input": [[1], [2, 3]]},
    {"model": "tiny", "input": "a", "encoding_format": "base64", "dimensions": 4, "user": "u"},
    {"model": "tiny", "input": "a", "encoding_format": None, "dimensions": None, "user": None, "truncate": None},
    {"model": "tiny", "input": "a", "input_type": "search_query", "truncate": "END"},
    {"model": "tiny", "input": "a", "truncation": True},
    {"model": "tiny", "input": "a", "truncate_prompt_tokens": -1, "task": "retrieval.passage"},
    {"model": "tiny", "input": "a", "truncate_prompt_tokens": 8, "task": "RETRIEVAL_QUERY", "prompt_name": "query"},
    {"model": "tiny", "input": "a", "output_dimension": 2, "normalize": True, "normalized": True},
    {"model": "tiny", "input": "a", "input_type": "text-matching", "prompt_name": None},
    {"model": "tiny", "input": "a", "metadata": {"a": [1]}, "timeout": 1.5, "stream": False, "priority": 0},
    {"model": "tiny", "input": "a", "keep_alive": "5m", "drop_params": True, "modality": "text"},
    {"model": "tiny", "input": "a", "output_dtype": "float", "late_chunking": False, "keep_alive": 0},
    {"model": "tiny", "input": "a", "output_dtype": None, "stream": None, "metadata": None, "task": None},
    {"model": "tiny", "input": "a", "output_dtype": "int8", "truncate": False},
    {"model": "tiny", "input": "a", "embedding_type": ["ubinary"], "truncate": True},
    {"model": "tiny", "input": "a", "embedding_type": "base64", "encoding_format": "base64"},
    {"model": "tiny", "input": ["a"] * 2048},
]
REFUSED: list[object] = [
    [],
    "a",
    {"input": "a"},
    {"model": "tiny"},
    {"model": None, "input": "a"},
    {"model": "tiny", "input": None},
    {"model": "tiny", "input": ""},
    {"model": "tiny", "input": []},
    {"model": "tiny", "input": ["a", ""]},
    {"model": "tiny", "input": ["a", 1]},
    {"model": "tiny", "input": [1, "a"]},
    {"model": "tiny", "input": [[1], []]},
    {"model": "tiny", "input": [True]},
    {"model": "tiny", "input": [-1]},
    {"model": "tiny", "input": {"text": "a"}},
    {"model": "tiny", "input": ["a"] * 2049},
    {"model": "tiny", "input": "a", "encoding_format": "int8"},
    {"model": "tiny", "input": "a", "dimensions": 0},
    {"model": "tiny", "input": "a", "dimensions": True},
    {"model": "tiny", "input": "a", "user": "u" * 513},
    {"model": "tiny", "input": "a", "input_type": "clustering"},
    {"model": "tiny", "input": "a", "truncate": "middle"},
    {"model": "tiny", "input": "a", "truncation": "yes"},
    {"model": "tiny", "input": "a", "temperature": 1},
    {"model": "tiny", "input": "a", "truncate_prompt_tokens": 0},
    {"model": "tiny", "input": "a", "truncate_prompt_tokens": -2},
    {"model": "tiny", "input": "a", "truncate_prompt_tokens": True},
    {"model": "tiny", "input": "a", "output_dimension": 0},
    {"model": "tiny", "input": "a", "task": "classification"},
    {"model": "tiny", "input": "a", "task": "Retrieval.Query"},
    {"model": "tiny", "input": "a", "prompt_name": "other"},
    {"model": "tiny", "input": "a", "normalize": 1},
    {"model": "tiny", "input": "a", "metadata": "a"},
    {"model": "tiny", "input": "a", "timeout": True},
    {"model": "tiny", "input": "a", "stream": True},
    {"model": "tiny", "input": "a", "priority": "high"},
    {"model": "tiny", "input": "a", "keep_alive": False},
    {"model": "tiny", "input": "a", "drop_params": 1},
    {"model": "tiny", "input": "a", "modality": "image"},
    {"model": "tiny", "input": "a", "output_dtype": "int4"},
    {"model": "tiny", "input": "a", "late_chunking": True},
]


@pytest.mark.parametrize("body", REFUSED + ACCEPTED, ids=lambda body: json.dumps(body)[:60])
def test_the_schema_refuses_what_the_gateway_refuses(body: object) -> None:
    """One table makes both; this holds its checks and its schemas to each other."""
    try:
        parse(json.dumps(body).encode(), CATALOGUE)
        accepted = True
    except CallerFailure:
        accepted = False
    assert accepted == (body in ACCEPTED)
    assert (errors_by({"$ref": "#/components/schemas/EmbeddingRequest"}, body) == []) == accepted


def test_every_member_is_documented() -> None:
    schema = API["components"]["schemas"]["EmbeddingRequest"]
    assert list(schema["properties"]) == list(FIELDS)
    assert all(member["description"] for member in schema["properties"].values())


# -- what is answered ----------------------------------------------------------------------------------------------


def check_reply(path: str, method: str, reply: Raw) -> None:
    """Status, headers, content type and body are all as documented."""
    answers = API["paths"][path][method]["responses"]
    assert str(reply.status) in answers, f"{reply.status} is not documented for {path}"
    answer = answers[str(reply.status)]
    content_type = reply.headers["content-type"].partition(";")[0]
    [documented_type] = answer["content"]
    assert content_type == documented_type
    sent = set(reply.headers) - ON_EVERY_REPLY
    documented = {name.lower() for name in answer["headers"]}
    if reply.status == 200:
        sent -= {"x-content-type-options", "referrer-policy"}
        assert sent <= documented
        assert all(name.startswith(SOMETIMES) for name in documented - sent)
    else:
        assert sent <= documented
        assert "x-request-id" in sent
    value = json.loads(reply.body) if content_type == "application/json" else reply.body.decode()
    assert errors_by(answer["content"][documented_type]["schema"], value) == []


BODY = b'{"model":"tiny","input":["abc","d"]}'
POSTED = [
    (request(body=BODY), 200),
    (request(body=b'{"model":"tiny","input":"abc","encoding_format":"base64","dimensions":2}'), 200),
    (request(body=b"{"), 400),
    (request(body=b'{"model":"tiny","input":"abcdefghi"}'), 400),
    (b"POST /v1/embeddings HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (request(body=BODY, key=None), 401),
    (request(body=BODY, key=SCOPELESS_KEY), 403),
    (request(body=b'{"model":"no","input":"a"}'), 404),
    (request(body=b" " * (4 * 1024 * 1024 + 1)), 413),
    (request(body=BODY, content_type="text/plain"), 415),
    (request(body=BODY, key=POOR_KEY), 429),
]


@pytest.mark.parametrize("raw, status", POSTED, ids=[f"{status}-{number}" for number, (_, status) in enumerate(POSTED)])
async def test_real_answers_to_embedding_requests_are_as_documented(raw: bytes, status: int) -> None:
    async with serving(make_app().server) as port:
        reply = await send(port, raw)
    assert reply.status == status
    check_reply("/v1/embeddings", "post", reply)


@pytest.mark.parametrize(
    "failure, status", [(WrongAnswer("x"), 502), (NodeBusy("x"), 503), (NodeTooSlow("x"), 504), (RuntimeError(), 500)]
)
async def test_real_failures_behind_the_gateway_are_as_documented(failure: Exception, status: int) -> None:
    async with serving(make_app(ScriptedNodes(failure)).server) as port:
        reply = await send(port, request(body=BODY))
    assert reply.status == status
    check_reply("/v1/embeddings", "post", reply)


GOT = [
    ("/v1/models", "/v1/models", GOOD_KEY, 200),
    ("/v1/models", "/v1/models", "em_wrong", 401),
    ("/v1/models", "/v1/models", SCOPELESS_KEY, 200),
    ("/v1/models/{id}", "/v1/models/acme/tiny", GOOD_KEY, 200),
    ("/v1/models/{id}", "/v1/models/acme%2Ftiny", GOOD_KEY, 200),
    ("/v1/models/{id}", "/v1/models/no", GOOD_KEY, 404),
    ("/v1/models/{id}", "/v1/models/tiny", SCOPELESS_KEY, 200),
    ("/metrics", "/metrics", METRICS_KEY, 200),
    ("/metrics", "/metrics", GOOD_KEY, 403),
    ("/metrics", "/metrics", None, 401),
    ("/health", "/health", None, 200),
    ("/readyz", "/readyz", None, 200),
    ("/openapi.json", "/openapi.json", None, 200),
    ("/docs", "/docs", None, 200),
]


@pytest.mark.parametrize("path, asked, key, status", GOT)
async def test_real_answers_to_reads_are_as_documented(path: str, asked: str, key: str | None, status: int) -> None:
    async with serving(make_app().server) as port:
        reply = await send(port, request("GET", asked, key=key))
    assert reply.status == status
    check_reply(path, "get", reply)


async def test_a_gateway_without_nodes_says_so_as_documented() -> None:
    async with serving(make_app(count=0).server) as port:
        reply = await send(port, request("GET", "/readyz", key=None))
        assert reply.status == 503
        check_reply("/readyz", "get", reply)
        check_reply("/v1/embeddings", "post", await send(port, request(body=BODY)))


async def test_real_answers_to_nodes_are_as_documented(complete: Gateway, tmp_path: Path) -> None:
    """A greeting, a registration that is refused, pending and admitted, reports, a farewell; what is sent fits, too."""
    node = Applicant(complete, tmp_path)

    async def check(path: str, method: str, raw: bytes, status: int) -> None:
        reply = await send(complete.port, raw)
        assert reply.status == status, reply.body
        check_reply(path, method, reply)

    async def registration(invite: Invite | None, **changes: Any) -> bytes:
        body = msgspec.json.encode((await node.registration(invite, **changes))[0])
        assert errors_by({"$ref": "#/components/schemas/Registration"}, json.loads(body)) == []
        statement = json.loads(base64.b64decode(json.loads(body)["statement"]))
        assert errors_by({"$ref": "#/components/schemas/Statement"}, statement) == []
        return request("POST", "/v1/nodes", body, key=None)

    invite = await complete.invite()
    await check("/v1/nodes", "get", request("GET", "/v1/nodes", key=None), 200)
    await check("/v1/nodes", "post", await registration(None), 200)
    await check("/v1/nodes", "post", await registration(None, nonce=b"n"), 401)
    await check("/v1/nodes", "post", await registration(invite, address="https://10.0.0.1"), 400)
    await check("/v1/nodes", "post", await registration(invite), 200)
    await check("/v1/nodes", "post", request("POST", "/v1/nodes", b"{", key=None), 400)
    await check("/v1/nodes", "post", request("POST", "/v1/nodes", b"{}", key=None, content_type="text/plain"), 415)
    data = {"node_small_id": 1, "public_address": "https://10.0.0.1", "country": "DE"}
    three_fields = {"data": data, "signature": atoma.sign(node.identity, data)}
    assert errors_by({"$ref": "#/components/schemas/AtomaRegistration"}, three_fields) == []
    await check("/v1/nodes", "post", request("POST", "/v1/nodes", json.dumps(three_fields).encode(), key=None), 400)
    await node.join()
    beat = msgspec.json.encode(Heartbeat(1, 2.0, (), node_head(node)))
    assert errors_by({"$ref": "#/components/schemas/Heartbeat"}, json.loads(beat)) == []
    for what, body, status in (("heartbeat", beat, 200), ("heartbeat", b"{}", 400), ("drain", b"{}", 200)):
        raw = node.signed("POST", f"/v1/nodes/{node.node_id}/{what}", body)
        await check(f"/v1/nodes/{{node_id}}/{what}", "post", raw, status)
    raw = node.signed("GET", f"/v1/nodes/{node.node_id}/dial", b"")
    await check("/v1/nodes/{node_id}/dial", "get", raw, 404)
    await complete.act(node.node_id, "remove")
    await check("/v1/nodes", "post", await registration(None), 403)


def node_head(node: Applicant) -> SignedHead:
    """Of its empty log."""
    message = head_message(node.node_id, node.gateway.fingerprint, 0, bytes(32), 0)
    return SignedHead(0, bytes(32), 0, node.identity.sign(RECEIPTS_PURPOSE, message))


async def test_real_answers_to_operators_are_as_documented(complete: Gateway, tmp_path: Path) -> None:
    """Of nodes of every kind and standing; each schema of a node allows what is there and nothing else."""
    node, pending = Applicant(complete, tmp_path), Applicant(complete, tmp_path, "pending")
    await pending.join()
    complete.registry.add(Node("local", "unix:/nowhere"))
    async with node.member():
        one, action, invites = "/v1/admin/nodes/{node_id}", "/v1/admin/nodes/{node_id}/{action}", "/v1/admin/invites"
        asked: list[tuple[str, str, str, object, int]] = [
            ("/v1/admin/nodes", "get", "/nodes", None, 200),
            ("/v1/admin/nodes", "post", "/nodes", {"address": "junk", "models": [{"id": "acme/tiny"}]}, 400),
            (one, "get", f"/nodes/{node.node_id}", None, 200),
            (one, "get", f"/nodes/{pending.node_id}", None, 200),
            (one, "get", "/nodes/local", None, 200),
            (one, "get", "/nodes/none", None, 404),
            (action, "post", f"/nodes/{node.node_id}/trust", None, 200),
            (action, "post", f"/nodes/{node.node_id}/weight", {"weight": 2}, 200),
            (action, "post", f"/nodes/{node.node_id}/weight", {"weight": 0}, 400),
            (action, "post", "/nodes/local/drain", None, 200),
            (action, "post", "/nodes/none/drain", None, 404),
            (action, "post", f"/nodes/{node.node_id}/remove", None, 200),
            (invites, "get", "/invites", None, 200),
            (invites, "post", "/invites", {"expires_in_s": 60, "note": "n"}, 200),
            (invites, "post", "/invites", None, 200),
            (invites, "post", "/invites", {"expires_in_s": 0}, 400),
            (invites + "/{invite_id}", "delete", "/invites/none", None, 404),
        ]
        for path, method, real, body, status in asked:
            reply = await complete.admin(method.upper(), real, body)
            assert reply.status == status, (real, reply.body)
            check_reply(path, method, reply)
        [open_one, *_] = json.loads((await complete.admin("GET", "/invites")).body)["data"]
        reply = await complete.admin("DELETE", f"/invites/{open_one['invite_id']}")
        check_reply(invites + "/{invite_id}", "delete", reply)
        raw = request("GET", "/v1/admin/nodes", key=complete.key("embeddings"))
        check_reply("/v1/admin/nodes", "get", await send(complete.port, raw))


async def test_real_answers_about_accounts_and_money_are_as_documented(complete: Gateway, tmp_path: Path) -> None:
    """Of an account that was made, credited, and bought something; each with the key of who may ask."""
    node = Applicant(complete, tmp_path)
    accounts, keys, prices = "/v1/admin/accounts", "/v1/admin/keys", "/v1/admin/prices"
    owner = complete.key("embeddings", "keys")

    async def check(path: str, method: str, asked: str, body: object, status: int) -> dict[str, Any]:
        key = owner if path.startswith(("/v1/account", "/v1/emb")) else complete.key("admin")
        reply = await complete.ask(method.upper(), asked, body, key=key, Idempotency_Key="k")
        assert reply.status == status, (asked, reply.body)
        check_reply(path, method, reply)
        return dict(json.loads(reply.body))

    async with node.member():
        for text, status in (("abc", 200), ("abc", 200), ("abd", 409)):
            await check("/v1/embeddings", "post", "/v1/embeddings", {"model": "tiny", "input": text}, status)
    await until("it is charged", lambda: complete.books.reports.entries("a")[0].kind == "charge")
    entry = complete.books.reports.entries("a")[0]
    bought, charged = entry.request_id, "/v1/account/entries/{entry_id}/requests"
    made = await check("/v1/account/keys", "post", "/v1/account/keys", {"scopes": ["keys"]}, 200)
    requests, paid = "/v1/admin/requests", f"/v1/admin/requests/{bought}"
    own, one, key = f"/v1/account/keys/{made['key_id']}", accounts + "/{account_id}", keys + "/{key_id}"
    credit = {"amount_nanousd": 1, "reference": "r"}
    payout = {"node": node.node_id, "amount_nanousd": 1, "reference": "p"}
    asked: list[tuple[str, str, str, object, int]] = [
        ("/v1/account", "get", "/v1/account", None, 200),
        ("/v1/account/usage", "get", "/v1/account/usage?from=2026-01-01&to=2026-12-31", None, 200),
        ("/v1/account/usage", "get", "/v1/account/usage?from=x", None, 400),
        ("/v1/account/entries", "get", "/v1/account/entries?limit=1", None, 200),
        (charged, "get", f"/v1/account/entries/{entry.entry_id}/requests?limit=1", None, 200),
        (charged, "get", "/v1/account/entries/none/requests", None, 404),
        ("/v1/account/keys", "get", "/v1/account/keys", None, 200),
        ("/v1/account/keys", "post", "/v1/account/keys", {"scopes": ["admin"]}, 403),
        ("/v1/account/keys/{key_id}", "delete", own, None, 200),
        ("/v1/account/keys/{key_id}", "delete", "/v1/account/keys/none", None, 404),
        (accounts, "get", accounts + "?limit=1", None, 200),
        (accounts, "get", accounts + "?page=1", None, 400),
        (accounts, "get", accounts + "?after=none", None, 404),
        (accounts, "post", accounts, {"id": "b"}, 200),
        (accounts, "post", accounts, {"id": "b"}, 400),
        (one, "get", f"{accounts}/b", None, 200),
        (one, "get", f"{accounts}/none", None, 404),
        (one, "post", f"{accounts}/b", {"credit_limit_nanousd": 1}, 200),
        (one, "post", f"{accounts}/b", {"cache": "free"}, 200),
        (one, "post", f"{accounts}/b", {}, 400),
        (one + "/credits", "post", f"{accounts}/b/credits", credit, 200),
        (one + "/credits", "post", f"{accounts}/b/credits", credit | {"amount_nanousd": -9, "reference": "s"}, 429),
        (keys, "get", f"{keys}?account=a&limit=1", None, 200),
        (keys, "post", keys, {"account": "b", "scopes": ["embeddings"], "limits": {"models": ["tiny"]}}, 200),
        (keys, "post", keys, {"account": "b", "scopes": ["embeddings"], "limits": {"models": ["none"]}}, 404),
        (key, "get", f"{keys}/{made['key_id']}", None, 200),
        (key, "delete", f"{keys}/{made['key_id']}", None, 200),
        (key, "post", f"{keys}/{made['key_id']}", {"name": "n"}, 400),
        (key + "/rotate", "post", f"{keys}/none/rotate", None, 404),
        (prices, "post", prices, {"model": "tiny", "price": 1}, 200),
        (prices, "get", f"{prices}?model=tiny", None, 200),
        (prices, "delete", f"{prices}?model=tiny", None, 200),
        (prices, "delete", f"{prices}?model=tiny", None, 404),
        (requests + "/{request_id}", "get", paid, None, 200),
        (requests + "/{request_id}/refund", "post", f"{paid}/refund", {"reference": "f"}, 200),
        ("/v1/admin/tabs/{tab_id}", "get", "/v1/admin/tabs/none", None, 404),
        ("/v1/admin/payables", "get", "/v1/admin/payables", None, 200),
        ("/v1/admin/payouts", "post", "/v1/admin/payouts", payout, 200),
        ("/v1/admin/ledger", "get", "/v1/admin/ledger", None, 200),
    ]
    for each in asked:
        await check(*each)
    live = complete.books.keys.create("a", ["embeddings"])[0].key_id
    await check(key, "post", f"{keys}/{live}", {"name": "n"}, 200)
    await check(key + "/rotate", "post", f"{keys}/{live}/rotate", None, 200)


def test_every_failure_is_in_the_error_table_and_every_code_on_some_route() -> None:
    assert [(row["status"], row["type"], row["code"]) for row in API["x-embedmesh-errors"]] == [
        (status, kind, failure.code) for failure, (status, kind) in TABLE.items()
    ]
    assert all(row["meaning"].endswith(".") and len(row["meaning"]) > 10 for row in API["x-embedmesh-errors"])
    on_routes = set(re.findall(r'"([a-z_]+)"', json.dumps([EMBEDDINGS, API["paths"]["/v1/models/{id}"]])))
    assert {failure.code for failure in TABLE} - on_routes == {"method_not_allowed"}
    assert "`method_not_allowed`" in API["info"]["description"]


# -- the page that this product was created from, and the examples ---------------------------------------------------


def _needs(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


COUNT = {"type": "integer", "minimum": 0}
ORIGINAL_REPLY = _needs(
    object={"type": "string"},
    model={"type": "string"},
    data={
        "type": "array",
        "items": _needs(
            object={"type": "string"},
            index=COUNT,
            embedding={"type": "array", "items": {"type": "number", "format": "float"}},
        ),
    },
    usage=_needs(prompt_tokens=COUNT, total_tokens=COUNT),
)
"""The 200 schema of `reference/create_embeddings_openapi.yaml`, restated. It knows no base64."""


def test_the_original_schema_accepts_our_example_reply() -> None:
    examples = EMBEDDINGS["responses"]["200"]["content"]["application/json"]["examples"]
    Draft202012Validator(ORIGINAL_REPLY).validate(examples["float"]["value"])
    for example in examples.values():
        assert errors_by({"$ref": "#/components/schemas/EmbeddingList"}, example["value"]) == []


def test_the_base64_example_holds_the_same_unit_vectors() -> None:
    examples = EMBEDDINGS["responses"]["200"]["content"]["application/json"]["examples"]
    numbers, encoded = (examples[name]["value"]["data"] for name in ("float", "base64"))
    for plain, packed in zip(numbers, encoded, strict=True):
        assert list(struct.unpack("<4f", base64.b64decode(packed["embedding"]))) == plain["embedding"]
        assert sum(component**2 for component in plain["embedding"]) == 1.0


def test_the_example_request_is_accepted() -> None:
    for example in EMBEDDINGS["requestBody"]["content"]["application/json"]["examples"].values():
        assert errors_by({"$ref": "#/components/schemas/EmbeddingRequest"}, example["value"]) == []


def test_the_samples_are_whole_and_name_the_origin_once() -> None:
    assert [sample["source"].count(ORIGIN) for sample in SAMPLES] == [1] * len(SAMPLES)
    assert all("EMBEDMESH_API_KEY" in sample["source"] for sample in SAMPLES)
    for sample in SAMPLES:
        if sample["lang"] == "python":
            compile(sample["source"], sample["label"], "exec")
    words = shlex.split(CURL)
    body = json.loads(words[words.index("-d") + 1])
    assert errors_by({"$ref": "#/components/schemas/EmbeddingRequest"}, body) == []


def test_the_samples_and_examples_of_rerank_are_requests_and_replies_of_it() -> None:
    assert [sample["source"].count(ORIGIN) for sample in RERANK_SAMPLES] == [1] * len(RERANK_SAMPLES)
    words = shlex.split(RERANK_CURL)
    asked = API["paths"]["/v1/rerank"]["post"]
    requests = [json.loads(words[words.index("-d") + 1])]
    requests += [each["value"] for each in asked["requestBody"]["content"]["application/json"]["examples"].values()]
    for request_of_it in requests:
        assert errors_by({"$ref": "#/components/schemas/RerankRequest"}, request_of_it) == []
    content = asked["responses"]["200"]["content"]["application/json"]
    assert [errors_by(content["schema"], each["value"]) for each in content["examples"].values()] == [[]]
