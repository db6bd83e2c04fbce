"""Which node gets a part: one policy a function, over options that were measured before. Dice are handed in.

A policy may prefer a node that has no room now. Then none is chosen, and the request waits in the queue for it.
"""

from collections.abc import Callable, Sequence
from hashlib import blake2b
from operator import attrgetter

import msgspec

from embedmesh.fleet.candidates import Candidate
from embedmesh.fleet.queued import QueuedRequest
from embedmesh.fleet.registry import Node
from embedmesh.fleet.spread import part_tokens_max
from embedmesh.rules.ports import Dice

TIE = 1.05  # nodes within five percent of the best count as equal: the estimate is no better
FINISH_S = attrgetter("finish_s")
HOME_TIMES, HOME_S = 2.0, 1.0  # how much later a node may be done that has a request's beginning in its cache
LATER_MAX_S = 1.0  # how much later than the fastest a cheaper, or weightier, node may be done


class Option(msgspec.Struct, frozen=True):
    """A node that may take a part: when it would be done, in seconds from now, and whether it may have it now."""

    node: Node
    finish_s: float
    room: bool
    price: int = 0  # of the node, in nano-USD per million tokens


Policy = Callable[[Sequence[Option], float, Dice], Option | None]
"""Options, seconds until all earlier work would be done by any nodes, dice → the node that takes it, or None."""


def fastest(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """The node that would be done first; among equal ones by dice, or the first would take all the work.

    A slower one is used if it is done before the fast ones could have done all that is ahead (`horizon_s`).
    """
    limit_s = max(min(options, key=FINISH_S).finish_s, horizon_s) * TIE
    free = [option for option in options if option.room and option.finish_s <= limit_s]
    if not free:
        return None
    first_s = min(free, key=FINISH_S).finish_s * TIE
    return _any([option for option in free if option.finish_s <= first_s], dice)


def cheapest(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """The cheapest node that would be done in reasonable time. If it has no room, the request waits for it."""
    in_time = _in_time(options, horizon_s)
    least = min(option.price for option in in_time)
    return fastest([option for option in in_time if option.price == least], 0.0, dice)


def weighted(options: Sequence[Option], horizon_s: float, dice: Dice) -> Option | None:
    """A random node with room, in proportion to the operator's weights."""
    free = [option for option in _in_time(options, horizon_s) if option.room]
    drawn = dice.random() * sum(option.node.weight for option in free)
    for option in free:
        drawn -= option.node.weight
        if drawn < 0:
            return option
    return None


def _in_time(options: Sequence[Option], horizon_s: float) -> list[Option]:
    limit_s = max(min(options, key=FINISH_S).finish_s, horizon_s) + LATER_MAX_S
    return [option for option in options if option.finish_s <= limit_s]


def _any(options: Sequence[Option], dice: Dice) -> Option:
    return options[0] if len(options) == 1 else options[int(dice.random() * len(options))]


def choose(policy: Policy, dice: Dice, options: Sequence[Option], ahead: int) -> tuple[Option | None, float]:
    """Which node gets some inputs, behind `ahead` tokens that no node has yet.

    If none does, the last value is how many tokens must be ahead for a free node to be used.
    """
    speed = 0.0
    outstanding = ahead
    room = False
    for option in options:
        load = option.node.load
        speed += 1.0 / load.fit.per_token_s
        outstanding += load.tokens
        room = room or option.room
    if not room:
        return None, 0.0
    chosen = policy(options, outstanding / speed, dice)
    if chosen is None:
        free_s = min(option.finish_s for option in options if option.room)
        return None, free_s / TIE * speed - (outstanding - ahead)
    return chosen, 0.0


def at_home(options: Sequence[Option], chosen: Option, beginning: bytes) -> Option:
    """The node that gets requests which begin alike, unless it has no room or would be done much later than `chosen`.

    By rendezvous hashing: every gateway finds the same node, and a node that goes moves its own requests only.
    """
    home = max(options, key=lambda each: blake2b(each.node.node_id.encode(), key=beginning, digest_size=8).digest())
    return home if home.room and home.finish_s <= HOME_TIMES * chosen.finish_s + HOME_S else chosen


def choose_candidate(
    policy: Policy,
    dice: Dice,
    candidates: list[Candidate],
    request: QueuedRequest,
    tokens: int,
    ahead: int,
    *,
    small: bool,
) -> tuple[Candidate | None, int, float]:
    """Which node gets inputs of a request, `tokens` in all, behind `ahead` tokens, and at most how many of them.

    The last value: see `choose`.
    """
    whole = request.whole
    if len(candidates) == 1 and whole and candidates[0].room(small):
        return candidates[0], tokens, 0.0
    free_speed = 0.0 if whole else sum(each.tokens_per_s for each in candidates if each.room(small))
    options, limits = [], []
    for candidate in candidates:
        node = candidate.node
        limit = tokens if whole else part_tokens_max(tokens, candidate.tokens_per_s, free_speed)
        limits.append(limit)
        finish_s = candidate.finish_s(min(limit, tokens), whole)
        options.append(Option(node, finish_s, candidate.room(small), node.asks.get(request.model_id, 0)))
    chosen, needed = choose(policy, dice, options, ahead if whole else ahead + tokens)
    if chosen is None:
        return None, 0, needed
    if request.beginning is not None:
        chosen = at_home(options, chosen, request.beginning)
    at = options.index(chosen)
    return candidates[at], limits[at], 0.0


POLICIES: dict[str, Policy] = {"fastest": fastest, "cheapest": cheapest, "weighted": weighted}
