"""A lock that can be taken without a coroutine: one holder, in order, whoever goes."""

import asyncio

import pytest

from embedmesh.engine.turn import Turn


async def test_it_is_had_in_order_by_one_at_a_time() -> None:
    turn, order = Turn(), []

    async def one(number: int) -> None:
        async with turn:
            order.append(number)
            await asyncio.sleep(0)
            assert order[-1] == number

    assert turn.take()
    assert not turn.take()
    tasks = [asyncio.create_task(one(number)) for number in range(3)]
    await asyncio.sleep(0)
    assert order == []
    turn.give_back()
    assert not turn.take(), "who has waited goes first"
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2]
    assert turn.take()


@pytest.mark.parametrize("handed", [False, True], ids=["waiting", "just handed to it"])
async def test_who_is_cancelled_does_not_keep_it(handed: bool) -> None:
    turn = Turn()

    async def hold() -> None:
        async with turn:
            await asyncio.sleep(1)

    assert turn.take()
    gone, stays = asyncio.create_task(hold()), asyncio.create_task(hold())
    await asyncio.sleep(0)
    if handed:
        turn.give_back()
        gone.cancel()
    else:
        gone.cancel()
        turn.give_back()
    with pytest.raises(asyncio.CancelledError):
        await gone
    await asyncio.sleep(0)
    assert not turn.take()
    stays.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stays
    assert turn.take()


async def test_a_failure_inside_gives_it_back() -> None:
    turn = Turn()
    with pytest.raises(ZeroDivisionError):
        async with turn:
            raise ZeroDivisionError
    assert turn.take()
