"""Nodes as they are looked at during one decision: what each would take, and whether it has room."""

from collections.abc import Iterable, Sequence

from embedmesh.fleet.registry import Node
from embedmesh.rules.ports import Dice

FULL_SCAN_NODES_MAX = 100  # above, only some are looked at: nearly as good, and the cost does not grow
SAMPLE_NODES = 16  # so many by dice, beside the one that has just become free


class Spot:
    """One node, with what is asked again and again of it worked out once."""

    __slots__ = ("_bulk_s", "_fixed_s", "_penalty_s", "_per_token_s", "_small_s", "node", "room", "tokens_per_s")

    def __init__(self, node: Node, now: float) -> None:
        self.node = node
        self.tokens_per_s = node.load.tokens_per_s
        self._per_token_s = 1.0 / self.tokens_per_s
        self._fixed_s = node.load.fixed_s
        self._penalty_s = node.penalty_s
        self.look(now)

    def look(self, now: float) -> None:
        """Its load has changed. `room[True]` says whether a small part may be sent to it, `room[False]` a large one."""
        load = self.node.load
        self._bulk_s = self._small_s = load.remaining_s(now)
        if load.interleaves and load.bulk_parts:
            self._small_s = load.remaining_s(now, small=True)
        self.room = self.node.room(self._bulk_s, now, small=False), self.node.room(self._small_s, now, small=True)
        paused_s = self.node.paused_until - now  # or all would wait for a node that is full
        self._bulk_s, self._small_s = max(self._bulk_s, paused_s), max(self._small_s, paused_s)

    def finish_s(self, tokens: int, small: bool) -> float:
        """When it would be done with so many tokens more, in seconds from now."""
        before_s = self._small_s if small else self._bulk_s
        return before_s + self._fixed_s + tokens * self._per_token_s + self._penalty_s

    def work_s(self, parts: int, tokens: int) -> float:
        """How long it works on so many parts with so many tokens in all."""
        return parts * self._fixed_s + tokens * self._per_token_s

    @property
    def room_in_s(self) -> float:
        """When a large part may be sent next, if all goes as expected."""
        return self._bulk_s - self._fixed_s


def look_at(nodes: Sequence[Node], freed: Node | None, now: float, dice: Dice) -> list[Spot]:
    """All of them, or of very many some, with the one that was `freed`: of those two the better is nearly the best."""
    if len(nodes) <= FULL_SCAN_NODES_MAX:
        return [Spot(node, now) for node in nodes]
    return [Spot(node, now) for node in _some(nodes, freed, dice)]


def _some(nodes: Sequence[Node], freed: Node | None, dice: Dice) -> Iterable[Node]:
    drawn = {int(dice.random() * len(nodes)) for _ in range(SAMPLE_NODES)}
    some = [nodes[at] for at in sorted(drawn)]
    if freed is not None and freed in nodes and freed not in some:
        some.append(freed)
    return some
