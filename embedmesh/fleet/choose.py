"""Which node gets a part: one policy a function, over options that were measured before. Dice are handed in.

An option may have no room now. A policy may still prefer it; then nobody is chosen, and the work waits in line for it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from embedmesh.fleet.registry import Node
from embedmesh.rules.ports import Dice

TIE = 1.05  # nodes within five percent of the best are equal: the estimate is no better than that
LATER_MAX_S = 1.0  # how much later a cheaper, or weightier, node may be done than the fastest


class Option(NamedTuple):
    """A node that may take a part: when it would be done, in seconds from now, and whether it may have it now."""

    node: Node
    finish_s: float
    room: bool
    price: int = 0  # what the node asks, in nano-USD per million tokens


Policy = Callable[[Sequence[Option], float, Dice], Option | None]
"""Options, the time in seconds until all that goes before would be done anywhere, dice -> who takes it, if anybody."""


def fastest(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """The node that would be done first; equal ones by dice, or the first would take all the work.

    A slower one is used where even that is done before the fast ones could have done all that is ahead (`horizon_s`).
    """
    best_s = min(option.finish_s for option in options)
    limit_s = max(best_s, horizon_s) * TIE
    free = [option for option in options if option.room and option.finish_s <= limit_s]
    if not free:
        return None
    first_s = min(option.finish_s for option in free) * TIE
    return _any([option for option in free if option.finish_s <= first_s], dice)


def cheapest(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """The node that asks least among those that would be done in reasonable time; waited for if it has no room."""
    patient = _patient(options, horizon_s)
    least = min(option.price for option in patient)
    return fastest([option for option in patient if option.price == least], 0.0, dice)


def weighted(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """A node with room by chance, as often as the operator's weights say."""
    free = [option for option in _patient(options, horizon_s) if option.room]
    drawn = dice.random() * sum(option.node.weight for option in free)
    for option in free:
        drawn -= option.node.weight
        if drawn < 0:
            return option
    return None


def _patient(options: Sequence[Option], horizon_s: float) -> list[Option]:
    limit_s = max(min(option.finish_s for option in options), horizon_s) + LATER_MAX_S
    return [option for option in options if option.finish_s <= limit_s]


def _any(options: Sequence[Option], dice: Dice) -> Option:
    return options[0] if len(options) == 1 else options[int(dice.random() * len(options))]


POLICIES: dict[str, Policy] = {"fastest": fastest, "cheapest": cheapest, "weighted": weighted}
