"""A hold ends exactly once, and every way of ending is in the table."""

import itertools

import pytest

from embedmesh.rules.holds import MOVES, NOTED, HoldEnd, HoldState

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
