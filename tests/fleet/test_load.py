"""A node's speed is learned from the time it was busy, whatever the mix, the order and how much was waiting."""

import random
from collections import deque

import pytest

from embedmesh.fleet.load import PRIOR_FIXED_S, PRIOR_TOKENS_PER_S, Load

SPEEDS = [(15_000, 0.003), (200, 0.05), (400_000, 0.001)]  # tokens per second, fixed cost in seconds


def work(load: Load, now: float, tokens: int, seconds: float) -> float:
    """One part alone on the node."""
    load.began(tokens, now)
    load.ended(tokens, now + seconds, well=True)
    return now + seconds


@pytest.mark.parametrize(("tokens_per_s", "fixed_s"), SPEEDS)
def test_from_parts_that_come_one_by_one(tokens_per_s: float, fixed_s: float) -> None:
    dice, load, now = random.Random(5), Load(), 0.0
    for _ in range(200):
        tokens = dice.choice([8, 60, 300, 5_000])
        now = work(load, now + 0.1, tokens, (fixed_s + tokens / tokens_per_s) * dice.uniform(0.95, 1.05))
    assert load.finish_s(10_000, now) == pytest.approx(fixed_s + 10_000 / tokens_per_s, rel=0.1)


@pytest.mark.parametrize(("tokens_per_s", "fixed_s"), SPEEDS)
def test_from_a_node_that_is_never_idle(tokens_per_s: float, fixed_s: float) -> None:
    """Three parts are always outstanding: how long each took says little, how fast they end says all."""
    dice, load, now = random.Random(5), Load(), 0.0
    queue: deque[int] = deque()
    for _ in range(400):
        while len(queue) < 3:
            queue.append(dice.choice([8, 60, 300, 5_000]))
            load.began(queue[-1], now)
        tokens = queue.popleft()
        now += (fixed_s + tokens / tokens_per_s) * dice.uniform(0.95, 1.05)
        load.ended(tokens, now, well=True)
    outstanding = sum(queue)
    assert load.tokens == outstanding
    expected = 3 * fixed_s + (outstanding + 10_000) / tokens_per_s
    assert load.finish_s(10_000, now) == pytest.approx(expected, rel=0.25)


@pytest.mark.parametrize(("tokens_per_s", "fixed_s"), SPEEDS)
def test_from_a_node_where_short_parts_pass_large_ones(tokens_per_s: float, fixed_s: float) -> None:
    """Two large parts are always outstanding, and short ones run between the batches of the first."""
    dice, load, now = random.Random(5), Load(interleaves=True), 0.0
    large: deque[int] = deque()
    for _ in range(100):
        while len(large) < 2:
            large.append(dice.choice([600, 3_000, 8_000]))
            load.began(large[-1], now, bulk=True)
        left = large[0]
        while left > 0:
            batch = min(left, 1_024)
            left -= batch
            now += batch / tokens_per_s
            if left > 0 and dice.random() < 0.5:
                load.began(13, now)
                now += fixed_s + 13 / tokens_per_s
                load.ended(13, now, well=True)
        now += fixed_s
        load.ended(large.popleft(), now, well=True, bulk=True)
    assert load.tokens_per_s == pytest.approx(tokens_per_s, rel=0.1)
    outstanding = sum(large)
    assert load.remaining_s(now) == pytest.approx(fixed_s + outstanding / tokens_per_s, rel=0.1)
    now += 0.5 * outstanding / tokens_per_s
    load.began(13, now)
    load.ended(13, now + 0.001, well=True)
    assert load.remaining_s(now) == pytest.approx(fixed_s + 0.5 * outstanding / tokens_per_s, rel=0.3)


def test_parts_of_one_size_leave_the_slope_within_reason() -> None:
    """A hundred probes of a dozen tokens say little of bulk: the estimate stays within reach of the prior."""
    load, now = Load(), 0.0
    for _ in range(100):
        now = work(load, now + 1.0, 12, 0.004)
    assert load.finish_s(12, now) == pytest.approx(0.004, rel=0.1)
    assert load.finish_s(100_000, now) <= 2 * 100_000 / PRIOR_TOKENS_PER_S


