"""Whoever asks for more than its share of a busy fleet is refused at once; whoever asks for less is not."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.fleet.patience import PATIENCE_S, STRETCH
from embedmesh.fleet.waiting import Rest, Waiting, Work, size_of
from embedmesh.rules.errors import Overloaded
from tests.fleet.test_line import FIXED_S, World
from tests.flow.world import MODEL

SPEED = 10_000.0
A_TEXT_S = FIXED_S + 28 / SPEED  # seconds


def admitted(world: World, account: str, tokens: int = 28, asked: int = 10_000) -> int:
    """How many requests of an account come in before one is refused."""
    for number in range(asked):
        try:
            world.line.expected_s(MODEL, tokens, account)
        except Overloaded as refused:
            assert 1.0 <= refused.retry_after_s <= 120.0  # SDKs obey no more
            return number
        world.ask(tokens, account=account, held=True)
    return asked


def test_an_account_may_wait_for_as_long_as_a_caller_is_patient() -> None:
    assert admitted(World(SPEED), "a") == pytest.approx(PATIENCE_S / A_TEXT_S, rel=0.1)


def test_two_nodes_let_twice_as_many_wait() -> None:
    assert admitted(World(SPEED, SPEED), "a") == pytest.approx(2 * PATIENCE_S / A_TEXT_S, rel=0.1)


def test_another_account_comes_in_at_once_and_gets_half() -> None:
    world = World(SPEED)
    admitted(world, "greedy")
    assert admitted(world, "polite") == pytest.approx(PATIENCE_S / A_TEXT_S / 2, rel=0.1)
    assert admitted(world, "greedy") == 0


def test_a_short_text_passes_the_large_work_of_its_own_account() -> None:
    world = World(SPEED)
    while True:
        try:
            world.line.expected_s(MODEL, 100_000, "a")
        except Overloaded:
            break
        world.ask(*[500] * 200, account="a", held=True)
    assert admitted(world, "a", asked=1) == 1


def test_large_work_may_wait_in_proportion() -> None:
    world = World(SPEED)
    came = 0
    try:
        while True:
            world.line.expected_s(MODEL, 10_000, "a")
            world.ask(*[500] * 20, account="a", held=True)
            came += 1
    except Overloaded:
        pass
    assert came == pytest.approx(STRETCH, rel=0.15)


def test_nobody_is_refused_where_nobody_waits() -> None:
    world = World(100.0)  # slower than anybody's patience
    assert world.line.expected_s(MODEL, 250_000, "a") is not None


def test_what_has_left_the_line_counts_no_more() -> None:
    world = World(SPEED)
    requests = [world.ask(28, account="a", held=True) for _ in range(admitted(World(SPEED), "a"))]
    for request in requests:
        request.place.leave()
    assert admitted(world, "a", asked=1) == 1
    world.run()


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 500), st.booleans()), max_size=60))
def test_backlogs_are_what_was_added_and_not_removed(steps: list[tuple[str, int, bool]]) -> None:
    waiting, there = Waiting(), []
    for account, tokens, removes in steps:
        if removes and there:
            work = there.pop(0)
            waiting.remove(work, work.tokens, 1)
        else:
            work = _work(account, tokens)
            waiting.add(work, tokens)
            there.append(work)
        assert waiting.tokens == sum(each.tokens for each in there)
        assert waiting.accounts_with("z") == len({each.account_id for each in there}) + 1
        for name, count in Counter(each.account_id for each in there).items():
            ahead = waiting.ahead_of(name, 500)
            assert (ahead.rests, ahead.tokens) == (
                count,
                sum(each.tokens for each in there if each.account_id == name),
            )


def _work(account: str, tokens: int) -> Work:
    return Work(
        line=None,
        model_id="m",
        account_id=account,
        size=size_of(tokens),
        lengths=[tokens],
        asker=None,
        whole=True,
        needs_texts=False,
        needs_ids=False,
        rests=[Rest((0,), tokens)],
    )
