"""However many requests one account sends, others find room."""

import pytest

from embedmesh.edge.receive import Room
from embedmesh.rules.errors import Overloaded


def come(room: Room, account: str) -> bool:
    """One more request of an account; whether it may go on."""
    try:
        room.enter(account)
    except Overloaded:
        return False
    return True


def come_all(room: Room, account: str) -> int:
    came = 0
    while come(room, account):
        came += 1
    return came


def test_one_account_gets_most_of_the_room() -> None:
    assert come_all(Room(1_000), "a") == 800


def test_another_finds_room_beside_it() -> None:
    room = Room(1_000)
    come_all(room, "a")
    assert come_all(room, "b") == 160
    assert room.taken == 960


def test_never_more_than_there_is_room_for() -> None:
    room = Room(50)
    came = sum(come_all(room, f"a{number}") for number in range(100))
    assert came == room.taken == 50


@pytest.mark.parametrize("size", [1, 2])
def test_a_small_room_can_be_used_up(size: int) -> None:
    assert come_all(Room(size), "a") == size


def test_who_goes_makes_room() -> None:
    room = Room(10)
    came = come_all(room, "a")
    for _ in range(came):
        room.leave("a")
    assert room.taken == 0
    assert come_all(room, "b") == came
