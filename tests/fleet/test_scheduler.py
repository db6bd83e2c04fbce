"""Requests wait where plans can still change: short ones first, every account its share, large ones cut and spread."""

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.fleet.queued import QueuedRequest
from embedmesh.fleet.registry import IN_FLIGHT_PARTS_MAX, Node, Registry
from embedmesh.fleet.scheduler import LOOK_AHEAD, Scheduler
from embedmesh.fleet.spread import PART_S, PART_TOKENS_MIN
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import (
    InvalidValue,
    NodeBroke,
    NodeBusy,
    NodeFailure,
    NodeTooSlow,
    NodeUnreachable,
    UpstreamRefused,
)
from embedmesh.rules.forwarding import Part
from tests.flow.world import MODEL, NATIVE

FIXED_S = 0.002


class World:
    """A scheduler over nodes that are FIFO servers of known speed, in virtual time."""

    def __init__(self, *tokens_per_s: float, seed: int = 1, **node: Any) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._number = count()
        self.registry = Registry(self)
        self.scheduler = Scheduler(self.registry, self, random.Random(seed), self.call_later)
        self.speeds: dict[str, float] = {}
        self._free_at: dict[str, float] = {}
        for number, speed in enumerate(tokens_per_s):
            self.add(Node(f"n{number}", "", **node), speed)

    def add(self, node: Node, tokens_per_s: float) -> None:
        """A node whose speed is known already."""
        self.speeds[node.node_id] = tokens_per_s
        for tokens in (10, 2_000) * 30:
            node.load.began(tokens, self.now)
            self.now += FIXED_S + tokens / tokens_per_s
            node.load.ended(tokens, self.now, well=True)
        self.registry.answered_right(self.registry.add(node), [MODEL.id, NATIVE.id])

    def node(self, node_id: str) -> Node:
        node = self.registry.find(node_id)
        assert node is not None
        return node

    def monotonic(self) -> float:
        return self.now

    def unix_ms(self) -> int:
        return int(self.now * 1000)

    def call_later(self, seconds: float, what: Callable[[], object]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._number), what))

    def serve(self, part: Part, done: Callable[[], None]) -> None:
        start = max(self.now, self._free_at.get(part.node_id, 0.0))
        self._free_at[part.node_id] = start + FIXED_S + part.tokens / self.speeds[part.node_id]
        self.call_later(self._free_at[part.node_id] - self.now, done)

    def run(self, until: float = 1e9) -> None:
        while self._events and self._events[0][0] <= until:
            self.now, _, what = heapq.heappop(self._events)
            what()

    def ask(self, *lengths: int, account: str = "a", **more: Any) -> "Request":
        return Request(self, lengths, account, **more)


class Request:
    """An asker that notes what it gets. `fails` says how attempts end: None is well."""

    def __init__(
        self,
        world: World,
        lengths: Sequence[int],
        account: str,
        *,
        fails: Callable[[Part], NodeFailure | None] = lambda part: None,
        held: bool = False,
        ids: bool = True,
        texts: bool = True,
    ) -> None:
        self.world = world
        self.lengths = list(lengths)
        self.fails = fails
        self.held = held  # parts stay outstanding until `release`
        self.parts: list[Part] = []
        self.answered: list[int] = []
        self.gave_up: list[NodeFailure | None] = []
        self.ended_well_at: float | None = None
        self._taken_early: list[Part] = []
        self._ticket: QueuedRequest | None = None
        counted = Counted(
            lengths=self.lengths, ids=[[]] * len(lengths) if ids else None, texts=[""] * len(lengths) if texts else None
        )
        self._ticket = world.scheduler.enter(MODEL, counted, account, self)
        for part in self._taken_early:
            self._begin(part)

    def take(self, part: Part) -> None:
        self.parts.append(part)
        if self._ticket is None:
            self._taken_early.append(part)
        else:
            self._begin(part)

    def give_up(self, last: NodeFailure | None) -> None:
        self.gave_up.append(last)

    def _begin(self, part: Part) -> None:
        if not self.held:
            self.world.serve(part, lambda: self.end(part))

    def end(self, part: Part) -> None:
        failure = self.fails(part)
        again = self.ticket.ended(part, failure)
        if failure is None:
            self.answered += part.rows
            if len(self.answered) == len(self.lengths):
                self.ended_well_at = self.world.now
        elif not again:
            self.gave_up.append(failure)

    @property
    def ticket(self) -> QueuedRequest:
        assert self._ticket is not None
        return self._ticket

    @property
    def well_at(self) -> float:
        """When it was answered in full; never is infinitely late."""
        return math.inf if self.ended_well_at is None else self.ended_well_at

    @property
    def nodes(self) -> list[str]:
        return [part.node_id for part in self.parts]


