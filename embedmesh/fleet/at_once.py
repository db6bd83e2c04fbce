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
        node = nodes[0]
        expected_s = node.soon_s(tokens, now)
        if expected_s is None:
            return None
    else:
        chosen, _, _ = choose_candidate(
            policy, dice, candidates_of(nodes, None, now, dice), Whole(model_id), tokens, 0, small=True
        )
        if chosen is None:
            return None
        node, expected_s = chosen.node, chosen.finish_s(tokens, True)
    if not (expected_s <= SOON_S and node.reads_ids and stays_whole(tokens, inputs, node.inputs_max)):
        return None
    ask = node.asks.get(model_id, 0) if node.asks else 0
    return node, Part(node.node_id, FIRST if inputs == 1 else tuple(range(inputs)), tokens, expected_s, ask)
