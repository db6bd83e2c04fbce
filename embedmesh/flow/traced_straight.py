"""The straight path of a gateway that traces.

A request that is not traced takes two looks more. One that is traced sees ports that mark what they do.
"""

import asyncio
from collections.abc import Awaitable, Mapping
from typing import Any

import msgspec

from embedmesh.flow.deliver import Outcome
from embedmesh.flow.embed import Embeddings
from embedmesh.flow.straight import LOOK_EVERY_S, Counts, Observe, StraightEmbeddings, StraightRequest
from embedmesh.flow.traced import EMBEDS, TracedLedger, ending, traced_world
from embedmesh.flow.traced_nodes import RequestTracing, TracedAttempts
from embedmesh.flow.world import World
from embedmesh.rules.exchange import RequestHead
from embedmesh.rules.shares import Room
from embedmesh.rules.straight import ToCaller
from embedmesh.rules.traces import Trace


class TracedHead(msgspec.Struct):
    """As `KnownHead`, with the trace that it is a part of. Until `rests_until` there is no room for its traces."""

    token: str
    head: RequestHead
    traceparent: str | None
    rests_until: float = float("-inf")


class TracedStraight(StraightEmbeddings):
    """Implements `rules.straight.Straight`."""

    def __init__(
        self,
        world: World,
        operation: Embeddings,
        room: Room,
        counts: Counts,
        observe: Observe,
        traced: RequestTracing,
    ) -> None:
        super().__init__(world, operation, room, counts, observe)
        self.whole_room = room
        self._traced = traced

    def knows(self, headers: Mapping[str, str]) -> Any:
        known = super().knows(headers)
        return None if known is None else TracedHead(known.token, known.head, headers.get("traceparent"))

    def ask(self, known: Any, body: bytes, to_caller: ToCaller) -> StraightRequest | None:
        now, tracing = self.world.clock.monotonic(), self._traced.tracing
        if now < known.rests_until:  # the ordinary case under load: it is told by its connection
            tracing.over_rate += 1
            return super().ask(known, body, to_caller)
        drawn = tracing.draw(known.traceparent)
        if drawn is None:
            return super().ask(known, body, to_caller)
        caller = self.world.keys.known(known.token, now)
        if caller is None:
            return None
        trace = tracing.start(drawn, caller.account_id, now)
        if trace is None:
            known.rests_until = tracing.rate_until
            return super().ask(known, body, to_caller)
        request = _TracedOne(self, self._traced, trace).ask(known, body, to_caller)
        if request is None:
            tracing.withdraw(trace)
        elif not self._looking:
            self._looking = True
            asyncio.get_running_loop().call_later(LOOK_EVERY_S, self._look)
        return request


class _TracedOne(StraightEmbeddings):
    """What one traced request sees as the straight path. Implements `Counts`, too."""

    def __init__(self, straight: TracedStraight, traced: RequestTracing, trace: Trace) -> None:
        ledger = TracedLedger(straight.world.ledger, trace, traced.now)
        world = traced_world(straight.world, TracedAttempts(trace, traced), ledger)
        super().__init__(world, straight.operation, straight.whole_room, self, self._observe)
        self._looking = True  # `straight` does, at all that are in flight
        self._straight = straight
        self._traced = traced
        self._trace = trace

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        self._describe(model)
        self._traced.tracing.end(self._trace, self._traced.now(), "" if code == "ok" else code)
        self._straight.counts.ended(code, model, seconds, tokens, nanousd)

    async def _observe(self, began: float, account_id: str, model: str, outcome: Awaitable[Outcome]) -> None:
        self._describe(model)
        await self._straight.observe(began, account_id, model, ending(self._traced, lambda: self._trace, outcome))

    def _describe(self, model: str) -> None:
        trace = self._trace
        trace.name = f"{EMBEDS} {model}"
        trace.tell(
            {"gen_ai.operation.name": EMBEDS, "gen_ai.request.model": model, "embedmesh.account_id": trace.owner}
        )
