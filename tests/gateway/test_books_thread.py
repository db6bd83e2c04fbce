"""The books, asked from the event loop: one call at a time, few that wait, none for long; opened anew if it fails."""

import asyncio
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest

from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.rules.errors import NotFound, Overloaded, SetupError, StoreUnavailable


class FakeBooks:
    """Counts how often it was opened and closed. `fails` are what the next openings raise."""

    opened = 0
    closed = 0

    def __init__(self) -> None:
        self.fails: list[Exception] = []

    def open(self) -> Any:
        if self.fails:
            raise self.fails.pop()
        self.opened += 1
        return self

    def close(self) -> None:
        self.closed += 1


@asynccontextmanager
async def thread_over(books: FakeBooks, **options: Any) -> AsyncIterator[BooksThread]:
    thread = BooksThread(books.open, **options)
    try:
        yield thread
    finally:
        await thread.close()


def failing(error: Exception) -> Any:
    def do(books: object) -> None:
        raise error

    return do


async def test_all_calls_are_made_in_one_thread_with_books_that_the_first_one_opened() -> None:
    books = FakeBooks()
    async with thread_over(books) as thread:
        assert books.opened == 0
        threads = await asyncio.gather(*(thread.ask(lambda _: threading.get_ident()) for _ in range(20)))
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()
    assert (books.opened, books.closed) == (1, 1)


@pytest.mark.parametrize("error", [NotFound("no"), ValueError("a bug")])
async def test_what_a_call_raises_is_raised_and_the_books_stay_open(error: Exception) -> None:
    books = FakeBooks()
    async with thread_over(books) as thread:
        with pytest.raises(type(error), match=str(error)):
            await thread.ask(failing(error))
        await thread.ask(lambda _: None)
        assert (books.opened, books.closed) == (1, 0)


async def test_the_books_are_opened_anew_after_the_store_failed_and_its_words_are_not_told() -> None:
    """They may name a path or an address."""
    books = FakeBooks()
    async with thread_over(books) as thread:
        with pytest.raises(StoreUnavailable) as failure:
            await thread.ask(failing(StoreUnavailable("/secret/place is full")))
        assert "secret" not in failure.value.message
        assert await thread.ask(id) == id(books)
        assert (books.opened, books.closed) == (2, 1)


async def test_old_books_are_used_while_new_ones_cannot_be_opened() -> None:
    """A store that cannot be written may still be read."""
    books = FakeBooks()
    async with thread_over(books) as thread:
        with pytest.raises(StoreUnavailable):
            await thread.ask(failing(StoreUnavailable("read-only")))
        books.fails = [SetupError("read-only")]
        assert await thread.ask(id) == id(books)
        assert (books.opened, books.closed) == (1, 0)
        await thread.ask(lambda _: None)
        assert (books.opened, books.closed) == (2, 1)


async def test_books_that_cannot_be_opened_are_an_unavailable_store_until_they_can() -> None:
    books = FakeBooks()
    books.fails = [SetupError("/secret/place"), StoreUnavailable("/secret/place")]
    async with thread_over(books) as thread:
        for _ in range(2):
            with pytest.raises(StoreUnavailable) as failure:
                await thread.ask(lambda _: None)
            assert "secret" not in failure.value.message
        await thread.ask(lambda _: None)


