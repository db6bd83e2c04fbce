"""`/health`, `/readyz` and `/metrics`: the state of this gateway, for those who run it."""

from collections import Counter
from typing import Annotated, Literal

import msgspec
from aiohttp import web

from embedmesh.fleet.registry import Registry
from embedmesh.flow.identify import METRICS_SCOPES
from embedmesh.flow.world import World
from embedmesh.gateway.api.metrics import CONTENT_TYPE, Metrics
from embedmesh.gateway.api.replies import doc
from embedmesh.gateway.api.routes import NO_KEY, Api, ApiCall, ApiReply, RawHandler, Route
from embedmesh.http.bodies import json_reply
from embedmesh.rules.nodes import SHORTAGES

ANSWERED_WITHIN_S = 15.0  # /readyz: how old the last right answer may be


class Health(msgspec.Struct, frozen=True):
    """The process is up."""

    message: Literal["ok"]


class Readiness(msgspec.Struct, frozen=True):
    """Whether this gateway can do its work."""

    ready: bool
    reasons: Annotated[list[str], doc("Why it is not ready, or what makes it slow.")]


class OperationsApi(Api):
    """Handlers for those who run this gateway."""

    TAG = "Operations"

    def __init__(self, world: World, registry: Registry, metrics: Metrics) -> None:
        self._world = world
        self._registry = registry
        self._metrics = metrics

    async def get_health(self, call: ApiCall[None, None]) -> Health:
        """Is the process up? Replies as long as the process runs."""
        return Health("ok")

    async def get_readiness(self, request: web.BaseRequest) -> web.StreamResponse:
        """Can it do its work?

        Ready means: the store takes writes, and a node gave a right answer in the last 15 seconds. A server of another
        make is probed less often: while it is idle, a probe counts until the next one.
        """
        # This sends no probe: anybody may ask, and a probe may cost money.
        reasons = []
        if not self._world.ledger.healthy():
            reasons.append("the store does not take writes")
        since_s = self._registry.seconds_since_right_answer()
        if since_s is None:
            reasons.append("no node has given a right answer yet")
        elif not any(self._registry.proven(node, ANSWERED_WITHIN_S) for node in self._registry):
            reasons.append(f"no node has given a right answer for {since_s:.0f} s")
        elif not any(self._registry.ready(model.id) for model in self._world.catalogue.models):
            reasons.append("no node is ready")
        ready = not reasons
        return json_reply(Readiness(ready, reasons + _starved(self._registry)), status=200 if ready else 503)

    async def get_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        """Get metrics.

        Counters and gauges in Prometheus' text format. Needs the admin key or a key with the scope `metrics`.
        """
        return web.Response(body=await self._metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    ROUTES = (
        Route("GET", "/health", NO_KEY, get_health),
        Route(
            "GET",
            "/readyz",
            NO_KEY,
            get_readiness,
            raw=RawHandler({200: ApiReply("Ready.", Readiness), 503: ApiReply("Not ready, and why.", Readiness)}),
        ),
        Route(
            "GET",
            "/metrics",
            METRICS_SCOPES,
            get_metrics,
            raw=RawHandler({200: ApiReply("The metrics.", content_type="text/plain")}),
        ),
    )


def _starved(registry: Registry) -> list[str]:
    """How many nodes are starved, and why. Anybody may read this: no names."""
    short = Counter(node.shortage for node in registry if node.shortage in SHORTAGES)
    return [f"{count} of {len(list(registry))} nodes starved: {SHORTAGES[why]}" for why, count in short.items()]
