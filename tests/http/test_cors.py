"""Pages of other origins may call what callers use where the operator says so, and nothing else; on both ways."""

import asyncio
import re

import pytest

from embedmesh.gateway.api.app import GatewayApp
from embedmesh.gateway.api.openapi.responses import HEADERS
from embedmesh.gateway.network import parsed
from embedmesh.http.cors import MAY_READ, MAY_SEND, PREFLIGHT_HEADERS_MAX, Cors
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import SetupError
from tests.flow.world import make_world
from tests.http.raw import Raw, request, send, serving

APP, OTHER = "https://app.example.com", "https://evil.example.com"
BODY = b'{"model":"tiny","input":"abc"}'
SDK = (  # what a browser asks for before openai-node sends an embedding request
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout"
)
GRANTS = "access-control-"


def make_app(*origins: str) -> GatewayApp:
    world = make_world()
    cors = Cors(origins) if origins else None
    return GatewayApp(world, world.fleet.registry, in_flight_max=9, bodies=BodyBudget(10**8), gauges=dict, cors=cors)


def granted(reply: Raw) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name.startswith(GRANTS)}


async def ask(app: GatewayApp, *raws: bytes) -> list[Raw]:
    async with serving(app.server) as port:
        return [await send(port, raw) for raw in raws]


# each once on the fast path, and once behind it for the query
EITHER_WAY = ["/v1/embeddings", "/v1/embeddings?x=1"]


@pytest.mark.parametrize("path", EITHER_WAY)
@pytest.mark.parametrize(("key", "body", "status"), [("em_good", BODY, 200), (None, BODY, 401), ("em_good", b"{", 400)])
async def test_a_page_of_a_named_origin_may_read_replies_and_errors_alike(
    path: str, key: str | None, body: bytes, status: int
) -> None:
    [reply] = await ask(make_app(APP), request(path=path, body=body, key=key, Origin=APP))
    assert reply.status == status
    assert granted(reply) == {"access-control-allow-origin": APP, "access-control-expose-headers": MAY_READ}
    assert reply.headers["vary"] == "Origin"


@pytest.mark.parametrize("path", EITHER_WAY)
@pytest.mark.parametrize("origin", [OTHER, "null", APP + ":444", APP.upper(), None])
async def test_a_page_of_another_origin_may_not(path: str, origin: str | None) -> None:
    """It is answered, for the browser to withhold; and a cache must not take the answer for that to another."""
    fields = {} if origin is None else {"Origin": origin}
    [reply] = await ask(make_app(APP, "http://localhost:3000"), request(path=path, body=BODY, **fields))
    assert (reply.status, granted(reply), reply.headers["vary"]) == (200, {}, "Origin")


@pytest.mark.parametrize("path", EITHER_WAY)
async def test_a_star_is_for_every_origin_and_never_with_credentials(path: str) -> None:
    [reply] = await ask(make_app("*"), request(path=path, body=BODY, Origin=OTHER))
    assert granted(reply) == {"access-control-allow-origin": "*", "access-control-expose-headers": MAY_READ}
    assert "vary" not in reply.headers


@pytest.mark.parametrize("path", EITHER_WAY)
async def test_without_the_setting_nothing_is_granted(path: str) -> None:
    raws = [request(path=path, body=BODY, Origin=APP), preflight(path)]
    replies = await ask(make_app(), *raws)
    assert [reply.status for reply in replies] == [200, 405]
    assert all(granted(reply) == {} and "vary" not in reply.headers for reply in replies)


def preflight(path: str, method: str = "POST", origin: str = APP, headers: str = SDK) -> bytes:
    more = {"Access_Control_Request_Method": method, "Access_Control_Request_Headers": headers, "Origin": origin}
    return request("OPTIONS", path, key=None, content_type=None, **more)


ASKED = ["/v1/embeddings", "/v1/embeddings/", "/embeddings", "/openai/deployments/tiny/embeddings?api-version=1"]


@pytest.mark.parametrize("path", ASKED)
async def test_a_browser_that_asks_first_is_told_what_it_may_send(path: str) -> None:
    """All that the SDK sends, with any of its paths; no key is needed for the question."""
    [reply] = await ask(make_app(APP), preflight(path))
    assert (reply.status, reply.body) == (204, b"")
    assert reply.headers["access-control-allow-origin"] == APP
    assert reply.headers["access-control-allow-methods"] == "POST"
    assert reply.headers["access-control-allow-headers"].split(", ") == SDK.split(",")
    assert "access-control-allow-credentials" not in reply.headers
    assert reply.headers["vary"] == "Origin"


async def test_models_may_be_read() -> None:
    replies = await ask(
        make_app(APP), preflight("/v1/models", "GET"), request("GET", "/v1/models/acme/tiny", Origin=APP)
    )
    assert [reply.status for reply in replies] == [204, 200]
    assert replies[0].headers["access-control-allow-methods"] == "GET, HEAD"
    assert all(reply.headers["access-control-allow-origin"] == APP for reply in replies)


