"""The parts that nodes work on."""

from collections.abc import Callable, Mapping

from embedmesh.fleet.fair_queue import FairQueue
from embedmesh.fleet.registry import Node, Registry
from embedmesh.rules.forwarding import Part
from embedmesh.rules.ports import Clock


class Running:
    """Each part with its node, whose load it is, and whether its request was cut."""

    def __init__(
        self, registry: Registry, clock: Clock, queues: Mapping[str, FairQueue], freed: Callable[[Node], None]
    ) -> None:
        """`freed` hears of nodes that have more room, if anybody waits for it."""
        self._registry = registry
        self._clock = clock
        self._queues = queues
        self._freed = freed
        self.parts: dict[Part, tuple[Node, bool]] = {}  # bounded by what nodes may have at one time

    def end(self, part: Part, *, late: bool = False) -> Node:
        """It has failed, or was given up; see `Load.ended`."""
        node, bulk = self.parts.pop(part)
        node.load.ended(part.tokens, self._clock.monotonic(), False, bulk, late)
        return node

    def answered_now(self, part: Part, now: float) -> bool:
        """See `Fleet`."""
        node, bulk = self.parts.pop(part)
        counts = node.counts
        node.load.ended(part.tokens, now, True, bulk)
        counts["answers"] += 1
        counts["tokens"] += part.tokens
        if node.spotless:
            node.last_right_answer = now
        else:
            self._registry.answered_right(node, None, now)
        if self._queues:
            self._freed(node)
        return not node.trusted
