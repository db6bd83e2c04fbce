"""The exchange with callers at a gateway that traces: see `embedmesh.flow.traced`."""

from collections.abc import Awaitable, Callable
from typing import cast

from embedmesh.flow.deliver import Outcome
from embedmesh.flow.operation import Operation
from embedmesh.flow.traced import TracedOperation
from embedmesh.flow.traced_nodes import RequestTracing
from embedmesh.flow.traced_straight import TracedStraight
from embedmesh.flow.world import World
from embedmesh.gateway.api.embeddings_api import EMBEDDINGS, EmbeddingsApi
from embedmesh.gateway.api.metrics import Metrics
from embedmesh.http.exchange import Exchange
from embedmesh.http.paths import EMBEDDINGS_PATH
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.exchange import Receive, RequestHead
from embedmesh.rules.shares import Room


class TracedEmbeddingsApi(EmbeddingsApi):
    """What is paid goes through it: each request has an operation of its own, which is traced."""

    def __init__(
        self, world: World, metrics: Metrics, room: Room, bodies: BodyBudget, write_s: float, traced: RequestTracing
    ) -> None:
        super().__init__(world, metrics, room, bodies, write_s)
        self._traced = traced
        self.straight = TracedStraight(world, EMBEDDINGS, room, metrics.route(EMBEDDINGS_PATH), self._go_on, traced)

    def _serve(
        self,
        exchange: Exchange,
        operation: Operation,
        head: RequestHead,
        receive: Receive,
        on_model: Callable[[str], None],
    ) -> Awaitable[Outcome]:
        one = TracedOperation(operation, self._traced, exchange.header("traceparent"))
        return one.ending(super()._serve(exchange, cast(Operation, one), head, receive, on_model))


def embeddings_api(
    world: World, metrics: Metrics, room: Room, bodies: BodyBudget, write_s: float, traced: RequestTracing | None
) -> EmbeddingsApi:
    """The exchange with callers, `traced` or not."""
    if traced is None:
        return EmbeddingsApi(world, metrics, room, bodies, write_s)
    return TracedEmbeddingsApi(world, metrics, room, bodies, write_s, traced)
