"""Scripted nodes: they answer right, each time with other vectors; or late, wrong, or not at all."""

import asyncio
import math
import random
import struct

from embedmesh.fleet.registry import Node, Registry
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeRefused, NodeUnreachable, UpstreamRefused
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState

PROBE_S = 1.0
SLOW_S_MAX = 9.0
FAILURES = (NodeBroke, NodeUnreachable, NodeBusy, NodeRefused, UpstreamRefused)


class Nodes:
    """All nodes, for one gateway. Implements the port `NodeClient`."""

    def __init__(self, dice: random.Random, bad_odds: float, slow_odds: float) -> None:
        self._dice = dice
        self._bad_odds = bad_odds
        self._slow_odds = slow_odds

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        dice = self._dice
        slow = dice.random() < self._slow_odds
        await asyncio.sleep(dice.random() * (SLOW_S_MAX if slow else 0.05))
        bad = dice.random()
        if bad < self._bad_odds:
            raise dice.choice(FAILURES)("by dice")
        tokens = part.tokens + (bad < 1.2 * self._bad_odds)  # a wrong count is a wrong answer
        return EmbedVectors(tokens=tokens, data=b"".join(self._vector(model.width) for _ in part.rows))

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> None:
        """Never at once."""

    def _vector(self, width: int) -> bytes:
        """Of length one; never the same again, so that replies can be told apart."""
        angle = self._dice.random() * math.tau
        return struct.pack(f"<{width}f", math.cos(angle), math.sin(angle), *(0.0,) * (width - 2))


async def probe(registry: Registry, models: list[str]) -> None:
    """In place of the real probes and the operator: nodes that are out come back after a while. For ever."""
    while True:
        for node in registry:
            if node.state is NodeState.QUARANTINED:
                registry.readmit(node)
            registry.answered_right(node, models)
        await asyncio.sleep(PROBE_S)


def make_nodes(registry: Registry, number: int, inputs_max: int | None, ask: int, models: list[str]) -> None:
    """They serve all models, for `ask` nano-USD per million tokens."""
    for each in range(number):
        node = registry.add(Node(f"n{each}", "unix:/nowhere"))
        node.asks = dict.fromkeys(models, ask)
        if inputs_max is not None:
            node.inputs_max = inputs_max
        registry.answered_right(node, models)