def test_large_parts_of_one_size_are_expected_to_take_what_they_took() -> None:
    load, now = Load(), 0.0
    for _ in range(100):
        now = work(load, now, 4_000, 0.1)
    assert load.finish_s(4_000, now) == pytest.approx(0.1, rel=0.1)


def test_one_outlier_does_not_close_a_node() -> None:
    load, now = Load(), 0.0
    for _ in range(50):
        now = work(load, now, 100, 0.01)
        now = work(load, now, 1_000, 0.08)
    now = work(load, now, 10, 5.0)
    assert load.finish_s(100, now) < 2.0
    assert 0 < load.finish_s(1, now) <= load.finish_s(int(PRIOR_TOKENS_PER_S), now)


def test_short_parts_that_stall_do_not_make_long_ones_look_free() -> None:
    """As when a worker is replaced under a question: a line through such points has no slope."""
    load, now = Load(), 0.0
    now = work(load, now, 512, 0.13)
    for seconds in (0.01, 0.01, 0.7, 0.7, 0.7):
        now = work(load, now, 6, seconds)
        assert load.finish_s(10_000, now) > 10_000 / 512 * 0.13 / 5


def test_what_was_given_up_as_late_is_expected_to_take_longer_next_time() -> None:
    load, now = Load(), 0.0
    for _ in range(50):
        now = work(load, now, 100, 0.01)
    expected_s = load.finish_s(10_000, now)
    load.began(10_000, now)
    load.ended(10_000, now + 9 * expected_s, well=False, late=True)
    assert load.finish_s(10_000, now) > 2 * expected_s


def test_a_node_that_turns_slow_is_known_within_a_few_seconds_of_its_work() -> None:
    load, now = Load(), 0.0
    for _ in range(200):
        now = work(load, now, 100, 0.01)
        now = work(load, now, 1_000, 0.1)
    slow_from = now
    while load.finish_s(1_000, now) < 0.5:
        now = work(load, now, 1_000, 1.0)
    assert now - slow_from <= 20


def test_a_node_that_is_starved_all_at_once_and_then_is_not_is_known_within_a_few_answers() -> None:
    """Twenty-five times slower, and back: within twice the truth after four answers, and after six."""
    load, now = Load(), 0.0
    for _ in range(100):
        now = work(load, now, 12, 0.004)
        now = work(load, now, 640, 0.056)
    for _ in range(4):
        now = work(load, now, 640, 1.4)
    assert 0.7 < load.finish_s(640, now) < 2.8
    for _ in range(6):
        now = work(load, now, 640, 0.056)
    assert load.finish_s(640, now) < 0.112


def test_what_is_outstanding_counts_down_with_the_time() -> None:
    load = Load()
    load.began(5_000, 100.0)
    due_s = PRIOR_FIXED_S + 5_000 / PRIOR_TOKENS_PER_S
    assert load.remaining_s(100.0) == pytest.approx(due_s)
    assert load.remaining_s(100.5) == pytest.approx(due_s - 0.5)


def test_a_node_that_is_late_looks_worse_the_longer_it_says_nothing() -> None:
    load = Load()
    load.began(10, 0.0)
    late = [load.remaining_s(now) for now in (1.0, 2.0, 10.0)]
    assert late == sorted(late)
    assert late[-1] > 9


def test_what_failed_teaches_nothing_and_leaves_nothing_outstanding() -> None:
    load = Load()
    before = load.finish_s(100, 0.0)
    for now in (0.0, 10.0):
        load.began(100, now)
        load.ended(100, now + 9, well=False)
    assert (load.tokens, load.parts) == (0, 0)
    assert load.finish_s(100, 20.0) == before


def test_what_waits_there_for_other_gateways_is_before_us() -> None:
    load = Load()
    alone = load.finish_s(100, 0.0)
    load.others_say(5_000, until=6.0)
    assert load.finish_s(100, 5.9) == pytest.approx(alone + 5_000 / PRIOR_TOKENS_PER_S)
    assert load.finish_s(100, 6.1) == alone, "an old word does not count"
