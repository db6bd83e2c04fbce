"""Work at low priority gets what interactive work leaves: all of an idle fleet, slices of a busy one, never nothing."""

import random
from collections.abc import Callable

import pytest

from embedmesh.fleet.leftover import STARVED_S, Leftover, NodeTurn
from embedmesh.fleet.registry import Node
from embedmesh.fleet.retries import RETRY_SPAN_S
from embedmesh.fleet.slices import FleetOfTurn
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Part, Ticket
from embedmesh.rules.models import Model
from tests.fleet.test_scheduler import FIXED_S, Request, World
from tests.flow.world import MODEL, NATIVE

SPEED = 20_000  # tokens a second
LINE = 40  # tokens


class Lines:
    """A batch's lines: each waits for its turn, is worked off by the scheduler's nodes, and is followed by the next."""

    def __init__(self, world: World, leftover: Leftover, account: str = "b", *, waiting: int = 256, left: int = 10**9):
        self.world, self.leftover, self.account = world, leftover, account
        self.done = 0
        self.left = left
        self.turns: list[NodeTurn] = []
        for _ in range(waiting):
            self.next()

    def next(self) -> None:
        if self.left:
            self.left -= 1
            turn: list[NodeTurn] = []
            later = self.world.call_later
            turn.append(self.leftover.wait(self.account, MODEL, LINE, lambda: later(0, lambda: begin())))

            def begin() -> None:
                self.leftover.entered()
                request = self.world.ask(LINE, account=self.account)
                ended = request.end

                def end(part: Part) -> None:
                    ended(part)
                    turn[0].over()
                    self.done += 1
                    self.next()

                request.end = end  # type: ignore[method-assign]

            self.turns.append(turn[0])


def leftover_of(world: World) -> Leftover:
    return Leftover(world.scheduler, world, world.call_later)


def ask_now_and_then(world: World, seconds: float, every_s: float, seed: int) -> list[tuple[float, Request]]:
    """Short interactive requests, by dice."""
    asked: list[tuple[float, Request]] = []
    dice = random.Random(seed)
    at = 0.0
    while (at := at + dice.expovariate(1 / every_s)) < seconds:
        world.call_later(at, lambda: asked.append((world.now, world.ask(10, account="i"))))
    return asked


def p99(asked: list[tuple[float, Request]]) -> float:
    took = sorted(request.well_at - at for at, request in asked)
    return took[int(len(took) * 0.99)]


def test_an_idle_fleet_is_filled() -> None:
    """Alone, a batch gets nearly all that the nodes can do."""
    world = World(SPEED, SPEED)
    lines = Lines(world, leftover_of(world))
    until = world.now + 10
    world.run(until)
    best = 2 * 10 / (FIXED_S + LINE / SPEED)
    assert lines.done >= 0.9 * best


@pytest.mark.parametrize("every_s", [0.5, 0.05, 0.01])
def test_interactive_requests_hardly_notice(every_s: float) -> None:
    """The 99th percentile beside a batch that could fill the fleet is at most a slice and a call more than without."""
    quiet = World(SPEED)
    alone = ask_now_and_then(quiet, 40, every_s, seed=3)
    quiet.run(quiet.now + 41)
    busy = World(SPEED)
    lines = Lines(busy, leftover_of(busy))
    beside = ask_now_and_then(busy, 40, every_s, seed=3)
    busy.run(busy.now + 41)
    settled = [each for each in beside if each[0] > beside[0][0] + 1]
    assert p99(settled) <= p99(alone) + 0.004 + 2 * (FIXED_S + LINE / SPEED)
    assert lines.done > 40 * 10, "it gets the gaps"


def test_who_asked_lately_is_remembered_and_then_forgotten() -> None:
    world = World(SPEED)
    leftover = leftover_of(world)
    seen = [leftover.polite]
    world.ask(10)
    for later_s in (0, RETRY_SPAN_S - 2, 3):
        world.now += later_s
        seen.append(leftover.polite)
    assert seen == [False, True, True, False]


