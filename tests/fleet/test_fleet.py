"""Nodes get work after a verified embedding, lose it by the table of moves, and come back step by step."""

from collections import Counter
from collections.abc import Callable, Sequence

import pytest

from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.rules.errors import (
    NodeBroke,
    NodeBusy,
    NodeFailure,
    NodeTooSlow,
    NodeUnreachable,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.nodes import MOVES, OUT_FIRST_S, TRIAL_ANSWERS, Check, NodeEvent, NodeState, Reason
from tests.flow.world import MODEL, NATIVE, Clock


def ready_registry(nodes: int = 2, clock: Clock | None = None) -> Registry:
    registry = Registry(clock or Clock())
    for number in range(nodes):
        registry.answered_right(registry.add(Node(f"n{number}", "unix:/nowhere")), [MODEL.id])
    return registry


def first(registry: Registry) -> Node:
    return next(iter(registry))


def suffer(registry: Registry, spell: Sequence[NodeFailure | None]) -> None:
    for failure in spell:
        if failure is None:
            registry.answered_right(first(registry))
        else:
            registry.failed(first(registry), failure)


def test_every_move_of_a_node_is_in_the_table() -> None:
    assert set(MOVES) == {(state, event) for state in NodeState for event in NodeEvent}


def test_a_quarantine_ends_by_readmission_only() -> None:
    ends = {event for event in NodeEvent if MOVES[NodeState.QUARANTINED, event] is not NodeState.QUARANTINED}
    assert ends == {NodeEvent.READMITTED}
    assert MOVES[NodeState.QUARANTINED, NodeEvent.READMITTED] is NodeState.UNPROVEN, "and then it proves itself again"


def test_a_node_gets_work_only_after_a_verified_embedding() -> None:
    registry = Registry(Clock())
    node = registry.add(Node("n0", "unix:/nowhere"))
    assert registry.ready(MODEL.id) == []
    registry.answered_right(node, [MODEL.id])
    assert registry.ready(MODEL.id) == [node]
    assert registry.ready(NATIVE.id) == [], "it does not serve that model"
    registry.drain(node)
    assert registry.ready(MODEL.id) == [], "it is about to leave"
    registry.drain(node, draining=False)
    assert registry.ready(MODEL.id) == [node]
    registry.remove("n0")
    assert registry.ready(MODEL.id) == []


def test_a_model_may_come_until_every_node_has_said_that_it_serves_others() -> None:
    registry = Registry(Clock())
    assert registry.may_come(MODEL.id), "there is no node that could say"
    node = registry.add(Node("n0", "unix:/nowhere"))
    assert registry.may_come(MODEL.id), "it has not said"
    node.models = frozenset({MODEL.id})
    assert registry.may_come(MODEL.id), "it says so, and is not believed yet"
    assert not registry.may_come(NATIVE.id)
    registry.answered_right(node, [MODEL.id])
    registry.serves(node, [NATIVE.id])
    assert registry.may_come(MODEL.id), "it has served it"
    registry.remove("n0")
    registry.answered_right(registry.add(Node("n1", "unix:/nowhere")), ["other"])
    assert registry.may_come(MODEL.id) and registry.may_come(NATIVE.id) and not registry.may_come("none")


SPELLS = [
    # what attempts end with, state after
    ([NodeUnreachable("x")], NodeState.EJECTED),
    ([NodeBroke("x")], NodeState.READY),
    ([NodeBroke("x")] * 2, NodeState.READY),
    ([NodeBroke("x")] * 3, NodeState.EJECTED),
    ([WrongAnswer("x"), NodeBroke("x"), WrongAnswer("x")], NodeState.EJECTED),
    ([NodeBroke("x"), NodeBroke("x"), None, NodeBroke("x")], NodeState.READY),
    ([NodeBroke("x"), None] * 9, NodeState.READY),
    ([NodeBroke("x"), None] * 9 + [NodeBroke("x")], NodeState.EJECTED),
    ([NodeBusy("x")] * 10, NodeState.READY),
    ([NodeUnreachable("x"), None], NodeState.READY),
    ([WrongAnswer("x"), None, None, WrongAnswer("x")], NodeState.READY),
    ([WrongAnswer("x"), None, None] * 3, NodeState.QUARANTINED),
    ([WrongAnswer("x")] * 3 + [None] * 10, NodeState.QUARANTINED),
    ([WrongAnswer("x"), *[None] * 99] * 3, NodeState.READY),
    ([UpstreamRefused("x")] * 100, NodeState.READY),
]


@pytest.mark.parametrize(("spell", "after"), SPELLS)
def test_a_node_is_out_for_failures_and_wrong_answers_and_not_for_load(
    spell: list[NodeFailure | None], after: NodeState
) -> None:
    registry = ready_registry()
    suffer(registry, spell)
    assert first(registry).state is after


def test_a_node_that_the_operator_trusts_is_never_quarantined_for_broken_answers() -> None:
    registry = ready_registry()
    first(registry).trusted = True
    suffer(registry, [WrongAnswer("x")] * 3)
    assert first(registry).state is NodeState.EJECTED


def test_for_errors_never_more_than_half_are_ejected() -> None:
    """Where all seem bad it may be us, or the load; a node that nobody reaches is out all the same."""
    registry = ready_registry(nodes=4)
    for node in registry:
        for _ in range(3):
            registry.failed(node, NodeBroke("x"))
    assert [node.state for node in registry] == [NodeState.EJECTED] * 2 + [NodeState.READY] * 2
    for node in registry:
        registry.failed(node, NodeUnreachable("x"))
    assert {node.state for node in registry} == {NodeState.EJECTED}


@pytest.mark.parametrize(
    ("failure", "state"), [(NodeTooSlow("x"), NodeState.READY), (NodeBroke("x"), NodeState.EJECTED)]
)
def test_a_slow_node_is_not_ejected_while_nobody_else_serves_one_of_its_models(
    failure: NodeFailure, state: NodeState
) -> None:
    """Slow answers are better than none; that others serve other models helps nobody."""
    registry = ready_registry(nodes=3)
    node, other, _ = registry
    registry.answered_right(node, [MODEL.id, NATIVE.id])
    suffer(registry, [failure] * 12)
    assert node.state is state
    registry.answered_right(other, [MODEL.id, NATIVE.id])
    suffer(registry, [failure])
    assert node.state is NodeState.EJECTED


def test_after_an_ejection_a_node_is_on_trial_and_each_time_stays_out_for_longer() -> None:
    registry = ready_registry(clock=(clock := Clock()))
    node = first(registry)
    suffer(registry, [NodeBroke("x")] * 3 + [None])
    assert (node.state, node.trial) == (NodeState.READY, TRIAL_ANSWERS), "the first time it is back at once"
    node.load.began(10, clock.now)
    assert not node.start(clock.now, True)[1], "on trial it has one part at a time"
    node.load.ended(10, clock.now, well=True)
    suffer(registry, [NodeBroke("x")])
    assert node.state is NodeState.EJECTED, "one failure on trial is enough"
    suffer(registry, [None])
    assert node.state is NodeState.EJECTED, "too early"
    clock.now += OUT_FIRST_S
    suffer(registry, [None] * (1 + TRIAL_ANSWERS))
    assert (node.state, node.trial) == (NodeState.READY, 0)
    suffer(registry, [NodeBroke("x")] * 3)
    clock.now += OUT_FIRST_S
    registry.answered_right(list(registry)[1])
    suffer(registry, [None])
    assert node.state is NodeState.EJECTED, "the third time it stays out twice as long"
    clock.now += OUT_FIRST_S
    suffer(registry, [None])
    assert first(registry).state is NodeState.READY


def replaced(registry: Registry) -> Node:
    """The second node, which serves what the first does, and works."""
    second = list(registry)[1]
    registry.answered_right(second)
    return second


def alone(registry: Registry) -> None:
    registry.remove("n1")


def other_is_out(registry: Registry) -> None:
    registry.failed(replaced(registry), NodeUnreachable("x"))


def other_leaves(registry: Registry) -> None:
    registry.drain(replaced(registry))


def other_serves_something_else(registry: Registry) -> None:
    registry.serves(replaced(registry), [NATIVE.id])


@pytest.mark.parametrize(
    ("others", "after"),
    [
        (replaced, NodeState.EJECTED),
        (alone, NodeState.READY),
        (other_is_out, NodeState.READY),
        (other_leaves, NodeState.READY),
        (other_serves_something_else, NodeState.READY),
    ],
)
def test_a_node_that_died_often_stays_out_only_while_others_do_its_work(
    others: Callable[[Registry], object], after: NodeState
) -> None:
    registry = ready_registry(clock=Clock())
    for _ in range(8):
        registry.failed(first(registry), NodeUnreachable("x"))
        first(registry).out_until, out_until = 0.0, first(registry).out_until
        suffer(registry, [None])
        first(registry).out_until = out_until
    registry.failed(first(registry), NodeUnreachable("x"))
    others(registry)
    suffer(registry, [None])
    assert first(registry).state is after


@pytest.mark.parametrize(("asked_s", "paused_s"), [(0.0, 0.05), (0.3, 0.3), (60.0, 1.0)])
def test_a_node_that_says_429_gets_a_pause_within_bounds(asked_s: float, paused_s: float) -> None:
    registry = ready_registry(clock=(clock := Clock()))
    suffer(registry, [NodeBusy("x", retry_after_s=asked_s)])
    node = first(registry)
    assert not node.start(clock.now + paused_s - 0.01, True)[1]
    assert node.start(clock.now + paused_s + 0.01, True)[1]


def test_failures_make_a_node_less_wanted_before_they_eject_it() -> None:
    registry = ready_registry()
    node = first(registry)
    penalties = []
    for _ in range(8):
        node.recent.append(True)
        node.doubt = 1
        penalties.append(node.penalty_s)
    assert penalties == [0.25, 0.5, 1, 2, 4, 8, 8, 8]


def test_a_node_that_answers_nothing_but_probes_is_asked_less_and_less() -> None:
    """Each caller's request that it fails costs it more right answers to probes than the one before."""
    registry = ready_registry()
    node = first(registry)
    probes = []
    for _ in range(5):
        registry.failed(node, NodeBroke("x"))
        probes.append(0)
        while node.penalty_s:
            registry.answered_right(node, [MODEL.id])
            probes[-1] += 1
    assert probes == [1, 4, 16, 64, 256]


def test_the_time_since_a_right_answer_is_known() -> None:
    registry = Registry(clock := Clock())
    assert registry.seconds_since_right_answer() is None
    registry.answered_right(registry.add(Node("n0", "unix:/nowhere")), [MODEL.id])
    clock.now += 7
    assert registry.seconds_since_right_answer() == 7


def test_who_waits_is_told_of_every_change_in_who_gets_work() -> None:
    told: Counter[str] = Counter()
    registry = Registry(Clock())
    registry.on_change.append(lambda: told.update(["change"]))
    node = registry.add(Node("n0", "unix:/nowhere"))
    registry.answered_right(node, [MODEL.id])
    before = told["change"]
    registry.answered_right(node, [MODEL.id])
    assert told["change"] == before, "nothing new"
    registry.failed(node, NodeUnreachable("x"))
    assert told["change"] == before + 1


PAGE = WrongAnswer("the reply is not of OpenAI's form", check=Check.FORM)
REASONS = [
    # what it failed, state after, what operators are told
    ([NodeUnreachable("no connection")], NodeState.EJECTED, "connect: no connection"),
    ([NodeBroke("HTTP 500", check=Check.STATUS_5XX)] * 3, NodeState.EJECTED, "status_5xx: HTTP 500"),
    (
        [WrongAnswer("another width", check=Check.WIDTH)] * 3,
        NodeState.QUARANTINED,
        "width: 3 wrong answers of late, at last: another width",
    ),
    ([NodeUnreachable("no connection"), NodeBusy("HTTP 429")], NodeState.EJECTED, "connect: no connection"),
    ([NodeBusy("HTTP 429"), NodeBusy("HTTP 503")], NodeState.READY, "busy: HTTP 503"),
    ([NodeBroke("it broke"), None], NodeState.READY, "closed: it broke"),
]


@pytest.mark.parametrize(("spell", "after", "told"), REASONS)
def test_why_a_node_was_sent_away_is_remembered_by_its_check(
    spell: list[NodeFailure | None], after: NodeState, told: str
) -> None:
    """And kept once it is well again, with the time: else nobody could say why it comes and goes."""
    registry = ready_registry(clock=(clock := Clock()))
    quarantines: list[str] = []
    registry.on_quarantine.append(lambda node, why: quarantines.append(why))
    suffer(registry, spell)
    node = first(registry)
    assert (node.state, str(node.last_failure), node.last_failed) == (after, told, clock.now)
    assert node.last_failure is not None
    away = [] if after is NodeState.READY else [(after, node.last_failure.check)]
    assert list(node.sent_away.elements()) == away
    assert quarantines == ([told] if after is NodeState.QUARANTINED else [])
    clock.now += 10
    registry.readmit(node)
    registry.answered_right(node, [MODEL.id])
    assert (node.state, str(node.last_failure), node.last_failed) == (NodeState.READY, told, clock.now - 10)


def test_every_failure_is_counted_by_its_check() -> None:
    registry = ready_registry()
    suffer(registry, [NodeBusy("x"), NodeBusy("x"), UpstreamRefused("x"), WrongAnswer("x", check=Check.ZERO)])
    assert first(registry).failed == {Check.BUSY: 2, Check.STATUS_4XX: 1, Check.ZERO: 1}


@pytest.mark.parametrize("check", [*Check, None])
def test_a_reason_that_was_written_down_is_read_as_it_was(check: Check | None) -> None:
    """Also one of a version that had no checks, whatever its words are."""
    for words in ("its vectors: other ones", "", "a: b"):
        reason = Reason(check, words)
        assert Reason.read(str(reason)) == reason


def test_what_a_server_refuses_to_a_probe_counts_and_what_it_refuses_to_a_caller_does_not() -> None:
    """A caller's text may be too long for it; the probe's is not."""
    registry = ready_registry()
    node = first(registry)
    suffer(registry, [UpstreamRefused("x")] * 3)
    assert (node.failures_in_a_row, node.doubt, sum(node.recent)) == (0, 1, 0)
    suffer(registry, [None])
    assert node.doubt == 0
    for _ in range(3):
        registry.failed(node, UpstreamRefused("x"), by_probe=True)
    assert node.state is NodeState.EJECTED


@pytest.mark.parametrize(("generates", "after"), [(False, NodeState.EJECTED), (True, NodeState.READY)])
def test_no_caller_breaks_a_node_that_generates(generates: bool, after: NodeState) -> None:
    """llama.cpp answers 500 where a template wants turns to alternate, and in mid-stream where a grammar has no way."""
    registry = ready_registry()
    node = first(registry)
    node.generates = generates
    suffer(registry, [NodeBroke("x", check=Check.STATUS_5XX)] * 9)
    assert (node.state, bool(node.doubt)) == (after, True)
    for _ in range(3):
        registry.failed(node, NodeBroke("x", check=Check.STATUS_5XX), by_probe=True)
    assert node.state is NodeState.EJECTED


@pytest.mark.parametrize(("kind", "after"), [(UPSTREAM, NodeState.EJECTED), ("remote", NodeState.QUARANTINED)])
def test_a_page_in_place_of_vectors_is_what_stands_before_a_server_and_no_lie_of_it(
    kind: str, after: NodeState
) -> None:
    registry = ready_registry()
    first(registry).kind = kind
    suffer(registry, [PAGE] * 3)
    assert first(registry).state is after


PROVEN = [
    # between two probes, seconds since a right answer, whether it failed since
    (5.0, 6.9, False, True),
    (5.0, 7.1, False, False),
    (60.0, 61.9, False, True),
    (60.0, 62.1, False, False),
    (60.0, 6.9, True, True),
    (60.0, 7.1, True, False),
]


@pytest.mark.parametrize(("every_s", "ago_s", "failed", "proven"), PROVEN)
def test_a_node_is_proven_for_as_long_as_its_probes_are_apart(
    every_s: float, ago_s: float, failed: bool, proven: bool
) -> None:
    registry = ready_registry(clock=(clock := Clock()))
    node = first(registry)
    node.probe_every_s = every_s
    clock.now += ago_s
    if failed:
        registry.failed(node, NodeBroke("x"))
    assert registry.proven(node) is proven
    assert registry.proven(node, within_s=ago_s + 1)
    assert not registry.proven(registry.add(Node("new", "unix:/nowhere")))
