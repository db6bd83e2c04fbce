"""No counter is admitted twice, late ones are while they can be told apart, and memory stays bounded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedmesh.signing.replay import INSTANCE_FORGOTTEN_S, SIGNING_INSTANCES_MAX, WINDOW_COUNTERS, ReplayWindow

NOW = 1_700_000_000
FAR = 2**64 - 1
WIDE = WINDOW_COUNTERS


@pytest.mark.parametrize(
    ("before", "counter", "admitted"),
    [
        ([1], 1, False),
        ([1, 2, 3], 2, False),
        ([1, WIDE + 1], 1, False),  # just outside
        ([5, WIDE + 1], 1, False),  # never seen, and nobody can say so any more
        ([5, WIDE], 5, False),
        ([FAR], 1, False),
        ([FAR], FAR, False),
        ([1, FAR], FAR - 1, True),
        ([], 0, True),
        ([5, WIDE], 1, True),  # the last that is inside
        ([5, 1], 4, True),
        ([1], FAR, True),
    ],
)
def test_a_counter_is_admitted_once(before: list[int], counter: int, admitted: bool) -> None:
    """Seen ones and those from before the window are refused."""
    window = ReplayWindow()
    assert all(window.admit("a", each, NOW) for each in before)
    assert window.admit("a", counter, NOW) == admitted


@given(st.lists(st.one_of(st.integers(0, 3 * WIDE), st.integers(0, 20)), max_size=60))
@settings(max_examples=40)
def test_the_window_does_what_a_list_would(counters: list[int]) -> None:
    """A counter is admitted if it was not before and is less than a window behind the highest."""
    window = ReplayWindow()
    seen: set[int] = set()
    for counter in counters:
        new = counter not in seen and counter > max(seen, default=counter) - WIDE
        assert window.new("a", counter) == new
        assert window.admit("a", counter, NOW) == new
        seen.add(counter)


def test_instances_do_not_know_each_other() -> None:
    """Two gateways may count alike."""
    window = ReplayWindow()
    assert window.admit("a", 1, NOW)
    assert window.admit("b", 1, NOW)
    assert not window.admit("a", 1, NOW)


def test_more_instances_than_may_be_are_refused_until_one_is_idle() -> None:
    """An instance is forgotten only when all it signed is too old anyway; until then a new one is refused."""
    window = ReplayWindow()
    for at in range(SIGNING_INSTANCES_MAX):
        assert window.admit(str(at), 1, NOW + (at > 0))
    assert not window.admit("new", 1, NOW + INSTANCE_FORGOTTEN_S)
    assert window.admit("1", 2, NOW + INSTANCE_FORGOTTEN_S)
    assert window.admit("new", 1, NOW + INSTANCE_FORGOTTEN_S + 1)  # the place of "0"
    assert not window.admit("newer", 1, NOW + INSTANCE_FORGOTTEN_S + 1)
    assert not window.admit("1", 2, NOW + INSTANCE_FORGOTTEN_S + 1)