def test_own_work_is_nobody_elses() -> None:
    world = World(SPEED)
    leftover = leftover_of(world)
    Lines(world, leftover, waiting=8, left=50)
    world.run()
    assert not leftover.polite


def test_while_a_request_waits_for_a_node_there_is_no_turn() -> None:
    world = World(SPEED)
    filling = [world.ask(400, held=True)]
    while filling[-1].parts:
        filling.append(world.ask(400, held=True))
    lines = Lines(world, leftover_of(world), waiting=3, left=3)
    world.run(world.now + STARVED_S / 2)
    assert lines.done == 0


def test_without_a_node_turns_wait_and_come_with_one() -> None:
    world = World()
    lines = Lines(world, leftover_of(world), waiting=3, left=3)
    world.run(world.now + 5)
    assert lines.done == 0
    world.add(Node("late", ""), SPEED)
    world.run(world.now + 5)
    assert lines.done == 3


def test_a_fleet_that_is_never_idle_gives_a_turn_now_and_then() -> None:
    """Slow is not stuck: a node that always has a request gives a batch a turn a second."""
    world = World(SPEED)

    def again() -> None:
        request = world.ask(2_000, account="i")
        ended = request.end

        def end(part: Part) -> None:
            ended(part)
            world.call_later(0, again)

        request.end = end  # type: ignore[method-assign]

    again()
    again()
    lines = Lines(world, leftover_of(world), waiting=4)
    world.run(world.now + 30)
    assert 10 <= lines.done <= 300


def test_accounts_take_turns() -> None:
    world = World(SPEED)
    leftover = leftover_of(world)
    many, few = Lines(world, leftover, "many", waiting=500), Lines(world, leftover, "few", waiting=50)
    world.run(world.now + 3)
    assert few.done > 0.7 * many.done, "as long as it has lines that wait"


def test_what_has_failed_comes_first() -> None:
    world = World()
    leftover = leftover_of(world)
    began: list[int] = []
    turns = [
        leftover.wait("a", MODEL, LINE, lambda number=number: began.append(number), again=number == 2)  # type: ignore[misc]
        for number in (0, 1, 2)
    ]
    world.add(Node("late", ""), SPEED)
    world.run(world.now + 1)
    assert began == [2, 0, 1]
    assert all(turn.node_id for turn in turns)


def test_a_turn_that_is_not_wanted_any_more_is_given_to_nobody() -> None:
    world = World()
    leftover = leftover_of(world)
    began: list[int] = []
    begin: Callable[[int], Callable[[], None]] = lambda number: lambda: began.append(number)  # noqa: E731
    first, second = (leftover.wait("a", MODEL, LINE, begin(number)) for number in (1, 2))
    first.over()
    world.add(Node("late", ""), SPEED)
    world.run(world.now + 1)
    assert began == [2]
    second.over()
    assert not leftover._taken and not leftover._waiting


class LargeLine:
    """A line with many inputs, which has its turn: an asker, as `Request` is."""

    def __init__(self, world: World, leftover: Leftover, inputs: int, done: Callable[[], None] = lambda: None) -> None:
        self.world = world
        self.lengths = [LINE] * inputs
        self.parts: list[Part] = []
        self.answered: list[int] = []
        self.gave_up = 0
        self.done = done
        self.ticket: Ticket | None = None
        counted = Counted(self.lengths, ids=[[]] * inputs, texts=[""] * inputs)

        def begin() -> None:
            world.call_later(0, enter)

        def enter() -> None:
            self.ticket = FleetOfTurn(leftover, self.turn).enter(MODEL, counted, "b", self)

        self.turn = leftover.wait("b", MODEL, counted.tokens, begin)

    def take(self, part: Part) -> None:
        self.parts.append(part)
        self.world.serve(part, lambda: self.end(part))

    def give_up(self, last: NodeFailure | None) -> None:
        self.gave_up += 1
        self.leave()

    def end(self, part: Part) -> None:
        assert self.ticket is not None
        self.ticket.ended(part, None)
        self.answered += part.rows
        if len(self.answered) == len(self.lengths):
            self.leave()
            self.done()

    def leave(self) -> None:
        assert self.ticket is not None
        self.ticket.leave()
        self.turn.over()


