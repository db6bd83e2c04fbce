"""What servers of other makes say when they refuse: a status, or an error object, and words of their own.

The words may help the caller, whose request they are about; they are bounded and printable, and never in a log.
"""

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, UpstreamRefused
from embedmesh.rules.nodes import Check
from embedmesh.upstream.http1 import retry_after_s

SUCCESS = (200, 201, 203)  # other 2xx mean that the answer is not whole
WRONG_REQUEST = (400, 413, 414, 422)
BUSY = (408, 429, 503)
SAID_CHARS_MAX = 500  # a sentence or two; some servers repeat the request
ERROR_LOOK_BYTES = 64  # at the begin of an event or a reply, where an error object names itself
REDIRECTED = "; it redirects us: is its address right?"  # we do not follow
NAME_HINT = "; are its address and its name for the model right?"
STATUS_HINTS = {
    **dict.fromkeys((301, 302, 303, 307, 308), REDIRECTED),
    401: "; is its token right?",
    403: "; is its token right?",
    404: NAME_HINT,
}
TOO_LONG_CODES = ("context_length", "exceed_context_size")
TOO_LONG = re.compile(
    "maximum context length|context (?:length|size|window)|inputs?` (?:tokens|must have less than)", re.IGNORECASE
).search
STATUSES = ("code", "status", "status_code", "http_status_code")
WRONG_TYPES = ("invalid_request_error", "BadRequestError")
MESSAGES = ("message", "error", "detail", "msg")
"""Members of an error object that hold its words, or an object that does."""


def failure_of(status: int, headers: dict[bytes, bytes], body: bytes = b"") -> NodeFailure:
    """What a reply without success means."""
    wait_s = retry_after_s(headers)
    if status in BUSY:
        return NodeBusy(f"it is busy: HTTP {status}", retry_after_s=wait_s)
    check = check_of(status)
    if status in WRONG_REQUEST:
        return _refused(f"it refuses: HTTP {status}", check, wait_s, _object(body))
    words = f"it refuses: HTTP {status}" if check in (Check.ACCESS, Check.STATUS_4XX) else f"it answered HTTP {status}"
    return NodeBroke(words + STATUS_HINTS.get(status, ""), check=check, retry_after_s=wait_s)


def failure_in(data: bytes) -> NodeFailure | None:
    """The failure that an error object means, in an event or under a success; None if it is something else."""
    if b"error" not in data[:ERROR_LOOK_BYTES]:
        return None
    said = _object(data)
    if not said.get("error") and said.get("object") != "error":
        return None
    status = _status_in(said)
    if status in WRONG_REQUEST:
        return _refused(f"it answered an error like HTTP {status}", Check.STATUS_4XX, 0.0, said)
    if status in BUSY:
        return NodeBusy(f"it is busy: it answered an error like HTTP {status}")
    return NodeBroke("it answered an error", check=Check.STATUS_5XX)


def _status_in(said: dict[str, Any]) -> int:
    """What an error object would have for a status: its own word, or what its type or code means."""
    for name in STATUSES:
        for status in _members(said, name):
            if isinstance(status, int) and not isinstance(status, bool) and 400 <= status < 600:
                return status
    wrong = any(kind in WRONG_TYPES for kind in _kinds(said))
    return 400 if wrong or _is_too_long(said) else 500


def _members(said: dict[str, Any], name: str) -> list[Any]:
    """Of the object, and of the error in it."""
    inner = said.get("error")
    return [each.get(name) for each in (inner, said) if isinstance(each, dict)]


def _kinds(said: dict[str, Any]) -> list[str]:
    kinds = [*_members(said, "code"), *_members(said, "type")]
    return [kind for kind in kinds if isinstance(kind, str)]


def _is_too_long(said: dict[str, Any]) -> bool:
    return any(code in kind for kind in _kinds(said) for code in TOO_LONG_CODES)


def _refused(words: str, check: Check, wait_s: float, said: dict[str, Any]) -> UpstreamRefused:
    failure = UpstreamRefused(words, check=check, retry_after_s=wait_s)
    failure.said = printable(_message(said))
    failure.too_long = _is_too_long(said) or TOO_LONG(failure.said) is not None
    return failure


def check_of(status: int) -> Check:
    """The check that fails by a status other than success and load."""
    if status in (401, 403):
        return Check.ACCESS
    return {4: Check.STATUS_4XX, 5: Check.STATUS_5XX}.get(status // 100, Check.STATUS_OTHER)


def printable(text: str) -> str:
    """At most SAID_CHARS_MAX characters of it, without control characters; white space is single blanks."""
    spaced = " ".join(text[: 4 * SAID_CHARS_MAX].split())
    return "".join(each for each in spaced if each.isprintable())[:SAID_CHARS_MAX]


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object of a body; an empty one if it is none."""
    try:
        said = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def _message(said: object) -> str:
    """The first words of `{"error": {"message"}}`, `{"error": "..."}`, `{"detail": ...}`, `{"message"}`."""
    return next(_words(said), "")


def _words(said: object) -> Iterator[str]:
    if isinstance(said, str) and said.strip():
        yield said
    elif isinstance(said, list):
        for each in said:
            yield from _words(each)
    elif isinstance(said, dict):
        for name in MESSAGES:
            yield from _words(said.get(name))
