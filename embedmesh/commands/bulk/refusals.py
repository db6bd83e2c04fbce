"""What a refusal says, what is to be done about it, and how long to wait before asking again."""

import math
import re
from collections.abc import Mapping
from typing import Literal

import msgspec

from embedmesh.rules.ports import Dice

ATTEMPTS_MIN = 10  # of a request, however long each takes
WAIT_FIRST_S = 0.5
WAIT_MAX_S = 10.0  # of our own accord: how late it is noticed that a server is back
RETRY_AFTER_MAX_S = 120.0  # a server that asks for more is not coming back while somebody watches
MESSAGE_CHARS_MAX = 300  # of the server's own words that are repeated
RETRIED = frozenset({408, 429, 500, 502, 503, 504})
TOO_MANY = frozenset({"too_many_inputs"})
TOO_MUCH = frozenset({"max_tokens_per_request", "body_too_large", "deadline_exceeded"})
Verdict = Literal["line", "split", "retry", "stop"]


class Problem(msgspec.Struct, frozen=True):
    """An answer that is no vectors: the members of the error envelope, as far as they are there."""

    status: int
    code: str
    message: str
    param: str | None = None


class _Error(msgspec.Struct):
    message: str = ""
    code: str | None = None
    param: str | None = None


class _Envelope(msgspec.Struct):
    error: _Error


def read_problem(status: int, body: bytes) -> Problem:
    """What a refusal says, cleaned of control characters, which a terminal might obey."""
    try:
        error = msgspec.json.decode(body, type=_Envelope).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        error = _Error()
    message = "".join(char for char in error.message if char.isprintable())[:MESSAGE_CHARS_MAX]
    return Problem(status, error.code or f"http_{status}", message or f"HTTP status {status}", error.param)


def judge(problem: Problem, headers: Mapping[str, str], inputs: int) -> Verdict:
    """What to do about a refusal of a request with so many inputs."""
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
    """Seconds before the next attempt: what the server asks for, else doubling with dice; bounded either way.

    After many attempts it doubles whatever is asked for: a server that is away for long is not asked every second.
    """
    own = float(min(WAIT_FIRST_S * 2 ** min(attempt, 30), WAIT_MAX_S) * (0.5 + dice.random() / 2))
    for name, unit_s in (("retry-after-ms", 0.001), ("Retry-After", 1.0)):
        try:
            asked = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if math.isfinite(asked) and asked >= 0:
            return max(min(asked, RETRY_AFTER_MAX_S), own if attempt >= ATTEMPTS_MIN else 0.0)
    return own
