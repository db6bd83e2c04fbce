"""Large works take turns by account: one account's many delay another's one by a turn, and nothing else at all."""

import asyncio
import threading
import time
from collections.abc import Generator

import pytest

from embedmesh.flow import turns as module
from embedmesh.flow.turns import ACCOUNT_WORKS_MAX, TURN_S, Turns
from embedmesh.rules.errors import Overloaded


def steps(log: list[str], name: str, turns: int) -> Generator[None, None, str]:
    """A work of so many turns, that says when each begins."""
    for _ in range(turns):
        log.append(name)
        until = time.thread_time() + TURN_S
        while time.thread_time() < until:
            pass
        yield
    return name


async def test_accounts_take_turns_whatever_each_has_waiting() -> None:
    """Of one that sends six works of three turns, and one that comes after it with one of two: turn by turn."""
    turns, log = Turns(threads=1), list[str]()
    many = [asyncio.ensure_future(turns.run("a", steps(log, "a", 3))) for _ in range(6)]
    await asyncio.sleep(0)
    assert await turns.run("b", steps(log, "b", 2)) == "b"
    before = log[: len(log) - log[::-1].index("b")]
    assert before.count("a") <= 4
    assert await asyncio.gather(*many) == ["a"] * 6
    assert log.count("a") == 18


async def test_works_of_one_account_end_in_the_order_in_which_they_came() -> None:
    turns, log = Turns(threads=1), list[str]()
    await asyncio.gather(*(turns.run("a", steps(log, str(number), 2)) for number in range(4)))
    assert log == [each for each in "0123" for _ in range(2)]


async def test_what_a_work_raises_is_raised_and_the_next_goes_on() -> None:
    def wrong() -> None:
        raise ValueError("wrong")

    turns = Turns(threads=1)
    with pytest.raises(ValueError, match="wrong"):
        await turns.call("a", wrong)
    assert await turns.call("a", "x".upper) == "X"


async def test_an_account_may_have_a_bounded_number_waiting_and_others_may_come() -> None:
    turns, go = Turns(threads=1), threading.Event()
    first = asyncio.ensure_future(turns.call("a", go.wait))
    await asyncio.sleep(0)
    waiting = [asyncio.ensure_future(turns.call("a", "x".upper)) for _ in range(ACCOUNT_WORKS_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=str(ACCOUNT_WORKS_MAX)):
        await turns.call("a", "x".upper)
    other = asyncio.ensure_future(turns.call("b", "y".upper))
    await asyncio.sleep(0)
    go.set()
    assert (await other, await first) == ("Y", True)
    assert await asyncio.gather(*waiting) == ["X"] * ACCOUNT_WORKS_MAX
    assert not turns._waiting


async def test_a_work_whose_caller_has_gone_ends_with_its_turn() -> None:
    """Also one that has not begun."""
    turns, log = Turns(threads=1), list[str]()
    gone = asyncio.ensure_future(turns.run("a", steps(log, "gone", 1_000)))
    never = asyncio.ensure_future(turns.run("a", steps(log, "never", 1)))
    await asyncio.sleep(0)
    gone.cancel()
    never.cancel()
    assert await turns.run("a", steps(log, "next", 1)) == "next"
    assert log.count("gone") <= 1
    assert "never" not in log


async def test_threads_of_works_are_no_ones_else() -> None:
    """With all of them taken names are still looked up, and whatever else runs in the loop's own threads."""
    turns, go = Turns(), threading.Event()
    taken = [asyncio.ensure_future(turns.call(name, go.wait)) for name in "abcdefgh"]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(threading.current_thread) is not threading.main_thread()
    assert sum(thread.name.startswith("count") for thread in threading.enumerate()) >= module.THREADS
    go.set()
    assert all(await asyncio.gather(*taken))
