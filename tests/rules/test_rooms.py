"""However much of a room one account takes, others find some."""

import pytest

from embedmesh.rules.errors import Overloaded
from embedmesh.rules.shares import Pace, Room
from tests.flow.world import Clock


def come(room: Room | Pace, account: str) -> bool:
    """One more request of an account; whether it may go on."""
    try:
        room.take(account)
    except Overloaded as refused:
        assert refused.message == "full"
        return False
    return True


def come_all(room: Room | Pace, account: str) -> int:
    came = 0
    while come(room, account):
        came += 1
    return came


def test_one_account_gets_most_of_the_room() -> None:
    assert come_all(Room(1_000, "full"), "a") == 800


def test_another_finds_room_beside_it() -> None:
    room = Room(1_000, "full")
    come_all(room, "a")
    assert come_all(room, "b") == 160
    assert room.taken == 960


def test_never_more_than_there_is_room_for() -> None:
    room = Room(50, "full")
    came = sum(come_all(room, f"a{number}") for number in range(100))
    assert came == room.taken == 50


@pytest.mark.parametrize("size", [1, 2])
def test_a_small_room_can_be_used_up(size: int) -> None:
    assert come_all(Room(size, "full"), "a") == size


def test_who_goes_makes_room() -> None:
    room = Room(10, "full")
    came = come_all(room, "a")
    for _ in range(came):
        room.give_back("a")
    assert room.taken == 0
    assert come_all(room, "b") == came


@pytest.mark.parametrize("others", [0, 1, 7, 300, 990])
@pytest.mark.parametrize("units", [1, 2, 33, 640])
def test_many_at_once_are_what_they_are_one_by_one(others: int, units: int) -> None:
    """Or who sends in large pieces would get more than its share, or less; and what is refused takes nothing."""

    def room() -> Room:
        made = Room(1_000, "full")
        for number in range(others):
            made.take(f"other {number}")
        return made

    singly, at_once = room(), room()
    fits = sum(come(singly, "a") for _ in range(units)) == units
    if fits:
        at_once.take("a", units)
    else:
        with pytest.raises(Overloaded):
            at_once.take("a", units)
    assert at_once.taken == others + (units if fits else 0)


def test_nothing_takes_nothing() -> None:
    """An empty body finds room, whoever else is there."""
    room = Room(1, "full")
    room.take("a")
    for _ in range(2):
        room.take("b", 0)
        room.give_back("b", 0)
    assert room.taken == 1


def test_a_pace_is_so_many_in_a_span_and_of_one_most_of_them() -> None:
    clock = Clock()
    pace = Pace(100, 60.0, clock, "full")
    assert (come_all(pace, "a"), come_all(pace, "b")) == (80, 16)
    clock.now += 59.9
    assert not come(pace, "a")
    clock.now += 0.1
    assert come_all(pace, "b") == 80
