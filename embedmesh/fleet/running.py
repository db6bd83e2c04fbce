"""The parts that nodes work on."""

from embedmesh.fleet.registry import Node, Registry
from embedmesh.rules.forwarding import Part
from embedmesh.rules.ports import Clock


class Running:
    """Each part with its node, whose load it is, and whether its request was cut."""

    def __init__(self, registry: Registry, clock: Clock) -> None:
        self._registry = registry
        self._clock = clock
        self._parts: dict[Part, tuple[Node, bool]] = {}  # bounded by what nodes may have at one time

    def __len__(self) -> int:
        return len(self._parts)

    def begin(self, part: Part, node: Node, now: float, *, bulk: bool) -> None:
        """The node gets a part."""
        self._parts[part] = node, bulk
        node.load.began(part.tokens, now, bulk=bulk)

    def end(self, part: Part, *, well: bool, late: bool = False) -> Node:
        """It ended; see `Load.ended`."""
        node, bulk = self._parts.pop(part)
        node.load.ended(part.tokens, self._clock.monotonic(), well=well, bulk=bulk, late=late)
        return node

    def answered(self, part: Part) -> Node:
        """It was answered right."""
        node, bulk = self._parts.pop(part)
        now, tokens, counts = self._clock.monotonic(), part.tokens, node.counts
        node.load.ended(tokens, now, well=True, bulk=bulk)
        counts["answers"] += 1
        counts["tokens"] += tokens
        self._registry.answered_right(node, now=now)
        return node
