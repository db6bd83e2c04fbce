"""However much one account takes of something, others find some; and never more is given than there is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.rules.shares import Shares


def take_all(shares: Shares, account: str, number: int) -> int:
    """How often it got so many."""
    times = 0
    while shares.take(account, number):
        times += 1
    return times


def test_one_account_gets_four_fifths_and_others_find_room_beside_it() -> None:
    shares = Shares(1_000)
    assert shares.alone == take_all(shares, "a", 1) == 800
    assert take_all(shares, "b", 1) == 160
    assert take_all(shares, "c", 1) == 32
    assert shares.taken == 992


@pytest.mark.parametrize("number", [1, 7, 800])
def test_what_is_alone_the_most_of_an_account_can_be_had_at_once(number: int) -> None:
    shares = Shares(1_000)
    assert not shares.take("a", shares.alone + 1)
    assert shares.taken == 0
    assert shares.take("a", number)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400)), max_size=60))
def test_books_are_kept_exactly(asked: list[tuple[str, int]]) -> None:
    shares = Shares(1_000)
    had = [each for each in asked if shares.take(*each)]
    for account in "abc":
        mine = sum(number for who, number in had if who == account)
        assert mine <= shares.alone
    assert shares.taken == sum(number for _, number in had) <= 1_000
    for each in had:
        shares.give_back(*each)
    assert (shares.taken, shares._accounts) == (0, {})