async def test_more_calls_than_may_wait_are_refused_and_one_account_leaves_room_for_others() -> None:
    gate = threading.Event()
    async with thread_over(FakeBooks(), waiting_max=10) as thread:
        waiting = [asyncio.create_task(thread.ask(lambda _: gate.wait(), "a")) for _ in range(8)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="At most 10 calls to the store wait"):
            await thread.ask(lambda _: None, "a")
        waiting += [asyncio.create_task(thread.ask(lambda _: gate.wait(), "b")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await thread.ask(lambda _: None, "c")
        gate.set()
        assert all(await asyncio.gather(*waiting))
        await thread.ask(lambda _: None, "a")


async def test_accounts_have_their_turns_one_after_another() -> None:
    """However many calls one account has waiting, another's next one is made after one of them."""
    gate, made = threading.Event(), list[str]()

    def noted(account: str, _: object) -> bool:
        made.append(account)
        return True

    async with thread_over(FakeBooks()) as thread:
        waiting = [asyncio.create_task(thread.ask(lambda _: gate.wait(), "a"))]
        for account in ("a", "a", "a", "b", "a", "c", "b"):
            waiting.append(asyncio.create_task(thread.ask(partial(noted, account), account)))
            await asyncio.sleep(0)
        gone = waiting.pop(1)
        gone.cancel()
        await asyncio.wait([gone])
        gate.set()
        await asyncio.gather(*waiting)
    assert made == ["a", "b", "c", "a", "b", "a"]


async def test_who_goes_while_it_waits_leaves_nothing() -> None:
    gate = threading.Event()
    async with thread_over(FakeBooks()) as thread:
        first = asyncio.create_task(thread.ask(lambda _: gate.wait(), "a"))
        await asyncio.sleep(0)
        for _ in range(100):
            gone = asyncio.create_task(thread.ask(lambda _: None, "b"))
            await asyncio.sleep(0)
            gone.cancel()
            await asyncio.wait([gone])
        assert (thread._turns._waiting, thread._waiting.taken) == ({}, 1)
        gate.set()
        await first


async def test_an_operator_waits_for_none_of_the_calls_that_callers_make_without_end() -> None:
    """Counted: when its call is made, one of theirs, the one that was under way, is all that was made meanwhile."""
    made = 0
    begun, gate = threading.Event(), threading.Event()
    end = False

    def of_a_caller(_: object) -> None:
        nonlocal made
        begun.set()
        gate.wait()
        made += 1

    async def without_end(thread: BooksThread, account: str) -> None:
        while not end:
            await thread.ask(of_a_caller, account)

    async with thread_over(FakeBooks()) as operators, thread_over(FakeBooks(), first=operators) as callers:
        looping = [asyncio.create_task(without_end(callers, f"a{number % 5}")) for number in range(40)]
        await asyncio.to_thread(begun.wait)

        def revoke(_: object) -> int:
            gate.set()  # only now the call that is under way may end
            return made

        for _ in range(20):
            before = made
            assert await operators.ask(revoke) <= before + 1
            await callers.ask(lambda _: None, "another")  # and they go on
        end = True
        await asyncio.gather(*looping)
    assert made > 20


async def test_viewers_keep_no_operator_out_nor_waiting_and_no_caller_waiting() -> None:
    gate, begun, made = threading.Event(), threading.Event(), list[str]()

    def noted(who: str, _: object) -> None:
        made.append(who)
        begun.set()
        if who == "v0":
            gate.wait()

    async with (
        thread_over(FakeBooks(), waiting_max=8) as operators,
        thread_over(FakeBooks(), first=operators) as callers,
    ):
        viewing = [asyncio.create_task(operators.ask(partial(noted, f"v{n}"), viewer=f"v{n}")) for n in range(4)]
        await asyncio.to_thread(begun.wait)
        with pytest.raises(Overloaded, match="At most 4 calls of viewers"):
            await operators.ask(lambda _: None, viewer="v4")
        await callers.ask(lambda _: None, "a")
        acting = [asyncio.create_task(operators.ask(partial(noted, "operator"))) for _ in range(6)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*viewing, *acting)
    assert made == ["v0", *["operator"] * 6, "v1", "v2", "v3"]


async def test_a_call_that_takes_long_is_given_up_and_so_are_those_behind_it_which_are_never_made() -> None:
    gate, made = threading.Event(), []
    async with thread_over(FakeBooks(), answer_s=0.05) as thread:
        slow = asyncio.create_task(thread.ask(lambda _: gate.wait()))
        behind = asyncio.create_task(thread.ask(lambda _: made.append("behind")))
        for each in (slow, behind):
            with pytest.raises(StoreUnavailable, match="may still happen"):
                await each
        gate.set()
        await thread.ask(lambda _: made.append("after"))
    assert made == ["after"]


async def test_a_call_whose_caller_went_ends_in_the_thread_before_the_next_begins() -> None:
    gate, begun, ended = threading.Event(), threading.Event(), []

    def slow(_: object) -> None:
        begun.set()
        gate.wait()
        ended.append("slow")

    async with thread_over(FakeBooks()) as thread:
        gone = asyncio.create_task(thread.ask(slow))
        await asyncio.to_thread(begun.wait)
        gone.cancel()
        after = asyncio.create_task(thread.ask(lambda _: ended.append("after")))
        await asyncio.sleep(0.01)
        gate.set()
        await after
    assert ended == ["slow", "after"]


async def test_nothing_is_asked_after_the_end() -> None:
    books = FakeBooks()
    async with thread_over(books) as thread:
        await thread.ask(lambda _: None)
    with pytest.raises(StoreUnavailable):
        await thread.ask(lambda _: None)
    assert (books.opened, books.closed) == (1, 1)


STUCK = """
import asyncio, threading
from embedmesh.gateway.api.books_thread import BooksThread
from embedmesh.rules.errors import StoreUnavailable

async def main():
    thread = BooksThread(object, answer_s=0.05)
    try:
        await thread.ask(lambda _: threading.Event().wait())
    except StoreUnavailable:
        print("given up", flush=True)
    await thread.close()

asyncio.run(main())
"""


def test_a_call_that_never_ends_does_not_keep_the_process_from_ending() -> None:
    """A gateway that has to start anew must not wait for a disk that does not answer, or for a check of all money."""
    ran = subprocess.run([sys.executable, "-c", STUCK], capture_output=True, text=True, timeout=20, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "given up\n", "")
