"""A hold ends exactly once, and every way of ending is in the table."""

import itertools
from typing import Any

import msgspec
import pytest

from embedmesh.rules.holds import MOVES, NOTED, Charge, HoldEnd, HoldState, Meter, Metered, Payable

FINAL = (HoldState.CAPTURED, HoldState.RELEASED)


@pytest.mark.parametrize(("state", "end"), list(itertools.product(FINAL, HoldEnd)))
def test_nothing_moves_an_ended_hold(state: HoldState, end: HoldEnd) -> None:
    """A final state has no way out."""
    assert (state, end) not in MOVES


@pytest.mark.parametrize("end", HoldEnd)
def test_everything_ends_an_open_hold(end: HoldEnd) -> None:
    """Only a capture captures; whatever else ends a hold gives the money back."""
    captures = end in {HoldEnd.CAPTURE, *NOTED.values()}
    assert MOVES[HoldState.OPEN, end] is (HoldState.CAPTURED if captures else HoldState.RELEASED)


def test_no_move_leads_back() -> None:
    """No move makes a hold open again."""
    assert HoldState.OPEN not in MOVES.values()


SOUND = Charge(40, 7, "m", "key_1", "n1", price=5, payables=(Payable("n1", 10), Payable("n2", 30)))


@pytest.mark.parametrize(
    ("change", "sound"),
    [
        ({}, True),
        ({"cost_nanousd": 50}, True),
        ({"cost_nanousd": 51}, False),
        ({"cost_nanousd": 39}, False),
        ({"cost_nanousd": 0, "payables": ()}, True),
        ({"cost_nanousd": -1, "payables": ()}, False),
        ({"payables": (Payable("n1", 10), Payable("n1", 10))}, False),
        ({"payables": (Payable("n1", -10), Payable("n2", 10))}, False),
        ({"tokens": -1}, False),
        ({"price": -1}, False),
        ({"price": None}, True),
        ({"meters": (Metered(Meter.INPUT, 1, 1),)}, False),
        ({"meters": (Metered(Meter.INPUT, 1, 1),), "price": None}, True),
    ],
)
def test_what_a_hold_of_50_can_be_captured_for(change: dict[str, Any], sound: bool) -> None:
    """Whatever the store would refuse is known before."""
    assert msgspec.structs.replace(SOUND, **change).is_sound(50) is sound
