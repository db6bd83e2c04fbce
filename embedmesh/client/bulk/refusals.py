"""What to do about a refusal of a bulk run's request, and how long to wait before the next attempt."""

import math
import re
from collections.abc import Mapping
from typing import Literal

from embedmesh.client.refusals import Problem
from embedmesh.rules.ports import Dice

ATTEMPTS_MIN = 10  # of a request, however long each takes
WAIT_FIRST_S = 0.5
WAIT_MAX_S = 10.0  # without a Retry-After: how late it is noticed that a server is back
BULK_WAIT_MAX_S = 120.0  # of a Retry-After: a server that sends more is not coming back while somebody watches
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
TOO_MANY = frozenset({"too_many_inputs"})
TOO_MUCH = frozenset({"max_tokens_per_request", "body_too_large", "deadline_exceeded"})
Verdict = Literal["line", "split", "retry", "stop"]


def judge(problem: Problem, headers: Mapping[str, str], inputs: int) -> Verdict:
    """What to do about a refusal of a request with that many inputs."""
    if headers.get("x-should-retry") == "false" or problem.code == "insufficient_quota":
        return "stop"
    if problem.code in TOO_MUCH and inputs > 1:
        return "split"
    if problem.status in RETRIED:
        return "retry"
    if problem.status not in (400, 413, 422):
        return "stop"
    if problem.status == 413 or problem.code in TOO_MANY | TOO_MUCH:
        return "split" if inputs > 1 else "line"
    at_input = refused_input(problem)
    if at_input is not None and at_input < inputs:
        return "line"
    if problem.param == "input":
        return "split" if inputs > 1 else "line"
    return "stop"


def refused_input(problem: Problem) -> int | None:
    """Which input of the request was refused: `input.3` is 3."""
    match = re.fullmatch(r"input[.\[](\d{1,4})\]?", problem.param or "")
    return int(match[1]) if match else None


def wait_s(attempt: int, headers: Mapping[str, str], dice: Dice) -> float:
    """Seconds before the next attempt: the server's Retry-After, else doubling with dice; bounded either way.

    After many attempts it doubles despite a Retry-After: a server that is away for long gets no request every second.
    """
    own = float(min(WAIT_FIRST_S * 2 ** min(attempt, 30), WAIT_MAX_S) * (0.5 + dice.random() / 2))
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            servers = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if math.isfinite(servers) and servers >= 0:
            return max(min(servers, BULK_WAIT_MAX_S), own if attempt >= ATTEMPTS_MIN else 0.0)
    return own
