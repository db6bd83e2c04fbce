"""How often a server of another make is probed, by a clock that is handed in: seldom where it is well."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from embedmesh.fleet.pace import PROBE_WAIT_MAX_S, UNREACHABLE_WAIT_MAX_S, ProbePace
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
from embedmesh.rules.nodes import Check, NodeState
from tests.flow.world import MODEL, Clock

LOOK_S = 0.25  # as often as its prober looks whether it is due
HOUR_S = 3_600.0

Says = Callable[[float, bool], NodeFailure | None]
"""What a server says at a time, and whether to a probe: None is a right answer."""


class World:
    """One server, as its prober treats it; callers are played by the test."""

    def __init__(self, says: Says, *, every_s: float = 60.0, seed: int = 1) -> None:
        self.clock = Clock()
        self.registry = Registry(self.clock)
        self.node = self.registry.add(Node("theirs", "http://x", kind=UPSTREAM, probe_every_s=every_s))
        self.pace = ProbePace(random.Random(seed))
        self.says = says
        self.began = self.clock.now
        self.probes: list[float] = []

    def run(self, seconds: float, ask: Callable[[float], bool] = lambda at: False) -> list[float]:
        """Until so much has passed; `ask` says when a caller's request comes. When it was probed, from the start on."""
        ends = self.clock.now + seconds
        while self.clock.now < ends:
            at = self.clock.now - self.began
            if ask(at) and self.node.state is NodeState.READY:
                self._hear(self.says(at, False), by_probe=False)
            if self.pace.due(self.node, self.clock.now):
                self.probes.append(at)
                self._hear(self.says(at, True), by_probe=True)
                self.pace.probed(self.node, self.clock.now)
            self.clock.now += LOOK_S
        return self.probes

    def _hear(self, failure: NodeFailure | None, *, by_probe: bool) -> None:
        if failure is None:
            self.registry.answered_right(self.node, [MODEL.id] if by_probe else None)
        else:
            self.registry.failed(self.node, failure, by_probe=by_probe)


def well(at: float, probe: bool) -> None:
    """It answers rightly."""


def gaps(probes: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(probes)]


@pytest.mark.parametrize("every_s", [5, 60, 600])
def test_one_that_is_well_and_idle_is_probed_as_often_as_was_said(every_s: float) -> None:
    world = World(well, every_s=every_s)
    probes = world.run(HOUR_S)
    assert HOUR_S / every_s <= len(probes) <= 1.2 * HOUR_S / every_s + 2
    assert max(gaps(probes)) <= every_s, "so that its word is never older than that"
    assert len(set(gaps(probes))) > 1, "not all that began together stay together"


def test_one_that_callers_show_to_be_well_is_not_probed() -> None:
    world = World(well)
    assert world.run(HOUR_S, ask=lambda at: at % 50 == 0) == [0.0]


FAILURES: list[NodeFailure] = [
    NodeUnreachable("x"),
    NodeBroke("x"),
    NodeTooSlow("x"),
    NodeBusy("x"),
    UpstreamRefused("x"),
    NodeBroke("x", check=Check.ACCESS),
    WrongAnswer("x", check=Check.HTTP),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: f"{type(failure).__name__} {failure.check.value}")
@pytest.mark.parametrize("well_before_s", [0.0, 100.0])
def test_one_that_fails_for_ever_is_probed_less_and_less(failure: NodeFailure, well_before_s: float) -> None:
    """Seen: 5.8 requests a second for ever. Whether it was well before, and whether callers ask it meanwhile."""
    most_s = UNREACHABLE_WAIT_MAX_S if isinstance(failure, NodeUnreachable) else PROBE_WAIT_MAX_S
    for ask in (lambda at: False, lambda at: True):
        world = World(lambda at, probe: None if at < well_before_s else failure)
        probes = [at for at in world.run(HOUR_S, ask) if at >= well_before_s]
        assert len(probes) <= HOUR_S / (most_s / 2) + 10
        assert len(probes) >= (HOUR_S - well_before_s) / most_s - 1, "and it is never forgotten"
        assert max(gaps(probes)) <= most_s + LOOK_S


