"""A coarse deadline ends what takes too long, and nothing else."""

import asyncio
import time

import pytest

from embedmesh.rules import within as module
from embedmesh.rules.within import TICK_S, within

pytestmark = pytest.mark.asyncio

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
