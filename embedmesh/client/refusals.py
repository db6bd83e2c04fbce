"""What a refusal says, and how long its server wants one to wait."""

import math
from collections.abc import Mapping

import msgspec

MESSAGE_CHARS_MAX = 300  # of a server's own words that are repeated


class Problem(msgspec.Struct, frozen=True):
    """A refusal: the fields of the error envelope, as far as the reply has them."""

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


def read_problem(status: int, body: bytes | bytearray | memoryview) -> Problem:
    """What a refusal says, without control characters, which a terminal might obey."""
    try:
        error = msgspec.json.decode(body, type=_Envelope).error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        error = _Error()
    message = "".join(char for char in error.message if char.isprintable())[:MESSAGE_CHARS_MAX]
    return Problem(status, error.code or f"http_{status}", message or f"HTTP status {status}", error.param)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server wants one to wait; None where it does not say. Names of `headers` in lower case."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            wait_s = float(headers[name]) * unit_s
        except (KeyError, ValueError):
            continue
        if math.isfinite(wait_s) and wait_s >= 0:
            return wait_s
    return None
