"""A whole request for a node that has room at once, without a place in the queue. Chooses as the queue would."""

from collections.abc import Sequence
from typing import NamedTuple

from embedmesh.fleet.candidates import candidates_of
from embedmesh.fleet.choose import Policy, choose_candidate
from embedmesh.fleet.registry import Node
from embedmesh.fleet.spread import stays_whole
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.forwarding import Part
from embedmesh.rules.ports import Dice

FIRST = (0,)
SOON_S = 1.0  # every request may take thirty: a better estimate below this changes nothing


class Whole(NamedTuple):
    """Stands for a request that one node gets whole."""

    model_id: str
    whole: bool = True


def part_at_once(
    model_id: str, counted: Counted, nodes: Sequence[Node], now: float, dice: Dice, policy: Policy
) -> tuple[Node, Part] | None:
    """The node for all inputs, and what it is asked for; None if none has room, or would be done within SOON_S."""
    lengths = counted.lengths
    tokens, inputs = sum(lengths), len(lengths)
    if len(nodes) == 1:
        node, load = nodes[0], nodes[0].load
        remaining_s = load.remaining_s(now, small=True) if load.parts else 0.0
        if not node.room(remaining_s, now, small=True):
            return None
        expected_s = remaining_s + load.part_s(tokens) + node.penalty_s
    else:
        chosen, _, _ = choose_candidate(
            policy, dice, candidates_of(nodes, None, now, dice), Whole(model_id), tokens, 0, small=True
        )
        if chosen is None:
            return None
        node, expected_s = chosen.node, chosen.finish_s(tokens, True)
    if expected_s > SOON_S or not node.reads_ids or not stays_whole(tokens, inputs, node.inputs_max):
        return None
    ask = node.asks.get(model_id, 0) if node.asks else 0
    return node, Part(node.node_id, FIRST if inputs == 1 else tuple(range(inputs)), tokens, expected_s, ask)
