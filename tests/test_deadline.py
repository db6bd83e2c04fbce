"""A coarse deadline ends what takes too long, and nothing else."""

import asyncio
import gc
import time
import weakref
from collections.abc import Callable

import pytest
import uvloop

from embedmesh import deadline as module
from embedmesh.deadline import TICK_S, within

LOOPS = pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
NewLoop = Callable[[], asyncio.AbstractEventLoop]
LATE_S = 0.25  # a busy machine; a quiet one is two ticks late


async def sleeps(seconds: float, within_s: float) -> float:
    """How long it was let."""
    began = time.monotonic()
    with within(within_s):
        await asyncio.sleep(seconds)
    return time.monotonic() - began


def kept() -> int:
    """Deadlines that are watched now."""
    watch = module._watches.get(asyncio.get_running_loop())
    return sum(map(len, watch._due.values())) if watch is not None else 0


async def test_it_ends_what_takes_too_long_and_not_earlier() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await sleeps(5, 0.1)
    assert 0.1 <= time.monotonic() - began < 0.1 + LATE_S
    assert kept() == 0


async def test_it_may_be_given_more_time_when_it_is_over() -> None:
    """Asked each time; and what ends in the time that it was given leaves nothing behind."""
    asked: list[float] = []

    def more() -> float:
        asked.append(time.monotonic())
        return 0.1 if len(asked) < 3 else 0.0

    began = time.monotonic()
    with pytest.raises(TimeoutError), within(0.05, more):
        await asyncio.sleep(5)
    assert len(asked) == 3
    assert time.monotonic() - began >= 0.25
    with within(0.05, lambda: 5.0):
        await asyncio.sleep(0.15)
    assert kept() == 0


@LOOPS
def test_it_is_at_most_two_ticks_late(new_loop: NewLoop) -> None:
    """The best of some: what a busy machine adds is not its own."""

    async def lateness() -> float:
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            await sleeps(5, 0.03)
        return time.monotonic() - began - 0.03

    async def some() -> list[float]:
        return [await lateness() for _ in range(6)]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        late = runner.run(some())
    assert min(late) >= -0.001  # uvloop's clock has milliseconds
    assert min(late) <= 2 * TICK_S


async def test_what_ends_before_is_left_alone() -> None:
    for _ in range(100):
        await sleeps(0, 0.05)
    await asyncio.sleep(4 * TICK_S)
    assert kept() == 0
    assert await sleeps(0.1, 5) >= 0.1


async def test_many_at_once_end_each_at_its_own_time() -> None:
    ended: list[int] = []

    async def one(number: int) -> None:
        with pytest.raises(TimeoutError):
            await sleeps(5, 0.06 * number)
        ended.append(number)

    await asyncio.gather(*map(one, (4, 1, 3, 2)))
    assert ended == [1, 2, 3, 4]


async def test_the_inner_one_ends_what_is_inside_only() -> None:
    with within(5):
        with pytest.raises(TimeoutError):
            await sleeps(5, 0.05)
        await asyncio.sleep(0)
    with pytest.raises(TimeoutError), within(0.05):
        await sleeps(5, 5)


async def test_who_is_cancelled_from_outside_is_cancelled() -> None:
    """Also where the deadline passes meanwhile."""
    for within_s in (5, 0.02):
        task = asyncio.create_task(sleeps(5, within_s))
        await asyncio.sleep(0)
        task.cancel()
        if within_s < 1:
            time.sleep(0.05)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert kept() == 0


async def test_it_works_again_after_a_while_without_any() -> None:
    await sleeps(0, 0.02)
    await asyncio.sleep(5 * TICK_S)
    with pytest.raises(TimeoutError):
        await sleeps(5, 0.02)


async def test_a_sooner_deadline_does_not_wait_for_a_later_one() -> None:
    slow = asyncio.create_task(sleeps(0.3, 60))
    await asyncio.sleep(0)
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        await sleeps(5, 0.05)
    assert time.monotonic() - began < 0.05 + LATE_S
    await slow


