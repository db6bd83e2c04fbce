"""Which sequences run together, as tables: nothing here waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedmesh.engine.plan import BATCH_ROWS_MAX, BATCH_TOKENS_MAX, CallRows, next_batch, pad_length, shapes


@pytest.mark.parametrize(
    ("tokens", "padded"),
    [(1, 4), (4, 4), (5, 8), (32, 32), (33, 40), (64, 64), (65, 80), (129, 144), (256, 256), (257, 288), (1025, 1152)],
)
def test_lengths_are_padded_in_steps(tokens: int, padded: int) -> None:
    assert pad_length(tokens) == padded


@pytest.mark.parametrize(
    ("calls", "last_was_bulk", "rows", "length", "picks"),
    [
        # A lone text runs at once and alone.
        ([[10]], False, 1, 12, [(0, 0)]),
        # Small calls share a batch; three quarters full is full enough.
        ([[10], [12], [9]], False, 4, 12, [(0, 0), (1, 0), (2, 0)]),
        # Two of four is not: the older goes first.
        ([[10], [12]], False, 1, 12, [(0, 0)]),
        # A longer text does not stretch an older, shorter one's batch; much shorter ones do not fill a long one's.
        ([[10], [200]], False, 1, 12, [(0, 0)]),
        ([[200], [10], [10], [10]], False, 1, 208, [(0, 0)]),
        # Longest first within a call.
        ([[5, 250, 6]], False, 1, 256, [(0, 1)]),
        # Bulk takes what fits of its longest.
        ([[250] * 9], False, 4, 256, [(0, 8), (0, 7), (0, 6), (0, 5)]),
        # Bulk and small take turns, whoever came first.
        ([[250] * 9, [10]], False, 4, 256, [(0, 8), (0, 7), (0, 6), (0, 5)]),
        ([[250] * 9, [10]], True, 1, 12, [(1, 0)]),
        ([[10], [250] * 9], False, 4, 256, [(1, 8), (1, 7), (1, 6), (1, 5)]),
        # Bulk never fills the batch of a small call: that would make the small call wait.
        ([[250], [250] * 9], True, 1, 256, [(0, 0)]),
        # What a bulk call's long rows leave free goes to rows of like length of any other.
        ([[250, 250, *[10] * 200], [250] * 9, [245]], False, 4, 256, [(0, 1), (0, 0), (1, 8), (1, 7)]),
        ([[250, *[10] * 200], [100] * 5, [245] * 3], False, 4, 256, [(0, 0), (2, 2), (2, 1), (2, 0)]),
        # Rows that would be mostly padding wait for a batch of their own length.
        ([[24, *[8] * 40]], False, 1, 24, [(0, 0)]),
        ([[24] * 3 + [8] * 30], False, 4, 24, [(0, 2), (0, 1), (0, 0), (0, 32)]),
        # The longest go together, whoever's they are; of equals the leader's first.
        ([[24, 8], [24, 20], [24, 8], [24]], False, 4, 24, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        # Nobody else waits, so bulk goes on.
        ([[250] * 9], True, 4, 256, [(0, 8), (0, 7), (0, 6), (0, 5)]),
        # A text longer than the budget runs alone.
        ([[3000]], False, 1, 3072, [(0, 0)]),
    ],
)
def test_the_next_batch(
    calls: list[list[int]], last_was_bulk: bool, rows: int, length: int, picks: list[tuple[int, int]]
) -> None:
    plan = next_batch([CallRows(lengths) for lengths in calls], last_was_bulk=last_was_bulk)
    assert plan is not None
    assert (plan.rows, plan.length, plan.picks) == (rows, length, picks)


@pytest.mark.parametrize(
    ("calls", "alone", "last_was_bulk", "picks"),
    [
        # Nobody joins the batch of a small call that runs alone, and it joins no other's.
        ([[10], [12], [9]], {0}, False, [(0, 0)]),
        ([[10], [12], [9], [11]], {1}, False, [(0, 0), (2, 0), (3, 0)]),
        ([[10, 12, 9], [9]], {0}, False, [(0, 2), (0, 1), (0, 0)]),
        # The same of bulk, from either side.
        ([[250, 250, *[10] * 200], [245] * 9, [245]], {0}, False, [(0, 1)]),
        ([[250, 250, *[10] * 200], [250] * 9, [245] * 2], {1}, False, [(0, 1), (0, 0), (2, 1), (2, 0)]),
        # It takes its turn like any other.
        ([[250] * 9, [10]], {0, 1}, True, [(1, 0)]),
    ],
)
def test_a_call_that_runs_alone_shares_no_batch(
    calls: list[list[int]], alone: set[int], last_was_bulk: bool, picks: list[tuple[int, int]]
) -> None:
    queue = [CallRows(lengths, alone=at in alone) for at, lengths in enumerate(calls)]
    plan = next_batch(queue, last_was_bulk=last_was_bulk)
    assert plan is not None
    assert plan.picks == picks


def test_nothing_waits() -> None:
    assert next_batch([], last_was_bulk=False) is None


LENGTHS = st.lists(st.integers(1, 256), min_size=1, max_size=60)


@given(calls=st.lists(LENGTHS, min_size=1, max_size=8), alone=st.sets(st.integers(0, 7)))
def test_everything_runs_once_in_few_shapes(calls: list[list[int]], alone: set[int]) -> None:
    """Whatever waits: each input is in exactly one batch, fits into it, and no batch has a shape out of the list.

    A batch with rows of a call that runs alone has no others.
    """
    allowed = set(shapes(256))
    queue = [(at, CallRows(lengths, alone=at in alone)) for at, lengths in enumerate(calls)]
    seen: list[tuple[int, int]] = []
    bulk = False
    while plan := next_batch([work for _, work in queue], last_was_bulk=bulk):
        assert (plan.rows, plan.length) in allowed
        assert 0 < len(plan.picks) <= plan.rows <= BATCH_ROWS_MAX
        assert plan.rows * plan.length <= BATCH_TOKENS_MAX
        together = {queue[at][0] for at, _ in plan.picks}
        assert len(together) == 1 or together.isdisjoint(alone)
        for at, index in plan.picks:
            call, work = queue[at]
            assert calls[call][index] <= plan.length
            seen.append((call, index))
            work.remove({index})
        bulk = plan.bulk
    assert sorted(seen) == [(call, index) for call, lengths in enumerate(calls) for index in range(len(lengths))]


def test_the_shapes_are_few() -> None:
    """Each costs about a megabyte of kernels in the default model."""
    assert len(list(shapes(256))) <= 72


def test_a_short_query_waits_for_one_batch_of_bulk_work() -> None:
    """However much bulk work stands before it."""
    queue = [CallRows([250] * 2048), CallRows([200] * 2048), CallRows([10])]
    first = next_batch(queue, last_was_bulk=True)
    assert first is not None
    assert first.picks == [(2, 0)]


@pytest.mark.parametrize("last_was_bulk", [False, True])
def test_the_oldest_bulk_call_leads_until_it_is_done(last_was_bulk: bool) -> None:
    """A younger one gets nothing before, even where it has longer texts."""
    queue = [CallRows([200] * 40), CallRows([250] * 40), CallRows([250] * 40)]
    served: list[int] = []
    while queue[0].tokens > BATCH_TOKENS_MAX:
        plan = next_batch(queue, last_was_bulk=last_was_bulk)
        assert plan is not None
        served += [at for at, _ in plan.picks]
        queue[0].remove({index for _, index in plan.picks})
    assert set(served) == {0}


def test_bulk_work_gets_every_other_turn() -> None:
    """However many short queries come: here a new one with every batch."""
    bulk = CallRows([250] * 16)
    turns: list[str] = []
    last = False
    while bulk.rows and len(turns) < 100:
        plan = next_batch([bulk, CallRows([10])], last_was_bulk=last)
        assert plan is not None
        if plan.picks[0][0] == 0:
            bulk.remove({index for _, index in plan.picks})
        turns.append("query" if plan.picks[0][0] else "bulk")
        last = plan.bulk
    # Also its last, which alone would be small: it does not go before the query.
    assert turns == ["bulk", "query", "bulk", "query", "bulk", "query", "bulk"]


@pytest.mark.parametrize("tokens", [1, 4, 5, 33, 250, 1_024, 1_025, 8_000])
def test_a_lone_row_is_planned_at_once_as_it_would_be_among_others(tokens: int) -> None:
    """The quiet node's case has a shorter way to the same batch."""
    lone, done = CallRows([tokens]), CallRows([1])
    done.remove({0})
    assert next_batch([lone], last_was_bulk=False) == next_batch([lone, done], last_was_bulk=False)
    assert next_batch([done], last_was_bulk=False) is None
