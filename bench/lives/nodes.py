"""Scripted nodes: they answer right, each time with other vectors; or late, wrong, or not at all."""

import asyncio
import math
import random
import struct

from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeRefused, NodeUnreachable, UpstreamRefused
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState

PROBE_S = 1.0
SLOW_S_MAX = 9.0
BUSY_ODDS = 0.05  # of a node without an idle connection: then no attempt begins at once
FAILURES: tuple[type[NodeFailure], ...] = (NodeBroke, NodeUnreachable, NodeBusy, NodeRefused, UpstreamRefused)


class SimAttempt:
    """One that ends later, unless it is broken off. Implements `Attempt`."""

    def __init__(self, timer: asyncio.TimerHandle) -> None:
        self._timer = timer

    def cancel(self) -> None:
        self._timer.cancel()


class Nodes:
    """All nodes, for one gateway. Implements the port `NodeClient`."""

    def __init__(self, dice: random.Random, bad_odds: float, slow_odds: float) -> None:
        self._dice = dice
        self._bad_odds = bad_odds
        self._slow_odds = slow_odds

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        await asyncio.sleep(self._takes_s())
        ended = self._end(part, model)
        if isinstance(ended, NodeFailure):
            raise ended
        return ended

    def link_to(self, node_id: str) -> "Nodes":
        return self

    def ask(
        self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner
    ) -> "SimAttempt | None":
        if self._dice.random() < BUSY_ODDS:
            return None  # no connection is idle

        def end() -> None:
            ended = self._end(part, model)
            if isinstance(ended, NodeFailure):
                owner.failed(ended)
            else:
                owner.answered(ended)

        return SimAttempt(asyncio.get_running_loop().call_later(self._takes_s(), end))

    def _takes_s(self) -> float:
        slow = self._dice.random() < self._slow_odds
        return self._dice.random() * (SLOW_S_MAX if slow else 0.05)

    def _end(self, part: Part, model: Model) -> EmbedVectors | NodeFailure:
        bad = self._dice.random()
        if bad < self._bad_odds:
            return self._dice.choice(FAILURES)("by dice")
        tokens = part.tokens + (bad < 1.2 * self._bad_odds)  # a wrong count is a wrong answer
        return EmbedVectors(tokens=tokens, data=b"".join(self._vector(model.width) for _ in part.rows))

    def _vector(self, width: int) -> bytes:
        """Of length one; never the same again, so that replies can be told apart."""
        angle = self._dice.random() * math.tau
        return struct.pack(f"<{width}f", math.cos(angle), math.sin(angle), *(0.0,) * (width - 2))


async def probe(registry: Registry) -> None:
    """In place of the real probes and the operator: nodes that are out come back after a while. For ever."""
    while True:
        for node in registry:
            if node.state is NodeState.QUARANTINED:
                registry.readmit(node)
            registry.answered_right(node, list(node.asks))
        await asyncio.sleep(PROBE_S)


def make_speaking_nodes(registry: Registry, number: int, ask: int, models: list[str]) -> None:
    """Servers of another make, which read no ids."""
    for each in range(number):
        node = registry.add(Node(f"s{each}", "unix:/nowhere", kind=UPSTREAM, reads_ids=False))
        node.asks = dict.fromkeys(models, ask)
        registry.answered_right(node, models)


def make_nodes(registry: Registry, number: int, inputs_max: int | None, ask: int, models: list[str]) -> None:
    """They serve all models, for `ask` nano-USD per million tokens."""
    for each in range(number):
        node = registry.add(Node(f"n{each}", "unix:/nowhere"))
        node.asks = dict.fromkeys(models, ask)
        if inputs_max is not None:
            node.inputs_max = inputs_max
        registry.answered_right(node, models)