def test_a_refusal_is_asked_about_later_than_what_may_pass() -> None:
    """Nobody mends a wrong token within a second."""
    for failure, within_s, probes_max in ((NodeBroke("x", check=Check.ACCESS), 10.0, 3), (NodeBroke("x"), 10.0, 7)):
        world = World(lambda at, probe, failure=failure: failure)
        assert len(world.run(within_s)) <= probes_max
    assert len(World(lambda at, probe: NodeBroke("x")).run(3.0)) >= 3, "a restart is noticed soon"


@pytest.mark.parametrize("failure", [NodeBusy, NodeBroke, UpstreamRefused])
@pytest.mark.parametrize(("asked_s", "kept_s"), [(20.0, 20.0), (59.0, 59.0), (86_400.0, 60.0)])
def test_a_server_that_wants_to_be_left_alone_is_within_a_bound(
    failure: type[NodeFailure], asked_s: float, kept_s: float
) -> None:
    world = World(lambda at, probe: failure("x", retry_after_s=asked_s))
    found = gaps(world.run(HOUR_S))
    assert min(found) >= kept_s
    assert max(found) <= PROBE_WAIT_MAX_S + LOOK_S


def test_servers_that_fail_together_are_not_probed_together() -> None:
    one, other = (World(lambda at, probe: NodeBroke("x"), seed=seed).run(HOUR_S) for seed in (1, 2))
    assert len(set(one) & set(other)) < len(one) / 4


def test_a_failure_of_a_caller_is_looked_into_soon_and_by_one_probe() -> None:
    """Under constant failures, too: what comes in must not put the probe off."""
    world = World(lambda at, probe: NodeBroke("x") if 100 <= at < 101 else None)
    probes = world.run(130.0, ask=lambda at: 100 <= at < 101)
    assert 1 <= len([at for at in probes if 100 <= at < 102]) <= 3


def test_who_sends_a_server_what_it_refuses_decides_neither_its_fate_nor_how_often_it_is_probed() -> None:
    """One caller's texts that are too long for it: no ejection, and a probe a minute at most."""
    world = World(lambda at, probe: None if probe else UpstreamRefused("x"))
    world.run(1.0)
    probes = world.run(HOUR_S, ask=lambda at: True)
    assert world.node.state is NodeState.READY
    assert not world.node.sent_away
    assert world.node.failures_in_a_row == 0
    assert len(probes) <= HOUR_S / (PROBE_WAIT_MAX_S / 2) + 10


@pytest.mark.parametrize(
    ("failure", "most_s"), [(NodeBroke("x"), PROBE_WAIT_MAX_S), (NodeUnreachable("x"), UNREACHABLE_WAIT_MAX_S)]
)
def test_one_that_is_back_is_found_in_bounded_time_and_then_soon_again(failure: NodeFailure, most_s: float) -> None:
    world = World(lambda at, probe: failure if at < 1_000 else None)
    probes = world.run(1_100.0)
    back = next(at for at in probes if at >= 1_000)
    assert back <= 1_000 + most_s + LOOK_S
    assert world.node.state is NodeState.READY
    world.run(200.0)
    world.says, failed_at = (lambda at, probe: NodeUnreachable("x")), world.clock.now - world.began
    world.run(PROBE_WAIT_MAX_S + 2, ask=lambda at: True)
    assert len([at for at in world.probes if at >= failed_at]) >= 4, "its past is forgotten"


def test_one_that_is_readmitted_is_probed_at_once() -> None:
    """However often it has failed before, and whatever it had asked for."""
    world = World(lambda at, probe: NodeBroke("x", retry_after_s=60))
    world.run(HOUR_S)
    world.registry.quarantine(world.node, "of a test")
    world.pace.begin()
    world.registry.readmit(world.node)
    assert world.pace.due(world.node, world.clock.now)
