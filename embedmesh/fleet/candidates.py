"""The nodes of one decision: how long each would take, and whether it has room."""

from collections.abc import Sequence

from embedmesh.fleet.registry import Node
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX
from embedmesh.rules.ports import Dice

FULL_SCAN_NODES_MAX = 100  # with more, a sample is nearly as good, and its cost does not grow
SAMPLE_NODES = 16  # random ones, beside the node that has just become free
SOON_S = 1.0  # every request may take thirty: a better estimate below this changes nothing


class Candidate:
    """One node, with its estimates worked out once."""

    __slots__ = ("_bulk", "_now", "_small", "node", "tokens_per_s")

    def __init__(self, node: Node, now: float) -> None:
        self.node = node
        self.tokens_per_s = node.load.tokens_per_s
        self.look(now)

    def look(self, now: float) -> None:
        """Its load has changed."""
        self._now = now
        self._bulk: tuple[float, bool, float] | None = None  # `Node.start` of a large part; worked out when needed
        self._small: tuple[float, bool, float] | None = None

    def room(self, small: bool) -> bool:
        """Whether a small part may be sent to it now, or a large one."""
        return self._start(small)[1]

    def finish_s(self, tokens: int, small: bool) -> float:
        """When it would be done with these tokens, too, in seconds from now."""
        return self._start(small)[2] + tokens * self.node.load.fit.per_token_s

    def work_s(self, parts: int, tokens: int) -> float:
        """How long it works on some parts with these tokens in all."""
        return self.node.load.fit.seconds(parts, tokens)

    @property
    def room_in_s(self) -> float:
        """When a large part may be sent next, as expected."""
        return self._start(False)[0] - self.node.load.fixed_s

    def _start(self, small: bool) -> tuple[float, bool, float]:
        if small:
            if self._small is None:
                self._small = self.node.start(self._now, True)
            return self._small
        if self._bulk is None:
            self._bulk = self.node.start(self._now, False)
        return self._bulk


def sample_of(nodes: Sequence[Node], freed: Node | None, dice: Dice) -> Sequence[Node]:
    """All nodes, or a sample of very many, with the one that was `freed`."""
    if len(nodes) <= FULL_SCAN_NODES_MAX:
        return nodes
    drawn = {int(dice.random() * len(nodes)) for _ in range(SAMPLE_NODES)}
    sample = [nodes[at] for at in sorted(drawn)]
    if freed is not None and freed in nodes and freed not in sample:
        sample.append(freed)
    return sample


def candidates_of(nodes: Sequence[Node], freed: Node | None, now: float, dice: Dice) -> list[Candidate]:
    """The nodes of one decision; see `sample_of`."""
    return [Candidate(node, now) for node in sample_of(nodes, freed, dice)]


def expected_s(nodes: Sequence[Node], queued_tokens: int | None, tokens: int, now: float, dice: Dice) -> float:
    """When nodes would be done with more tokens, in seconds from now. `queued_tokens` is None for an empty queue."""
    if queued_tokens is None and tokens <= WHOLE_TOKENS_MAX:
        any_s = Candidate(nodes[0], now).finish_s(tokens, True)
        if any_s <= SOON_S:
            return any_s
    candidates = candidates_of(nodes, None, now, dice)
    alone_s = min(candidate.finish_s(tokens, tokens <= WHOLE_TOKENS_MAX) for candidate in candidates)
    if queued_tokens is None:
        return alone_s
    all_tokens_per_s = sum(candidate.tokens_per_s for candidate in candidates) * len(nodes) / len(candidates)
    return max(alone_s, (queued_tokens + tokens) / all_tokens_per_s)