def fill(world: World) -> list[Request]:
    """Requests until no node has room for even a short one."""
    filling: list[Request] = []
    while not filling or filling[-1].parts:
        filling.append(world.ask(400, held=True))
    return filling


# -- binding late -----------------------------------------------------------------------------------------------------


def test_a_node_with_room_is_asked_at_once() -> None:
    world = World(10_000)
    request = world.ask(5, 9, 7)
    assert [(part.rows, part.tokens) for part in request.parts] == [((0, 1, 2), 21)]


def test_what_a_node_has_no_room_for_waits_and_the_short_go_first() -> None:
    world = World(10_000)
    filling = fill(world)
    bulk = world.ask(*[100] * 100)
    middle, short = world.ask(300), world.ask(10)
    assert not bulk.parts + middle.parts + short.parts
    filling[-1].ticket.leave()
    for each in filling[:-1]:
        each.end(each.parts[0])
        if short.parts:
            break
    assert short.parts
    world.run()
    ends = [request.well_at for request in (short, middle, bulk)]
    assert ends == sorted(ends)


def test_what_has_waited_long_enough_comes_first_however_large_it_is() -> None:
    """A stream of short requests that a node can just keep up with does not keep a large one out for ever."""
    world = World(10_000)
    bulk = world.ask(*[100] * 40)
    for at in range(4_000):  # 1.2 times what the node can do
        world.call_later(at * 0.01 / 1.2, lambda: world.ask(80, account="other"))
    world.run(until=world.now + 15)
    assert bulk.ended_well_at is not None


def test_many_requests_of_one_account_do_not_keep_out_the_few_of_another() -> None:
    world = World(10_000)
    many = [world.ask(100, account="many") for _ in range(1_000)]
    few = [world.ask(100, account="few") for _ in range(5)]
    world.run()
    last = max(request.well_at for request in few)
    assert sum(request.well_at < last for request in many) < 5 * 5


def test_a_slow_node_is_left_idle_where_the_fast_one_is_done_sooner() -> None:
    world = World(20_000, 200)
    first = [world.ask(300) for _ in range(6)]  # 0.09 s of work for the fast one, 9 s for the other
    assert {*(node for request in first for node in request.nodes)} == {"n0"}
    world.run()
    assert all(request.nodes == ["n0"] for request in first)


def test_a_slow_node_helps_where_so_much_waits_that_it_is_done_before_the_rest() -> None:
    world = World(20_000, 2_000)
    requests = [world.ask(300, account=str(number)) for number in range(200)]  # 2.7 s for both
    world.run()
    share = sum(request.nodes == ["n1"] for request in requests) / len(requests)
    assert 0.05 < share < 0.15


def test_no_more_parts_than_a_node_may_have_are_sent() -> None:
    world = World(1e7, in_flight_max=3)
    requests = [world.ask(1, held=True) for _ in range(5)]
    assert [len(request.parts) for request in requests] == [1, 1, 1, 0, 0]
    assert IN_FLIGHT_PARTS_MAX > 3
    requests[0].end(requests[0].parts[0])
    assert requests[3].parts


# -- large requests ---------------------------------------------------------------------------------------------------


def test_a_large_request_is_spread_over_idle_nodes_by_their_speed() -> None:
    world = World(20_000, 10_000)
    request = world.ask(*[100] * 600)
    world.run()
    assert sorted(request.answered) == list(range(600))
    tokens = Counter(dict.fromkeys(world.speeds, 0))
    for part in request.parts:
        tokens[part.node_id] += part.tokens
        assert part.tokens <= max(world.speeds[part.node_id] * PART_S * 1.1, PART_TOKENS_MIN)
    assert tokens["n0"] / tokens["n1"] == pytest.approx(2, rel=0.25)
    assert request.ended_well_at is not None


def test_two_nodes_are_nearly_twice_as_fast_as_one() -> None:
    took = []
    for speeds in ([10_000], [10_000, 10_000]):
        world = World(*speeds)
        began = world.now
        request = world.ask(*[50] * 2_048)
        world.run()
        took.append(request.well_at - began)
    assert took[0] / took[1] > 1.8


