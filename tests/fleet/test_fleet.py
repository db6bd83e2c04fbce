"""Nodes get work after a verified embedding, lose it by the table of moves, and the one that is done first is asked."""

import random
from collections import Counter

import pytest

from embedmesh.fleet.choose import choose
from embedmesh.fleet.load import PRIOR_TOKENS_PER_S, Load
from embedmesh.fleet.registry import Registry
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeUnreachable, WrongAnswer
from embedmesh.rules.nodes import MOVES, NodeEvent, NodeState
from embedmesh.rules.ports import Candidate
from tests.flow.world import MODEL, NATIVE, Clock


def ready_registry(nodes: int = 2) -> Registry:
    registry = Registry(Clock(), random.Random(1))
    for number in range(nodes):
        registry.answered_right(registry.add(f"n{number}", "unix:/nowhere"), [MODEL.id])
    return registry


def state(registry: Registry) -> NodeState:
    return next(iter(registry)).state


def test_every_move_of_a_node_is_in_the_table() -> None:
    assert set(MOVES) == {(state, event) for state in NodeState for event in NodeEvent}


def test_a_node_gets_work_only_after_a_verified_embedding() -> None:
    registry = Registry(Clock(), random.Random(1))
    node = registry.add("n0", "unix:/nowhere")
    assert registry.pick(MODEL, 10, ()) is None
    registry.answered_right(node, [MODEL.id])
    candidate = registry.pick(MODEL, 10, ())
    assert candidate is not None
    assert candidate.node_id == "n0"
    assert registry.pick(NATIVE, 10, ()) is None, "it does not serve that model"
    assert registry.pick(MODEL, 10, ("n0",)) is None, "it was tried"


SPELLS = [
    # what attempts end with, state after
    ([NodeUnreachable("x")], NodeState.EJECTED),
    ([NodeBroke("x")], NodeState.READY),
    ([NodeBroke("x")] * 2, NodeState.READY),
    ([NodeBroke("x")] * 3, NodeState.EJECTED),
    ([WrongAnswer("x"), NodeBroke("x"), WrongAnswer("x")], NodeState.EJECTED),
    ([NodeBroke("x"), NodeBroke("x"), None, NodeBroke("x")], NodeState.READY),
    ([NodeBusy("x")] * 10, NodeState.READY),
    ([NodeUnreachable("x"), None], NodeState.READY),
]


@pytest.mark.parametrize(("spell", "after"), SPELLS)
def test_a_node_is_ejected_for_failures_and_not_for_load(spell, after) -> None:
    registry = ready_registry()
    for failure in spell:
        registry.began("n0", 5)
        registry.ended("n0", 5, 0.01, failure)
    assert state(registry) is after
    assert next(iter(registry)).load.outstanding == 0


def test_for_errors_never_more_than_half_are_ejected() -> None:
    """Where all seem bad it may be us, or the load; a node that nobody reaches is out all the same."""
    registry = ready_registry(nodes=4)
    for number in range(4):
        for _ in range(3):
            registry.began(f"n{number}", 5)
            registry.ended(f"n{number}", 5, 0.01, NodeBroke("x"))
    assert [node.state for node in registry] == [NodeState.EJECTED] * 2 + [NodeState.READY] * 2
    for node in registry:
        registry.failed(node, NodeUnreachable("x"))
    assert {node.state for node in registry} == {NodeState.EJECTED}


def test_the_time_since_a_right_answer_is_known() -> None:
    registry = Registry(clock := Clock(), random.Random(1))
    assert registry.seconds_since_right_answer() is None
    registry.answered_right(registry.add("n0", "unix:/nowhere"), [MODEL.id])
    clock.now += 7
    assert registry.seconds_since_right_answer() == 7


def test_the_node_that_would_be_done_first_is_asked_and_ties_are_broken_by_dice() -> None:
    slow, first, second = Candidate("slow", "", 0.2), Candidate("a", "", 0.100), Candidate("b", "", 0.101)
    asked = Counter(choose([slow, first, second], dice).node_id for dice in [random.Random(3)] for _ in range(1000))
    assert asked["slow"] == 0
    assert abs(asked["a"] - asked["b"]) < 120
    assert choose([], random.Random()) is None


@pytest.mark.parametrize(("tokens_per_s", "fixed_s"), [(15_000, 0.003), (200, 0.05), (400_000, 0.001)])
def test_a_nodes_speed_and_fixed_cost_are_learned_from_a_mix_of_sizes(tokens_per_s: float, fixed_s: float) -> None:
    dice = random.Random(5)
    load = Load()
    for _ in range(200):
        tokens = dice.choice([8, 60, 300, 5_000])
        load.learn(tokens, (fixed_s + tokens / tokens_per_s) * dice.uniform(0.95, 1.05))
    assert load.finish_s(10_000) == pytest.approx(fixed_s + 10_000 / tokens_per_s, rel=0.1)
    load.outstanding = 10_000
    assert load.finish_s(10_000) == pytest.approx(fixed_s + 20_000 / tokens_per_s, rel=0.1)


def test_small_probes_alone_do_not_invent_a_speed() -> None:
    """A hundred probes of a dozen tokens say little of bulk: the estimate stays within reach of the prior."""
    load = Load()
    for _ in range(100):
        load.learn(12, 0.004)
    assert 0.0 < load.finish_s(12) < 0.02
    assert load.finish_s(100_000) <= 2 * 100_000 / 50


def test_one_outlier_does_not_close_a_node() -> None:
    load = Load()
    for _ in range(50):
        load.learn(100, 0.01)
        load.learn(1_000, 0.08)
    load.learn(10, 5.0)
    assert load.finish_s(100) < 2.0
    assert 0 < load.finish_s(1) <= load.finish_s(int(PRIOR_TOKENS_PER_S))