REFUSED = [
    preflight("/v1/embeddings", origin=OTHER),
    preflight("/v1/embeddings", "DELETE"),
    preflight("/v1/embeddings", "post"),
    request("OPTIONS", "/v1/embeddings", key=None, Origin=APP),
    request("OPTIONS", "/v1/embeddings", key=None, Access_Control_Request_Method="POST"),
]


@pytest.mark.parametrize("raw", REFUSED, ids=[str(n) for n in range(len(REFUSED))])
async def test_a_question_for_what_it_may_not_do_is_refused_as_any_other_method_is(raw: bytes) -> None:
    [reply] = await ask(make_app(APP), raw)
    assert (reply.status, reply.error["code"], reply.headers["allow"]) == (405, "method_not_allowed", "POST")
    assert "access-control-allow-methods" not in reply.headers


async def test_only_headers_of_the_list_may_be_sent_and_not_more_than_a_few() -> None:
    odd = "cookie, X-Stainless-OS ,x-stainless-" + "a" * 40 + ",x-forwarded-for,api-key,Idempotency-Key,x\tb"
    many = ",".join(f"x-stainless-{n}" for n in range(200))
    for headers, expected in (
        (odd, ["x-stainless-os", "api-key", "idempotency-key"]),
        (many, many.split(",")[:PREFLIGHT_HEADERS_MAX]),
    ):
        [reply] = await ask(make_app(APP), preflight("/v1/embeddings", headers=headers))
        assert reply.headers["access-control-allow-headers"].split(", ") == expected


@pytest.mark.parametrize("path", ["/v1/admin/keys", "/v1/admin", "/v1/nodes", "/v1/nodes/x/heartbeat", "/metrics"])
@pytest.mark.parametrize("origin", [APP, "*"])
async def test_nothing_of_operators_and_nodes_is_opened(path: str, origin: str) -> None:
    for method in ("GET", "POST", "OPTIONS"):
        raw = request(method, path, Origin=APP, Access_Control_Request_Method="GET")
        [reply] = await ask(make_app(origin), raw)
        assert granted(reply) == {}, (method, path)


async def test_the_fast_path_still_takes_a_browsers_request() -> None:
    """The page's requests are as cheap as others: they do not leave the fast path for their origin."""
    app = make_app(APP)
    async with serving(app.server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(body=BODY, Origin=APP))
        head = await reader.readuntil(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"), "in the fast path's order"
    assert head.count(b"Access-Control-Allow-Origin") == 1


RIGHT = ["https://a.b", "http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443", "*"]
WRONG = [
    "https://a.b/",
    "a.b",
    "https://a.b/path",
    "https://A.b",
    "https://*.b",
    "null",
    "",
    "ftp://a",
    "https://u@a.b",
]


@pytest.mark.parametrize("origin", RIGHT)
def test_what_an_origin_is(origin: str) -> None:
    assert Cors([origin]).headers("http://x" if origin == "*" else origin)["Access-Control-Allow-Origin"] == origin


@pytest.mark.parametrize("origin", WRONG)
def test_what_is_none_is_refused_at_start(origin: str) -> None:
    with pytest.raises(ValueError, match="is not an origin"):
        Cors([origin])
    with pytest.raises(SetupError, match="Mend --cors-origin"):
        parsed(Cors, [origin], "--cors-origin")


def test_every_header_of_ours_that_callers_get_may_be_read() -> None:
    """Those of HTTP's own and of nodes' routes aside."""
    others = {"Location", "Allow", "WWW-Authenticate", "Content-Security-Policy"}
    others |= {"Content-Digest", "Embedmesh-Receipt", "Signature-Input", "Signature"}
    assert set(MAY_READ.split(", ")) == {name.lower() for name in HEADERS if name not in others}
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in MAY_READ.split(", "))
    assert not MAY_SEND.fullmatch("cookie")


async def test_both_ways_say_the_same() -> None:
    """The same reply to the same request, be it on the fast path or not; apart from time and ids."""
    app = make_app(APP, "http://localhost:3000")
    fields = [{"Origin": APP}, {"Origin": OTHER}, {}, {"Origin": APP, "api_key": "em_good"}]
    fields += [{"Origin": APP, "api_key": "em_wrong"}, {"Origin": APP, "Idempotency_Key": "x" * 256}]
    for more in fields:
        for body in (BODY, b'{"model":"tiny","input":"abc","timeout":1}', b'{"model":"other","input":"a"}', b"\xff"):
            by_fast_path, general = await ask(app, *(request(path=path, body=body, **more) for path in EITHER_WAY))
            own = ("date", "x-request-id", "openai-processing-ms", "x-embedmesh-request")
            told = [
                (reply.status, reply.body, {name: value for name, value in reply.headers.items() if name not in own})
                for reply in (by_fast_path, general)
            ]
            assert told[0] == told[1]
