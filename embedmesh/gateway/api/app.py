"""The gateway's routes. Each adapts HTTP to one call of the flow; no rule lives here."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import orjson
from aiohttp import web

from embedmesh import __version__
from embedmesh.dialects.openai.dialect import OpenAI
from embedmesh.fleet.registry import Registry
from embedmesh.flow.embed import Embeddings
from embedmesh.flow.identify import METRICS_SCOPES
from embedmesh.flow.paid import serve
from embedmesh.flow.world import World
from embedmesh.gateway.api.callers import in_room, with_key
from embedmesh.gateway.api.fleet_metrics import FleetCollector
from embedmesh.gateway.api.metrics import CONTENT_TYPE, Metrics
from embedmesh.gateway.api.openapi import docs_page, document
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.http.bodies import JSON_HEADERS, json_reply
from embedmesh.http.connections import Origins
from embedmesh.http.cors import Cors
from embedmesh.http.exchange import Exchange, GeneralExchange
from embedmesh.http.fast_path import FastPath
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.http.receive import BodyBudget
from embedmesh.http.routing import PATH_REMAINDER, Handler, Routes
from embedmesh.http.server import HttpServer
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Delivery, RequestHead
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import SHORTAGES
from embedmesh.rules.served import no_such_model
from embedmesh.rules.shares import Room

EMBEDDED_WITHIN_S = 15.0  # /readyz: how old the last real embedding may be
RETRIES_DIGITS_MAX = 4
BROKEN_OFF = "broken_off"  # the outcome of a request whose reply the caller did not take to its end
OPEN_REPLIES_MAX = 64  # some 100 kB each, until they are read
EMBEDDINGS = Embeddings(OpenAI())
EMBEDDINGS_LINE = b"POST /v1/embeddings HTTP/1.1\r\n"


class GatewayApp:
    """Routes over a `World`. Bounds what is handled at one time; more is refused at once."""

    def __init__(
        self,
        world: World,
        registry: Registry,
        *,
        in_flight_max: int,
        bodies: BodyBudget,
        gauges: Callable[[], dict[str, float]],
        more: Sequence[Routes] = (),
        workers: WorkerMetrics | None = None,
        write_s: float = WRITE_REPLY_S,
        cors: Cors | None = None,
        origins: Origins | None = None,
    ) -> None:
        """`more` are the routes of nodes, operators and accounts; `workers` share the port and a page of metrics.

        A reply has to be read within `write_s` seconds.
        """
        self._origins = origins or Origins()
        self._open_room = Room(
            OPEN_REPLIES_MAX, f"This gateway sends {OPEN_REPLIES_MAX} of its pages at one time. Try again shortly."
        )
        self._more = more
        self._write_s = write_s
        self._world = world
        self._registry = registry
        self._room = Room(
            in_flight_max,
            f"This gateway handles {in_flight_max:,} requests at one time, and of each account a share of that. Try "
            "again shortly.",
        )
        self._bodies = bodies
        self.metrics = Metrics(lambda: {"in_flight": self._room.taken, **gauges()}, workers)
        self.metrics.registry.register(FleetCollector(registry))
        self._openapi = orjson.dumps(document(__version__))
        self._docs, self._docs_csp = docs_page()
        self.server = HttpServer(
            self.routes(),
            on_internal_error=self.metrics.internal_errors.inc,
            fast_path=FastPath(EMBEDDINGS_LINE, self._embed, bodies, write_s=write_s, cors=cors),
            other_paths=OTHER_PATHS,
            cors=cors,
            origins=self._origins,
        )

    def routes(self) -> Routes:
        """Every path and method there is. What is not here is refused."""
        routes: dict[str, Mapping[str, Handler]] = {
            "/v1/embeddings": {"POST": self._embeddings},
            "/v1/models": {"GET": self._for_key(self._models)},
            "/v1/models/*": {"GET": self._for_key(self._model)},
            "/metrics": {"GET": self._for_key(self._metrics, *METRICS_SCOPES)},
            "/health": {"GET": self._health},
            "/readyz": {"GET": self._readyz},
            "/": {"GET": self._to_docs},
        }
        pages: Routes = {"/openapi.json": {"GET": self._openapi_json}, "/docs": {"GET": self._docs_html}}
        routes |= in_room(self._open_room, pages, self._origins.of_request)
        for each in self._more:
            routes |= each
        return routes

    def _for_key(self, handler: Handler, *any_of: str) -> Handler:
        return with_key(self._world.keys, handler, *any_of, rate_limits=self._world.rate_limits)

    async def _embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        response = web.Response(headers=JSON_HEADERS)
        exchange = GeneralExchange(request, self._bodies, response, self._write_s)
        try:
            await self._embed(exchange, request.get(PATH_REMAINDER))
        finally:
            exchange.end()
        return response

    async def _embed(self, exchange: Exchange, named: str | None = None) -> None:
        """`named` is the model that the path names."""
        began = self._world.clock.monotonic()
        account: str | None = None  # once it has room
        code = "dropped"  # the caller went, or a bug of ours
        model = ""  # once it is known

        async def receive(account_id: str) -> bytes:
            nonlocal account
            body = await exchange.body(account_id)  # before there is room for it: bodies that never end would fill it
            self._room.take(account_id)
            account = account_id
            return body

        def on_model(known: str) -> None:
            nonlocal model
            model = known

        try:
            outcome = await serve(self._world, EMBEDDINGS, _head(exchange, named), receive, exchange.deliver, on_model)
            code = "ok" if outcome.delivery is Delivery.WHOLE else BROKEN_OFF
            self.metrics.delivered(outcome.model, outcome.tokens, outcome.cost_nanousd)
        except Failure as failure:
            code = failure.code
            raise
        finally:
            if account is not None:
                self._room.give_back(account)
            self.metrics.ended(code, model, self._world.clock.monotonic() - began)

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        served = [model for model in self._world.catalogue.models if self._registry.ready(model.id)]
        return json_reply({"object": "list", "data": [self._described(model) for model in served]})

    async def _model(self, request: web.BaseRequest) -> web.StreamResponse:
        model = self._world.catalogue.find(request[PATH_REMAINDER])
        if model is None or not self._registry.ready(model.id):
            raise no_such_model(request[PATH_REMAINDER], self._world.catalogue, self._world.terms.serves)
        return json_reply(self._described(model))

    def _described(self, model: Model) -> dict[str, object]:
        return {
            "id": model.id,
            "object": "model",
            "created": 0,
            "owned_by": "embedmesh",
            "aliases": model.aliases,
            "tier": model.tier,
            "width": model.width,
            "max_tokens": model.max_tokens,
            "price_nanousd_per_million_tokens": model.price,
            "nodes": len(self._registry.ready(model.id)),
        }

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self.metrics.text(), headers={"Content-Type": CONTENT_TYPE})

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        return json_reply({"message": "ok"})

    async def _readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """Ready means: money can be held, and something was really embedded just now. Slow nodes are told of, too.

        By a server of another make, which is probed more rarely, since its last probe. A look sends none: anybody may
        look, and it may cost money.
        """
        reasons = []
        if not self._world.ledger.healthy():
            reasons.append("the store does not take writes")
        since_s = self._registry.seconds_since_right_answer()
        if since_s is None:
            reasons.append("no node has embedded anything yet")
        elif not any(self._registry.proven(node, EMBEDDED_WITHIN_S) for node in self._registry):
            reasons.append(f"no node has embedded anything for {since_s:.0f} s")
        elif not any(self._registry.ready(model.id) for model in self._world.catalogue.models):
            reasons.append("no node is ready")
        ready = not reasons
        reasons += starved(self._registry)
        return json_reply({"ready": ready, "reasons": reasons}, status=200 if ready else 503)

    async def _openapi_json(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(body=self._openapi, headers=JSON_HEADERS)

    async def _to_docs(self, request: web.BaseRequest) -> web.StreamResponse:
        return web.Response(
            status=302, body=b"See /docs.\n", headers={"Location": "/docs", "Content-Type": "text/plain"}
        )

    async def _docs_html(self, request: web.BaseRequest) -> web.StreamResponse:
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self._docs_csp,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return web.Response(body=self._docs, headers=headers)


def starved(registry: Registry) -> list[str]:
    """In words for operators: how many nodes are starved, and why. Anybody may read them: no names."""
    short = Counter(node.shortage for node in registry if node.shortage in SHORTAGES)
    return [f"{count} of {len(list(registry))} nodes starved: {SHORTAGES[why]}" for why, count in short.items()]


def _head(exchange: Exchange, named: str | None) -> RequestHead:
    """What the head of an embedding request says."""
    retries = exchange.header("x-stainless-retry-count") or ""
    return RequestHead(
        exchange.header("authorization"),
        exchange.header("idempotency-key"),
        int(retries) if retries.isascii() and retries.isdigit() and len(retries) <= RETRIES_DIGITS_MAX else None,
        exchange.own_id,
        exchange.header("api-key"),
        named,
    )
