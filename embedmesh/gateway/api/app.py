"""A gateway's HTTP server: the routes of all APIs, with the fast path for embeddings."""

from collections.abc import Callable, Sequence
from typing import Any

from embedmesh import __version__
from embedmesh.fleet.registry import Registry
from embedmesh.flow.confidential import SealedNodes
from embedmesh.flow.leases import Leases
from embedmesh.flow.traced_nodes import RequestTracing
from embedmesh.flow.world import World
from embedmesh.gateway.api.confidential_api import ConfidentialApi
from embedmesh.gateway.api.confidential_generation_api import ConfidentialGenerationApi
from embedmesh.gateway.api.dialects_api import DialectsApi
from embedmesh.gateway.api.fleet_metrics import FleetCollector
from embedmesh.gateway.api.generation_api import GenerationApi
from embedmesh.gateway.api.metrics import NO_ROUTE, Metrics
from embedmesh.gateway.api.models_api import ModelsApi
from embedmesh.gateway.api.openapi import document
from embedmesh.gateway.api.operations_api import OperationsApi
from embedmesh.gateway.api.pages_api import PagesApi
from embedmesh.gateway.api.rerank_api import RerankApi
from embedmesh.gateway.api.routes import Api, OperatorAccess, router
from embedmesh.gateway.api.traced_api import embeddings_api
from embedmesh.gateway.api.worker_metrics import WorkerMetrics
from embedmesh.http.connections import Origins
from embedmesh.http.cors import Cors
from embedmesh.http.fast_path import FastPath
from embedmesh.http.paths import OTHER_PATHS
from embedmesh.http.receive import BODIES_FULL, BodyBudget
from embedmesh.http.routing import Routes
from embedmesh.http.server import HttpServer
from embedmesh.http.straight import StraightPath
from embedmesh.rules.confidential import Locks
from embedmesh.rules.generation import GeneratingClient
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.metrics import MetricReadings
from embedmesh.rules.request_record import AccessLog
from embedmesh.rules.sealed_generation import GeneratingNodes
from embedmesh.rules.shares import Room

EMBEDDINGS_LINE = b"POST /v1/embeddings HTTP/1.1\r\n"

FULL = "This gateway handles {:,} requests at a time, shared among accounts. Try again shortly."


class GatewayApp:
    """Routes over a `World`. Bounds what is handled at one time; more is refused at once."""

    def __init__(
        self,
        world: World,
        registry: Registry,
        *,
        in_flight_max: int,
        bodies: BodyBudget,
        gauges: Callable[[], MetricReadings],
        more: Sequence[Api] = (),
        workers: WorkerMetrics | None = None,
        write_s: float = WRITE_REPLY_S,
        cors: Cors | None = None,
        origins: Origins | None = None,
        confidential: tuple[Locks, SealedNodes] | None = None,
        generating: tuple[GeneratingClient, Leases] | None = None,
        sidecars: tuple[Locks, GeneratingNodes, Leases] | None = None,
        traced: RequestTracing | None = None,
        operators: OperatorAccess | None = None,
        access: AccessLog | None = None,
    ) -> None:
        """`more` are the APIs for nodes, operators and accounts; `workers` share the port and a page of metrics.

        A caller has to read a reply within `write_s` seconds.
        """
        self._world, self._registry = world, registry
        self._operators = operators or OperatorAccess()
        self._origins = origins = origins or Origins()
        self._room, self._bodies = room, _ = Room(in_flight_max, FULL.format(in_flight_max)), bodies
        self.metrics = Metrics(lambda: self._readings() | {"in_flight": room.taken, **gauges()}, workers)
        self.metrics.registry.register(FleetCollector(registry))
        embeddings = embeddings_api(world, self.metrics, room, bodies, write_s, traced)
        self.pages = PagesApi(document(__version__), origins)
        sealed = [] if confidential is None else [ConfidentialApi(world, embeddings, room, *confidential)]
        self._apis: tuple[Api, ...] = (
            embeddings,
            RerankApi(embeddings),
            DialectsApi(world, registry, embeddings),
            ModelsApi(world, registry),
            OperationsApi(world, registry, self.metrics),
            self.pages,
            *([] if generating is None else [GenerationApi(embeddings, *generating)]),
            *sealed,
            *([] if sidecars is None else [ConfidentialGenerationApi(embeddings, *sidecars)]),
            *more,
        )
        others = {line: handle for api in sealed for line, handle in api.fast().items()}
        self._fast_path = FastPath(EMBEDDINGS_LINE, embeddings.answer, bodies, write_s, cors, others, access)
        self.server = HttpServer(
            self.routes(),
            on_internal_error=self.metrics.internal_errors.inc,
            on_unrouted=lambda code: self.metrics.route(NO_ROUTE).ended(code, "", 0.0),
            fast_path=StraightPath(self._fast_path, embeddings.straight),
            other_paths=OTHER_PATHS,
            cors=cors,
            origins=origins,
            access=access,
        )

    def resize(self, in_flight_max: int, body_bytes_total_max: int) -> None:
        """How much is handled at one time from now on. What is under way goes on."""
        self._room.resize(in_flight_max, FULL.format(in_flight_max))
        self._bodies.resize(body_bytes_total_max, BODIES_FULL.format(body_bytes_total_max))

    def use_cors(self, cors: Cors | None) -> None:
        """For replies from now on."""
        self._fast_path.cors = cors
        self.server.use_cors(cors)

    def routes(self) -> Routes:
        """All paths and methods. Anything else is refused."""
        keys, limits = self._world.keys, self._world.rate_limits
        operators = self._operators._replace(refused=self.metrics.admin_refused.inc)
        origin_of, counts = self._origins.address_of, self.metrics.route
        return router(self._apis, keys, limits, operators=operators, origin_of=origin_of, counts=counts)

    def _readings(self) -> dict[str, Any]:
        return {name: value for api in self._apis for name, value in api.readings().items()}
