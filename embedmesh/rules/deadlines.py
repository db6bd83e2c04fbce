"""How long a request, and an attempt at it, may take (contract section 5). Seconds; total, not per read."""

CONNECT_S = 1.0  # nodes are near, or not worth asking
ATTEMPTS_MAX = 3

REQUEST_MIN_S = 30.0
REQUEST_MAX_S = 600.0


LOOK_AGAIN_S = 1.0  # at a late attempt that nobody else could make: another node may have come meanwhile


def attempt_s(expected_s: float) -> float:
    """One attempt: four times what it should take, plus a second for what cannot be foreseen.

    Then it is broken off where another node would be asked instead. Else it may take as long as the request may.
    """
    return 1.0 + 4.0 * expected_s


def request_s(expected_s: float) -> float:
    """All attempts together."""
    return min(max(REQUEST_MIN_S, 3.0 * expected_s), REQUEST_MAX_S)