@LOOPS
def test_of_many_none_ends_early_and_nothing_is_kept(new_loop: NewLoop) -> None:
    async def one(number: int) -> None:
        within_s = 0.02 + number % 7 * 0.015
        began = time.monotonic()
        try:
            await sleeps(5 if number % 2 else 0, within_s)
        except TimeoutError:  # where the machine stalls, uvloop looks at its timers before it lets anyone go on
            assert time.monotonic() - began >= within_s - 0.001
        else:
            assert number % 2 == 0

    async def many() -> None:
        await asyncio.gather(*map(one, range(200)))
        await asyncio.sleep(4 * TICK_S)
        watch = module._watches[asyncio.get_running_loop()]
        assert (watch._due, watch._next) == ({}, 0)
        assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(many())


async def test_what_ends_early_leaves_its_place_when_the_timer_next_comes() -> None:
    """Under load each tick has deadlines that nobody waits for any more."""
    for number in range(50):
        await sleeps(0, 0.02 + number * TICK_S)
    await asyncio.sleep(4 * TICK_S)
    watch = module._watches[asyncio.get_running_loop()]
    assert not watch._due


async def test_two_that_pass_at_one_time_end_as_the_outer_one() -> None:
    inner_ended = False
    with pytest.raises(TimeoutError), within(0.03):
        with within(0.03):
            await asyncio.sleep(5)
        inner_ended = True
    task = asyncio.current_task()
    assert task is not None
    assert (inner_ended, task.cancelling()) == (False, 0)
    await asyncio.sleep(3 * TICK_S)  # nothing comes later


async def test_what_is_raised_inside_is_what_is_raised() -> None:
    with pytest.raises(KeyError), within(5):
        raise KeyError
    with pytest.raises(KeyError), within(0.02):
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            raise KeyError from None
    task = asyncio.current_task()
    assert task is not None and task.cancelling() == 0
    assert kept() == 0


async def test_a_time_that_is_over_ends_the_first_wait() -> None:
    for seconds in (0.0, -1.0):
        with pytest.raises(TimeoutError):
            await sleeps(5, seconds)
        with within(seconds):
            pass


async def test_it_goes_together_with_the_standard_one() -> None:
    with within(5), pytest.raises(TimeoutError):
        async with asyncio.timeout(0.03):
            await asyncio.sleep(5)
    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError):
            await sleeps(5, 0.03)


@LOOPS
def test_each_loop_has_its_own_and_is_not_kept(new_loop: NewLoop) -> None:
    """One after another, and with a deadline that has not passed when the loop ends."""

    async def use() -> "weakref.ref[asyncio.AbstractEventLoop]":
        with pytest.raises(TimeoutError):
            await sleeps(5, 0.02)
        await sleeps(0, 60)
        return weakref.ref(asyncio.get_running_loop())

    loops = []
    for _ in range(2):
        with asyncio.Runner(loop_factory=new_loop) as runner:
            loops.append(runner.run(use()))
        del runner
    gc.collect()
    assert [each() for each in loops] == [None, None]


def test_two_loops_that_take_turns_do_not_disturb_each_other() -> None:
    with asyncio.Runner() as one, asyncio.Runner() as other:
        for runner in (one, other, one, other):
            with pytest.raises(TimeoutError):
                runner.run(sleeps(5, 0.02))
            runner.run(sleeps(0, 0.02))


@LOOPS
def test_who_is_cancelled_just_when_the_time_is_over_is_cancelled(new_loop: NewLoop) -> None:
    """Both come before the task can run: the cancellation is somebody's wish, and is not lost."""

    async def both_at_once() -> None:
        task = asyncio.create_task(sleeps(5, 0.02))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.03, task.cancel)
        time.sleep(0.1)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert kept() == 0

    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(both_at_once())
