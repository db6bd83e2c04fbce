"""Whoever asks for more than its share of a busy fleet is refused at once; whoever asks for less is not."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.fleet.admission import QUEUE_WAIT_S, STRETCH
from embedmesh.fleet.fair_queue import REQUEST_TOKENS, FairQueue, size_of
from embedmesh.fleet.queued import QueuedRequest, Remainder
from embedmesh.rules.errors import Overloaded
from tests.fleet.test_scheduler import FIXED_S, World
from tests.flow.world import MODEL

SPEED = 10_000.0
A_TEXT_S = FIXED_S + 28 / SPEED  # seconds


def admitted(world: World, account: str, tokens: int = 28, asked: int = 10_000) -> int:
    """How many requests of an account come in before one is refused."""
    for number in range(asked):
        try:
            world.scheduler.may_wait(MODEL, tokens, account)
        except Overloaded as refused:
            assert 1.0 <= refused.retry_after_s <= 30.0  # and jitter: SDKs obey no more than sixty
            return number
        world.ask(tokens, account=account, held=True)
    return asked


def test_an_account_may_wait_for_as_long_as_a_caller_is_patient() -> None:
    assert admitted(World(SPEED), "a") == pytest.approx(QUEUE_WAIT_S / A_TEXT_S, rel=0.1)


def test_two_nodes_let_twice_as_many_wait() -> None:
    assert admitted(World(SPEED, SPEED), "a") == pytest.approx(2 * QUEUE_WAIT_S / A_TEXT_S, rel=0.1)


def test_another_account_comes_in_at_once_and_gets_half() -> None:
    world = World(SPEED)
    admitted(world, "greedy")
    assert admitted(world, "polite") == pytest.approx(QUEUE_WAIT_S / A_TEXT_S / 2, rel=0.1)
    assert admitted(world, "greedy") == 0


def test_a_short_text_passes_the_large_work_of_its_own_account() -> None:
    world = World(SPEED)
    while True:
        try:
            world.scheduler.may_wait(MODEL, 100_000, "a")
        except Overloaded:
            break
        world.ask(*[500] * 200, account="a", held=True)
    assert admitted(world, "a", asked=1) == 1


def test_large_work_may_wait_in_proportion() -> None:
    world = World(SPEED)
    came = 0
    try:
        while True:
            world.scheduler.may_wait(MODEL, 10_000, "a")
            world.ask(*[500] * 20, account="a", held=True)
            came += 1
    except Overloaded:
        pass
    assert came == pytest.approx(STRETCH, rel=0.15)


@pytest.mark.parametrize(("others", "tokens"), [(1, 300_000), (12, 200_000), (40, 10_000)])
def test_a_short_line_keeps_nobody_out_however_many_are_in_it(others: int, tokens: int) -> None:
    world = World(SPEED)
    for _ in range(200):
        world.ask(28, account="first", held=True)
    for number in range(others):
        world.ask(28, account=f"other {number}", held=True)
    world.scheduler.may_wait(MODEL, tokens, "a")


def test_sizes_of_many_kinds_get_no_more_than_one_share() -> None:
    """An account whose requests are of four sizes has as much of the node as one whose requests are of one."""
    world = World(SPEED)
    various = [world.ask(tokens, account="various") for _ in range(400) for tokens in (8, 20, 40, 100)]
    alike = [world.ask(42, account="alike") for _ in range(1_600)]
    world.run(until=world.now + 5.0)
    done = [
        sum(REQUEST_TOKENS + sum(request.lengths) for request in each if request.ended_well_at is not None)
        for each in (various, alike)
    ]
    assert done[1] == pytest.approx(done[0], rel=0.1)


def test_nobody_is_refused_where_nobody_waits() -> None:
    world = World(100.0)  # slower than the longest wait
    world.scheduler.may_wait(MODEL, 250_000, "a")


def test_what_has_left_the_queue_counts_no_more() -> None:
    world = World(SPEED)
    requests = [world.ask(28, account="a", held=True) for _ in range(admitted(World(SPEED), "a"))]
    for request in requests:
        request.ticket.leave()
    assert admitted(world, "a", asked=1) == 1
    world.run()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.booleans()), max_size=60))
def test_backlogs_are_what_was_added_and_not_removed(steps: list[tuple[str, int, bool]]) -> None:
    queue, there = FairQueue(), []
    for account, tokens, removes in steps:
        if removes and there:
            work = there.pop(0)
            queue.remove(work, work.tokens, 1)
        else:
            work = _work(account, tokens)
            queue.add(work, tokens)
            there.append(work)
        assert queue.tokens == sum(each.tokens for each in there)
        assert queue.accounts_with("z") == len({each.account_id for each in there}) + 1
        for name, count in Counter(each.account_id for each in there).items():
            ahead = queue.ahead_of(name, 500)
            assert (ahead.remainders, ahead.tokens) == (
                count,
                sum(each.tokens for each in there if each.account_id == name),
            )


def _work(account: str, tokens: int) -> QueuedRequest:
    return QueuedRequest(
        scheduler=None,
        model_id="m",
        account_id=account,
        size=size_of(tokens),
        lengths=[tokens],
        asker=None,
        whole=True,
        needs_texts=False,
        needs_ids=False,
        remainders=[Remainder((0,), tokens)],
    )
