"""The nodes a gateway knows: their states, their load, what they serve. Decides; never waits.

Each node's life is the table `embedmesh.rules.nodes.MOVES`. A node gets work only after it has given a verified
embedding, and again only after another one once it was ejected.
"""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from embedmesh.fleet.choose import choose
from embedmesh.fleet.load import Load
from embedmesh.rules.errors import Failure, NodeBusy, NodeUnreachable
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import FAILURES_TO_EJECT, MOVES, NodeEvent, NodeState
from embedmesh.rules.ports import Candidate, Clock, Dice


@dataclass
class Node:
    """One node as this gateway sees it. `models` are ids of the catalogue that it serves with the right digest."""

    node_id: str
    address: str
    state: NodeState = NodeState.UNPROVEN
    models: frozenset[str] = frozenset()
    failures_in_a_row: int = 0
    last_right_answer: float | None = None  # on the monotonic clock
    last_failure: str = "not asked yet"  # for operators
    load: Load = field(default_factory=Load)


class Registry:
    """Implements the port `Fleet`."""

    def __init__(self, clock: Clock, dice: Dice) -> None:
        self._nodes: dict[str, Node] = {}
        self._clock = clock
        self._dice = dice

    def add(self, node_id: str, address: str) -> Node:
        """A new node, unproven."""
        node = self._nodes[node_id] = Node(node_id, address)
        return node

    def __iter__(self) -> Iterator[Node]:
        return iter(self._nodes.values())

    def ready(self, model: Model) -> list[Node]:
        """The nodes that get work for this model."""
        return [node for node in self if node.state is NodeState.READY and model.id in node.models]

    def serves(self, model: Model) -> bool:
        return bool(self.ready(model))

    def pick(self, model: Model, tokens: int, tried: Collection[str]) -> Candidate | None:
        return choose(
            [
                Candidate(node.node_id, node.address, node.load.finish_s(tokens))
                for node in self.ready(model)
                if node.node_id not in tried
            ],
            self._dice,
        )

    def began(self, node_id: str, tokens: int) -> None:
        self._nodes[node_id].load.outstanding += tokens

    def abandoned(self, node_id: str, tokens: int) -> None:
        self._nodes[node_id].load.outstanding -= tokens

    def ended(self, node_id: str, tokens: int, seconds: float, failure: Failure | None) -> None:
        node = self._nodes[node_id]
        ahead = node.load.outstanding
        node.load.outstanding -= tokens
        if failure is None:
            node.load.learn(ahead, seconds)
            self.answered_right(node, node.models)
        else:
            self.failed(node, failure)

    def answered_right(self, node: Node, models: Iterable[str]) -> None:
        """A verified embedding: the only way in, and back in."""
        node.models = frozenset(models)
        node.failures_in_a_row = 0
        node.last_right_answer = self._clock.monotonic()
        self._move(node, NodeEvent.RIGHT_ANSWER)

    def failed(self, node: Node, failure: Failure) -> None:
        """An attempt or a probe went wrong. Refused load is no failure."""
        if isinstance(failure, NodeBusy):
            return
        node.last_failure = f"{type(failure).__name__}: {failure.message}"
        node.failures_in_a_row += 1
        if isinstance(failure, NodeUnreachable):
            self._move(node, NodeEvent.UNREACHABLE)
        elif node.failures_in_a_row >= FAILURES_TO_EJECT and self._may_eject():
            self._move(node, NodeEvent.FAILURES)

    def seconds_since_right_answer(self) -> float | None:
        """Since any node really embedded something; None when none ever did."""
        times = [node.last_right_answer for node in self if node.last_right_answer is not None]
        return self._clock.monotonic() - max(times) if times else None

    def _may_eject(self) -> bool:
        """For slowness and errors never more than half: where all seem bad, it may be us, or the load."""
        out = sum(node.state is NodeState.EJECTED for node in self)
        return 2 * (out + 1) <= len(self._nodes)

    def _move(self, node: Node, event: NodeEvent) -> None:
        node.state = MOVES[node.state, event]
