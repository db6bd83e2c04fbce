"""Further attempts are a tenth of the requests, or ten a second where that is more; the past is forgotten."""

from embedmesh.fleet.retries import RETRIES_A_SECOND_MIN, RETRY_SPAN_S, RetryBudget
from tests.flow.world import Clock


def taken(budget: RetryBudget, tries: int) -> int:
    return sum(budget.take() for _ in range(tries))


def test_a_quiet_gateway_has_ten_a_second() -> None:
    budget = RetryBudget(clock := Clock())
    assert taken(budget, 1_000) == RETRIES_A_SECOND_MIN * RETRY_SPAN_S
    clock.now += RETRY_SPAN_S
    assert taken(budget, 1_000) == RETRIES_A_SECOND_MIN * RETRY_SPAN_S


def test_what_can_be_done_without_leaves_the_rest() -> None:
    budget = RetryBudget(Clock())
    assert sum(budget.take(0.5) for _ in range(1_000)) == RETRIES_A_SECOND_MIN * RETRY_SPAN_S // 2
    assert taken(budget, 1_000) == RETRIES_A_SECOND_MIN * RETRY_SPAN_S // 2


def test_a_busy_gateway_has_a_tenth_of_its_requests() -> None:
    budget = RetryBudget(clock := Clock())
    for _ in range(RETRY_SPAN_S):
        for _ in range(1_000):
            budget.request(clock.now)
        clock.now += 1
    clock.now -= 1
    assert taken(budget, 10_000) == 1_000
    clock.now += 2 * RETRY_SPAN_S
    assert taken(budget, 10_000) == RETRIES_A_SECOND_MIN * RETRY_SPAN_S
