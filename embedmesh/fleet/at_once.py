"""A whole request for a node that has room at once, without a place in the queue. Chooses as the queue would."""

from collections.abc import Mapping, Sequence

from embedmesh.fleet.candidates import SOON_S, sample_of
from embedmesh.fleet.choose import Option, Policy, choose
from embedmesh.fleet.fair_queue import FairQueue
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.retries import RetryBudget
from embedmesh.fleet.running import Running
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Dice

FIRST = (0,)


class AtOnce:
    """Gives whole requests to nodes while nobody waits."""

    def __init__(
        self,
        registry: Registry,
        running: Running,
        budget: RetryBudget,
        queues: Mapping[str, FairQueue],
        dice: Dice,
        policy: Policy,
    ) -> None:
        self._registry = registry
        self._last_ready = registry.last_ready
        self._parts = running.parts
        self._budget = budget
        self._queues = queues
        self._dice = dice
        self._policy = policy

    def use(self, policy: Policy) -> None:
        """For requests from now on."""
        self._policy = policy

    def try_now(self, model: Model, counted: Counted, now: float) -> Part | None:
        """See `Fleet`. None, too, if no node would be done within SOON_S."""
        if self._queues:
            return None  # there is an order to keep
        model_id, lengths = model.id, counted.lengths
        tokens, inputs = sum(lengths), len(lengths)
        if tokens > WHOLE_TOKENS_MAX:
            return None  # it would be cut
        nodes = self._last_ready.get(model_id) or self._registry.ready(model_id)
        if len(nodes) == 1:
            node = nodes[0]
            _, room, expected_s = node.start(now, True, tokens)
            if not room:
                return None
        else:
            chosen = self._choose(model_id, tokens, nodes, now)
            if chosen is None:
                return None
            node, expected_s = chosen.node, chosen.finish_s
        if expected_s > SOON_S or not node.reads_ids or inputs > node.inputs_max:
            return None
        rows = FIRST if inputs == 1 else tuple(range(inputs))
        part = Part(node.node_id, rows, tokens, expected_s, node.asks.get(model_id, 0))
        if now < (second := self._budget.newest).end:
            second.requests += 1
        else:
            self._budget.request(now)
        self._parts[part] = node, False
        node.load.began(tokens, now)
        return part

    def _choose(self, model_id: str, tokens: int, nodes: Sequence[Node], now: float) -> Option | None:
        options = []
        for node in sample_of(nodes, None, self._dice):
            _, room, done_s = node.start(now, True, tokens)
            options.append(Option(node, done_s, room, node.asks.get(model_id, 0)))
        chosen, _ = choose(self._policy, self._dice, options, 0)
        return chosen