@pytest.mark.parametrize("inputs", [3, 40, 2_000])
def test_large_lines_are_noticed_no_more_than_small_ones(inputs: int) -> None:
    """In time of a node: what a busy machine adds is nobody's doing."""
    quiet, busy = World(SPEED), World(SPEED)
    alone = ask_now_and_then(quiet, 40, 0.05, seed=3)
    quiet.run(quiet.now + 41)
    leftover = leftover_of(busy)
    lines: list[LargeLine] = []

    def more() -> None:
        lines.append(LargeLine(busy, leftover, inputs, more))

    busy.call_later(0, more)
    busy.call_later(0, more)
    beside = ask_now_and_then(busy, 40, 0.05, seed=3)
    busy.run(busy.now + 41)
    settled = [each for each in beside if each[0] > beside[0][0] + 1]
    assert p99(settled) <= p99(alone) + 0.004 + 2 * (FIXED_S + LINE / SPEED)
    rows = sum(len(line.answered) for line in lines)
    assert rows > 40 * 50, "it gets the gaps"
    for line in lines:
        assert len(line.answered) == len(set(line.answered))


def test_a_large_line_has_an_idle_fleet_to_itself() -> None:
    """Its turns follow each other, on all nodes, in parts that are worth while."""
    world = World(SPEED, SPEED)
    leftover = leftover_of(world)
    line = LargeLine(world, leftover, 4_000)
    began = world.now
    world.run()
    assert sorted(line.answered) == list(range(4_000))
    assert world.now - began < 1.3 * 4_000 * LINE / (2 * SPEED)
    assert max(part.tokens for part in line.parts) > 1_000
    assert not leftover._taken and not leftover._waiting


def test_a_large_line_whose_node_goes_gives_up_and_leaves_no_turn() -> None:
    world = World(SPEED)
    leftover = leftover_of(world)
    line = LargeLine(world, leftover, 4_000)
    world.run(world.now + 0.5)
    world.registry.remove("n0")
    world.run(world.now + 5)
    assert line.gave_up and len(line.answered) < 4_000
    assert not leftover._taken and not leftover._waiting


def test_a_model_whose_nodes_are_never_idle_gets_turns_though_another_has_many() -> None:
    """One account's batch on an idle model must not take the turns that keep another's from starving."""
    world = World(SPEED, SPEED)
    leftover = leftover_of(world)
    world.registry.answered_right(world.node("n0"), [MODEL.id])
    world.registry.answered_right(world.node("n1"), [NATIVE.id])

    def again() -> None:
        request = world.ask(2_000, account="i")
        ended = request.end

        def end(part: Part) -> None:
            ended(part)
            world.call_later(0, again)

        request.end = end  # type: ignore[method-assign]

    again()
    again()
    turns = {MODEL.id: 0, NATIVE.id: 0}

    def next_turn(account: str, model: Model) -> None:
        def begin() -> None:
            turns[model.id] += 1
            world.call_later(0.01, turn.over)
            world.call_later(0.01, lambda: next_turn(account, model))

        turn = NodeTurn(leftover, account, model, LINE, begin)
        leftover.join(turn, again=False)

    for _ in range(20):
        next_turn("b", MODEL)
        next_turn("c", NATIVE)
        next_turn("b", NATIVE)
    world.run(world.now + 30)
    assert turns[NATIVE.id] > 1_000
    assert turns[MODEL.id] >= 10