def test_a_part_has_at_most_as_many_inputs_as_its_node_takes() -> None:
    world = World(10_000, 10_000, inputs_max=7)
    request = world.ask(*[3] * 50)
    world.run()
    assert sorted(request.answered) == list(range(50))
    assert max(len(part.rows) for part in request.parts) == 7


# -- failing ----------------------------------------------------------------------------------------------------------


def test_what_fails_is_asked_elsewhere_and_never_of_the_same_node() -> None:
    world = World(10_000, 10_000, 10_000)
    request: Request = world.ask(10, fails=lambda part: NodeBroke("x") if len(request.parts) < 3 else None)
    world.run()
    assert sorted(request.nodes) == ["n0", "n1", "n2"]
    assert request.answered == [0]


@pytest.mark.parametrize(("failure", "asked"), [(NodeBroke("x"), 3), (NodeBusy("x"), 8), (NodeUnreachable("x"), 8)])
def test_at_most_three_nodes_are_asked_and_some_more_may_refuse(failure: NodeFailure, asked: int) -> None:
    world = World(*[10_000] * 10)
    request: Request = world.ask(10, fails=lambda part: failure)
    world.run()
    assert len(set(request.nodes)) == len(request.parts) == asked
    assert request.gave_up == [failure]


@pytest.mark.parametrize("failure", [NodeBusy("x"), NodeUnreachable("x")])
def test_nodes_that_refuse_do_not_keep_the_one_that_works_from_being_asked(failure: NodeFailure) -> None:
    for seed in range(20):
        world = World(*[10_000] * 5, seed=seed)
        request: Request = world.ask(10, fails=lambda part: failure if part.node_id != "n4" else None)
        world.run()
        assert request.answered == [0]


def test_nobody_waits_for_a_node_that_is_full_while_a_slower_one_is_free() -> None:
    world = World(20_000, 10_000)
    refused = world.ask(10, fails=lambda part: NodeBusy("x", retry_after_s=1.0) if part.node_id == "n0" else None)
    began = world.now
    world.run(until=began + 0.1)
    after = world.ask(10)
    world.run()
    assert (refused.nodes, after.nodes) == (["n0", "n1"], ["n1"])
    assert world.now - began < 0.2


def test_what_is_lost_with_its_nodes_needs_little_budget() -> None:
    """Power fails where four of six nodes are: whatever they had in flight is asked elsewhere."""
    world = World(*[2_000] * 6)
    gone = {"n0", "n1", "n2", "n3"}

    def ask() -> Request:
        def fails(part: Part) -> NodeFailure | None:
            if part.node_id not in gone:
                return None
            return NodeBroke("x") if len(request.parts) == 1 else NodeUnreachable("x")

        request: Request = world.ask(10, fails=fails)
        return request

    requests = [ask() for _ in range(120)]
    left = 0
    while world.scheduler.retries.budget.take():
        left += 1
    world.scheduler.retries.budget.newest.retries -= 12  # a few failures of each node, until it is known to be out
    world.run()
    assert left == 100
    assert all(request.answered == [0] for request in requests)


def test_one_failed_part_is_asked_again_and_the_rest_is_kept() -> None:
    world = World(10_000, 10_000)
    broken: list[Part] = []

    def fails(part: Part) -> NodeFailure | None:
        if broken or part.node_id != "n1":
            return None
        broken.append(part)
        return NodeBroke("x")

    request = world.ask(*[100] * 400, fails=fails)
    world.run()
    assert sorted(request.answered) == list(range(400))
    assert Counter(place for part in request.parts for place in part.rows).total() == 400 + len(broken[0].rows)


NOT_BEGUN = [(NodeUnreachable("x"), 2), (NodeBusy("x"), 2), (UpstreamRefused("x"), 2), (NodeBroke("x"), 1)]


@pytest.mark.parametrize(("failure", "asked"), NOT_BEGUN)
def test_without_budget_only_what_had_not_begun_is_asked_again(failure: NodeFailure, asked: int) -> None:
    world = World(10_000, 10_000)
    while world.scheduler.retries.budget.take():
        pass
    request: Request = world.ask(10, fails=lambda part: failure if len(request.parts) == 1 else None)
    world.run()
    assert len(request.parts) == asked
    assert request.gave_up == ([] if asked == 2 else [failure])


def test_when_the_last_node_goes_whoever_waits_is_told() -> None:
    world = World(10_000)
    fill(world)
    waiting = world.ask(10)
    for node in world.registry:
        world.registry.failed(node, NodeUnreachable("x"))
    assert waiting.gave_up == [None]


