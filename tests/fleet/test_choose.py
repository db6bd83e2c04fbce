"""Each policy is a table: what is known of the nodes, and who gets the part, if anybody does now."""

import random
from collections import Counter

import pytest

from embedmesh.fleet.choose import Option, at_home, cheapest, fastest, weighted
from embedmesh.fleet.registry import Node


def option(name: str, finish_s: float, *, room: bool = True, price: int = 0, weight: float = 1.0) -> Option:
    return Option(Node(name, "", weight=weight), finish_s, room, price)


FASTEST = [
    # options, horizon, who
    ([option("a", 0.1)], 0.0, "a"),
    ([option("a", 0.1), option("b", 0.2)], 0.0, "a"),
    ([option("a", 0.1, room=False), option("b", 0.2)], 0.0, None),  # waiting for a is better
    ([option("a", 0.1, room=False), option("b", 0.104)], 0.0, "b"),  # as good
    ([option("a", 0.1, room=False), option("b", 0.2)], 0.3, "b"),  # so much is ahead that b is done before
    ([option("a", 0.1, room=False), option("b", 0.1, room=False)], 9.0, None),
    ([option("a", 0.3), option("b", 0.2), option("c", 0.1, room=False)], 0.5, "b"),
]


@pytest.mark.parametrize(("options", "horizon_s", "who"), FASTEST)
def test_fastest(options: list[Option], horizon_s: float, who: str | None) -> None:
    chosen = fastest(options, horizon_s, random.Random(1))
    assert (chosen.node.node_id if chosen else None) == who


CHEAPEST = [
    ([option("a", 0.1, price=5), option("b", 0.5, price=4)], 0.0, "b"),
    ([option("a", 0.1, price=5), option("b", 1.2, price=4)], 0.0, "a"),  # too late
    ([option("a", 0.1, price=5), option("b", 0.5, price=4, room=False)], 0.0, None),  # worth waiting for
    ([option("a", 0.1, price=4), option("b", 0.2, price=4), option("c", 0.1, price=5)], 0.0, "a"),
]


@pytest.mark.parametrize(("options", "horizon_s", "who"), CHEAPEST)
def test_cheapest(options: list[Option], horizon_s: float, who: str | None) -> None:
    chosen = cheapest(options, horizon_s, random.Random(1))
    assert (chosen.node.node_id if chosen else None) == who


def test_what_begins_alike_goes_to_one_node_while_that_is_not_much_busier() -> None:
    nodes = [option(f"n{number}", 1.0) for number in range(4)]
    homes = {at_home(nodes, nodes[0], bytes([each])).node.node_id for each in range(64)}
    assert len(homes) == 4
    home = at_home(nodes, nodes[0], b"system prompt")
    others = [each for each in nodes if each is not home]
    assert at_home([*others, home], others[0], b"system prompt") is home
    moved = [at_home(others, others[0], bytes([each])) for each in range(64)]
    stayed = [at_home(nodes, nodes[0], bytes([each])) for each in range(64)]
    assert all(now is before for now, before in zip(moved, stayed, strict=True) if before is not home)
    full, busy = option(home.node.node_id, 1.0, room=False), option(home.node.node_id, 3.1)
    assert at_home([*others, full], others[0], b"system prompt") is others[0]
    assert at_home([*others, busy], others[0], b"system prompt") is others[0]


def test_equal_nodes_share_by_dice() -> None:
    options = [option("slow", 0.2), option("a", 0.100), option("b", 0.101)]
    dice = random.Random(3)
    asked = Counter(one.node.node_id for _ in range(1000) if (one := fastest(options, 0.0, dice)))
    assert asked["slow"] == 0
    assert abs(asked["a"] - asked["b"]) < 120


def test_weighted_is_as_often_as_the_weights_say_among_those_with_room() -> None:
    dice = random.Random(3)
    options = [option("a", 0.1, weight=3), option("b", 0.2), option("full", 0.1, weight=9, room=False)]
    asked = Counter(one.node.node_id for _ in range(1000) if (one := weighted(options, 0.0, dice)))
    assert set(asked) == {"a", "b"}
    assert 700 < asked["a"] < 800
    assert weighted(options[2:], 0.0, dice) is None
