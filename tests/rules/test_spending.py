"""Whether a key has a tab, and how large it is: a table of spending, and what follows from it."""

import pytest

from embedmesh.rules.spending import RECENT_S, Spending, TabSize, is_ordinary, tab_deadline_ms, tab_size

NOW_MS = 1_800_000_000_000


@pytest.mark.parametrize(
    ("noted", "now_s", "wants"),
    [
        ([(10, 0.0)], 0.1, None),  # one request is no traffic
        ([(10, 0.0), (10, RECENT_S + 0.1)], RECENT_S + 0.2, None),  # two that are far apart neither
        ([(10, 0.0), (10, 1.9)], 1.9, TabSize(160, 40)),  # slow: sixteen requests, of which four may be left
        ([(10, 0.0), (11, 0.5)], 1.0, TabSize(11 * 16, 44)),  # the mean is rounded up
        ([(10, 0.01 * at) for at in range(101)], 1.0, TabSize(2_020, 40)),  # fast: two seconds' worth
        ([(10, 0.0), (10, 0.0)], 0.0, TabSize(2_000, 40)),  # at one moment: as if that had taken 20 ms
        ([(0, 0.0), (0, 0.1)], 0.1, TabSize(1, 1)),  # for nothing: a tab has something in it
    ],
)
def test_a_tab_is_worth_what_its_key_soon_spends(
    noted: list[tuple[int, float]], now_s: float, wants: TabSize | None
) -> None:
    """`noted` are exact holds: amounts and seconds."""
    spending = Spending(noted[0][1])
    for amount, at_s in noted:
        spending.note(amount, at_s)
    assert spending.tab_size(now_s) == wants


def test_a_key_that_was_refused_a_tab_is_not_offered_another_at_once() -> None:
    """There was no money for one: asking the store at every request would cost more than tabs save."""
    spending = Spending(0.0)
    spending.note(10, 0.0)
    spending.note(10, 0.1)
    spending.not_before_s = 1.1
    assert spending.tab_size(1.0) is None
    assert spending.tab_size(1.1) is not None


def test_amounts_are_whole_and_large_ones_exact() -> None:
    """No float is near them."""
    assert tab_size(3 * 10**15 + 1, 3, 1.0) == TabSize((10**15 + 1) * 16, (10**15 + 1) * 4)


def test_requests_that_may_take_longer_than_others_are_not_under_a_tab() -> None:
    """A tab's deadline is that of an ordinary request at its last moment."""
    deadline_ms = tab_deadline_ms(NOW_MS)
    assert deadline_ms == NOW_MS + 70_000
    assert is_ordinary(NOW_MS + 55_000, NOW_MS)
    assert is_ordinary(deadline_ms, NOW_MS)
    assert not is_ordinary(deadline_ms + 1, NOW_MS)
