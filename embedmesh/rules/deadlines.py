"""How long a request, and an attempt at it, may take. Seconds; total, not per read."""

from embedmesh.rules.limits import REQUEST_MAX_S, REQUEST_MIN_S

LOOK_AGAIN_S = 1.0  # at a late attempt that nobody else could make: another node may have come meanwhile


def attempt_s(expected_s: float) -> float:
    """One attempt: four times what it should take, plus a second for what cannot be foreseen.

    Then it is broken off where another node would be asked instead. Else it may take as long as the request may.
    """
    return 1.0 + 4.0 * expected_s


def request_s(expected_s: float) -> float:
    """All attempts together."""
    return min(max(REQUEST_MIN_S, 3.0 * expected_s), REQUEST_MAX_S)