def test_a_node_that_comes_gets_what_waits() -> None:
    world = World(10_000)
    fill(world)
    waiting = world.ask(400)
    assert not waiting.parts
    world.add(Node("new", ""), 10_000)
    assert waiting.nodes == ["new"]


def test_who_leaves_gets_nothing_more() -> None:
    world = World(10_000)
    filling = fill(world)
    waiting = world.ask(*[100] * 100)
    waiting.ticket.leave()
    for request in filling:
        for part in request.parts:
            request.end(part)
    world.run()
    assert waiting.parts == []
    assert [node.load.tokens for node in world.registry] == [0]


def test_a_node_that_says_nothing_does_not_keep_what_waits_for_it() -> None:
    """The fast node is wedged with a part; what would have waited for it goes to the slow one in time."""
    world = World(20_000, 1_000)
    stuck = fill(world)
    assert stuck
    request = world.ask(500)
    world.run(until=world.now + 3)
    assert request.ended_well_at is not None


@pytest.mark.parametrize("why", ["nobody else", "third attempt", "no budget", "it left", "it ended", ""])
def test_a_late_part_is_broken_off_only_where_another_node_would_be_asked(why: str) -> None:
    """Where it would not, to wait for it is better than to give up."""
    world = World(10_000, *([] if why == "nobody else" else [9_000, 8_000]))
    request = world.ask(100, held=True)
    if why == "third attempt":
        request.fails = lambda part: NodeTooSlow("x")
        request.end(request.parts[0])
        assert request.ticket.may_ask_another(request.parts[1])
        request.end(request.parts[1])
    part = request.parts[-1]
    while why == "no budget" and world.scheduler.retries.budget.take():
        pass
    if why == "it left":
        request.ticket.leave()
    if why == "it ended":
        request.end(part)
    assert request.ticket.may_ask_another(part) is (not why)
    if why == "nobody else":
        world.add(Node("new", ""), 10_000)
        assert request.ticket.may_ask_another(part), "it has come meanwhile"


def test_how_slow_a_node_is_at_least_is_learned_from_who_could_not_wait_longer() -> None:
    """The request's own time was over. One that went for another reason teaches nothing."""
    world = World(10_000)
    (node,) = world.registry
    before_s = node.load.finish_s(100, world.now)
    for late in (False, True):
        request = world.ask(100, held=True)
        world.now += 30.0
        request.ticket.abandoned(request.parts[0], late=late)
        request.ticket.leave()
        assert (node.load.finish_s(100, world.now) > before_s) is late


# -- hedging ----------------------------------------------------------------------------------------------------------


def hedging(*tokens_per_s: float) -> World:
    world = World(*tokens_per_s)
    world.scheduler.retries._hedge = True
    return world


def test_a_late_short_request_is_asked_of_an_idle_node_too_and_whoever_is_first_counts() -> None:
    world = hedging(10_000, 9_000)
    request = world.ask(100, held=True)
    (part,) = request.parts
    after_s = request.ticket.hedge_after_s(part)
    assert after_s is not None
    assert after_s > 2 * part.expected_s
    request.ticket.hedge(part)
    assert request.nodes == ["n0", "n1"]
    assert request.parts[1].rows == part.rows
    request.end(request.parts[1])
    request.ticket.abandoned(part)
    request.ticket.leave()
    assert request.answered == [0]
    assert [node.load.parts for node in world.registry] == [0, 0]


def test_a_hedged_part_that_fails_is_not_asked_again_while_its_twin_works() -> None:
    world = hedging(10_000, 9_000, 100)
    request: Request = world.ask(100, held=True, fails=lambda part: NodeBroke("x") if part.node_id == "n0" else None)
    request.ticket.hedge(request.parts[0])
    request.end(request.parts[0])
    assert len(request.parts) == 2
    assert not request.gave_up
    request.end(request.parts[1])
    assert request.answered == [0]


def test_where_both_of_a_hedge_fail_a_third_node_is_asked() -> None:
    world = hedging(10_000, 9_000, 8_000)
    request: Request = world.ask(100, held=True, fails=lambda part: NodeBroke("x") if len(request.parts) < 3 else None)
    request.ticket.hedge(request.parts[0])
    request.end(request.parts[0])
    request.end(request.parts[1])
    assert sorted(request.nodes) == ["n0", "n1", "n2"]


