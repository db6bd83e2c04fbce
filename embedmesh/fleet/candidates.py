"""The nodes of one decision: how long each would take, and whether it has room."""

from collections.abc import Sequence

from embedmesh.fleet.registry import Node
from embedmesh.rules.ports import Dice

FULL_SCAN_NODES_MAX = 100  # with more, a sample is nearly as good, and its cost does not grow
SAMPLE_NODES = 16  # random ones, beside the node that has just become free


class Candidate:
    """One node, with its estimates worked out once."""

    __slots__ = ("_bulk_s", "_fixed_s", "_now", "_penalty_s", "_per_token_s", "_small_s", "node", "tokens_per_s")

    def __init__(self, node: Node, now: float) -> None:
        self.node = node
        self.tokens_per_s = node.load.tokens_per_s
        self._per_token_s = 1.0 / self.tokens_per_s
        self._fixed_s = node.load.fixed_s
        self._penalty_s = node.penalty_s
        self.look(now)

    def look(self, now: float) -> None:
        """Its load has changed."""
        self._now = now
        self._bulk_s: float | None = None  # until it would begin with a large part; worked out when needed
        self._small_s: float | None = None

    def room(self, small: bool) -> bool:
        """Whether a small part may be sent to it now, or a large one."""
        return self.node.room(self._remaining_s(small), self._now, small=small)

    def finish_s(self, tokens: int, small: bool) -> float:
        """When it would be done with these tokens, too, in seconds from now."""
        paused_s = self.node.paused_until - self._now  # or all would wait for a full node
        return max(self._remaining_s(small), paused_s) + self._fixed_s + tokens * self._per_token_s + self._penalty_s

    def work_s(self, parts: int, tokens: int) -> float:
        """How long it works on some parts with these tokens in all."""
        return parts * self._fixed_s + tokens * self._per_token_s

    @property
    def room_in_s(self) -> float:
        """When a large part may be sent next, as expected."""
        return max(self._remaining_s(False), self.node.paused_until - self._now) - self._fixed_s

    def _remaining_s(self, small: bool) -> float:
        load = self.node.load
        if small and load.interleaves and load.bulk_parts:
            if self._small_s is None:
                self._small_s = load.remaining_s(self._now, small=True)
            return self._small_s
        if self._bulk_s is None:
            self._bulk_s = load.remaining_s(self._now)
        return self._bulk_s


def candidates_of(nodes: Sequence[Node], freed: Node | None, now: float, dice: Dice) -> list[Candidate]:
    """All nodes, or a sample of very many, with the one that was `freed`."""
    if len(nodes) > FULL_SCAN_NODES_MAX:
        drawn = {int(dice.random() * len(nodes)) for _ in range(SAMPLE_NODES)}
        sample = [nodes[at] for at in sorted(drawn)]
        if freed is not None and freed in nodes and freed not in sample:
            sample.append(freed)
        nodes = sample
    return [Candidate(node, now) for node in nodes]
