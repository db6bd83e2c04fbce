"""Bounds the values in a body's JSON before it is parsed: each costs fifty bytes or more, and a body may have millions.

Nothing is parsed: marks are counted, those outside of strings. If the whole body has few marks, strings need not be
found.
"""

from embedmesh.rules.errors import InvalidJson, MaxTokensPerRequest, TooManyInputs
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX

COUNTED_FROM_BYTES = 16 * 1024  # a smaller body has too few values to matter
FIELDS_VALUES_MAX = 2_048  # of all fields beside `input`; a request has some ten
STRINGS_MAX = ARRAYS_MAX = REQUEST_INPUTS_MAX + FIELDS_VALUES_MAX
COMMAS_MAX = REQUEST_TOKENS_MAX + ARRAYS_MAX
DEPTH_MAX = 32  # a right request is three deep
OPENING = bytes.maketrans(b"{", b"[")
BETWEEN = b" \t\r\n:"  # two that open, in what is left where strings are taken out


def check_values(body: bytes) -> None:
    """Raise TooManyInputs or MaxTokensPerRequest where the JSON has more values than any request may have."""
    if len(body) < COUNTED_FROM_BYTES:
        return
    few_strings = body.count(b'"') <= 2 * STRINGS_MAX
    if few_strings and _arrays(body) <= ARRAYS_MAX and body.count(b",") <= COMMAS_MAX:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    parts = plain.split(b'"', 2 * STRINGS_MAX + 1)
    outside = b"".join(parts[: 2 * STRINGS_MAX + 1 : 2])
    too_many_strings = len(parts) > 2 * STRINGS_MAX + 1
    if too_many_strings or _arrays(outside) > ARRAYS_MAX:
        if b"[" * (DEPTH_MAX + 1) in outside.translate(OPENING, BETWEEN):
            raise InvalidJson(f"The JSON is nested deeper than {DEPTH_MAX} levels.")
        if not too_many_strings and _arrays(outside) != outside.count(b"]") + outside.count(b"}"):
            raise InvalidJson("The body is not valid JSON: not every bracket is closed.")
        raise TooManyInputs(
            f"`input` has too many entries; one request takes at most {REQUEST_INPUTS_MAX:,}.", param="input"
        )
    if outside.count(b",") > COMMAS_MAX:
        raise MaxTokensPerRequest(
            f"The inputs have more than {REQUEST_TOKENS_MAX:,} token ids, which is what one request takes. Split it.",
            param="input",
        )


def _arrays(part: bytes) -> int:
    """And objects."""
    return part.count(b"[") + part.count(b"{")