@pytest.mark.parametrize("why", ["off", "large", "nobody idle", "no budget", "it has ended"])
def test_no_second_node_is_asked(why: str) -> None:
    world = hedging(10_000, 9_000)
    world.scheduler.retries._hedge = why != "off"
    request = world.ask(300 if why == "large" else 100, held=True)
    (part,) = request.parts
    if why in ("off", "large"):
        assert request.ticket.hedge_after_s(part) is None
        return
    if why == "nobody idle":
        fill(world)
    while why == "no budget" and world.scheduler.retries.budget.take():
        pass
    if why == "it has ended":
        request.end(part)
    request.ticket.hedge(part)
    assert request.parts == [part]


# -- who can do what --------------------------------------------------------------------------------------------------


def test_servers_of_other_makes_get_what_has_texts_and_ours_what_has_ids() -> None:
    world = World(10_000, 10_000)
    world.node("n1").reads_ids = False
    assert {world.ask(10, texts=False).nodes[0] for _ in range(20)} == {"n0"}
    assert {world.ask(10, ids=False).nodes[0] for _ in range(20)} == {"n1"}
    world.registry.remove("n1")
    assert world.ask(10, ids=False).gave_up == [None]


def test_where_no_node_reads_ids_who_has_only_ids_is_told_so_for_good() -> None:
    """Not that no node is there now: trying again would never help."""
    world = World(10_000, 10_000, reads_ids=False)
    with pytest.raises(InvalidValue):
        world.ask(10, texts=False)
    assert world.ask(10, ids=False).nodes == ["n0"]


def test_one_request_that_cannot_be_placed_does_not_stop_those_behind_it() -> None:
    world = World(10_000, 10_000)
    world.node("n1").reads_ids = False
    while world.ask(400, texts=False, held=True).parts:
        pass
    blocked = [world.ask(10, texts=False) for _ in range(LOOK_AHEAD - 2)]
    assert not any(request.parts for request in blocked)
    assert world.ask(10, ids=False).nodes == ["n1"]


def test_above_a_hundred_nodes_two_are_looked_at_and_work_still_spreads() -> None:
    world = World(*[10_000] * 150)
    requests = [world.ask(100) for _ in range(150)]
    assert len({request.nodes[0] for request in requests}) > 75


def test_work_of_our_own_avoids_the_nodes_that_it_is_about() -> None:
    world = World(10_000, 10_000)
    counted = Counted(lengths=[5], ids=[[]], texts=[""])

    taken: list[Part] = []

    class Canary:
        def take(self, part: Part) -> None:
            taken.append(part)

        def give_up(self, last: NodeFailure | None) -> None: ...

    for _ in range(20):
        world.scheduler.repeat(MODEL, counted, Canary(), frozenset({"n0"}))
    assert {part.node_id for part in taken} == {"n1"}


# -- whatever happens -------------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=80)
EVENTS = st.lists(
    st.tuples(st.sampled_from(["ask", "leave", "fail", "lose", "win", "wait"]), SIZES, st.integers(0, 3)), max_size=40
)


@settings(max_examples=40, deadline=None)
@given(EVENTS, st.integers(0, 1_000))
def test_every_input_is_answered_once_or_its_request_told_and_no_load_is_left_behind(
    events: list[tuple[str, list[int], int]], seed: int
) -> None:
    world = World(20_000, 5_000, 1_000, seed=seed, inputs_max=40)
    dice = random.Random(seed)
    requests: list[Request] = []
    left: set[Request] = set()
    failing = [0.0]
    for event, sizes, number in events:
        node = world.node(f"n{number % 3}")
        if event == "ask":
            requests.append(
                world.ask(
                    *sizes,
                    account=str(number),
                    fails=lambda part: NodeBroke("x") if dice.random() < failing[0] else None,
                )
            )
        elif event == "leave" and requests:
            left.add(dice.choice(requests))
            for request in left:
                request.ticket.leave()
        elif event == "fail":
            failing[0] = number / 4
        elif event == "lose":
            world.registry.failed(node, NodeUnreachable("x"))
        elif event == "win":
            world.now += 31
            world.registry.answered_right(node)
        else:
            world.run(until=world.now + number / 10)
    world.run()
    for request in requests:
        assert len(set(request.answered)) == len(request.answered)
        assert len(request.answered) == len(request.lengths) or request.gave_up or request in left
    assert [(node.load.tokens, node.load.parts) for node in world.registry] == [(0, 0)] * 3
    assert not world.scheduler._running.parts
