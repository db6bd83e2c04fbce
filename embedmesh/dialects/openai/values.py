"""Bounds the values in a body's JSON before it is parsed: each costs fifty bytes or more, and a body may have millions.

Nothing is parsed for that: marks are counted, those outside of strings. If the whole body has few marks, strings need
not be found. How deep a body is, is looked at once it is parsed.
"""

from typing import NamedTuple

from embedmesh.rules.errors import CallerFailure, InvalidJson, InvalidValue, MaxTokensPerRequest, TooManyInputs
from embedmesh.rules.limits import REQUEST_INPUTS_MAX, REQUEST_TOKENS_MAX

COUNTED_FROM_BYTES = 16 * 1024  # a smaller body has too few values to matter
FIELDS_VALUES_MAX = 2_048  # of all fields beside `input`; a request has some ten
STRINGS_MAX = ARRAYS_MAX = REQUEST_INPUTS_MAX + FIELDS_VALUES_MAX
COMMAS_MAX = REQUEST_TOKENS_MAX + ARRAYS_MAX
GENERATION_VALUES_MAX = 100_000  # 2,048 messages of 16 strings each, and 128 tools whose schemas have 512
DEPTH_MAX = 32  # a request for embeddings is three deep, the schema of a tool begins at the sixth level
OPENING = bytes.maketrans(b"{", b"[")
BETWEEN = b" \t\r\n:"  # two that open, in what is left where strings are taken out


class ValueBounds(NamedTuple):
    """How many values a body may have, and what is said of one with more."""

    strings: int
    arrays: int
    commas: int
    many: type[CallerFailure]
    words: str
    many_commas: type[CallerFailure]
    comma_words: str
    param: str | None


EMBEDDINGS_BOUNDS = ValueBounds(
    STRINGS_MAX,
    ARRAYS_MAX,
    COMMAS_MAX,
    TooManyInputs,
    f"`input` has too many entries; one request takes at most {REQUEST_INPUTS_MAX:,}.",
    MaxTokensPerRequest,
    f"The inputs have more than {REQUEST_TOKENS_MAX:,} token ids, which is what one request takes. Split it.",
    "input",
)
_TOO_MANY_VALUES = f"The body has more than {GENERATION_VALUES_MAX:,} strings, arrays or objects. Send less of them."
GENERATION_BOUNDS = ValueBounds(
    GENERATION_VALUES_MAX,
    GENERATION_VALUES_MAX,
    COMMAS_MAX,
    InvalidValue,
    _TOO_MANY_VALUES,
    InvalidValue,
    f"The body has more than {COMMAS_MAX:,} values. Send less of them.",
    None,
)


def check_values(body: bytes, bounds: ValueBounds = EMBEDDINGS_BOUNDS) -> None:
    """Raise the failures that the bounds name, where the JSON has more values than any request may have."""
    if len(body) < COUNTED_FROM_BYTES:
        return
    strings, arrays = bounds.strings, bounds.arrays
    few_strings = body.count(b'"') <= 2 * strings
    if few_strings and _arrays(body) <= arrays and body.count(b",") <= bounds.commas:
        return
    plain = body.replace(b"\\\\", b"").replace(b'\\"', b"") if b"\\" in body else body
    parts = plain.split(b'"', 2 * strings + 1)
    outside = b"".join(parts[: 2 * strings + 1 : 2])
    too_many_strings = len(parts) > 2 * strings + 1
    if too_many_strings or _arrays(outside) > arrays:
        if b"[" * (DEPTH_MAX + 1) in outside.translate(OPENING, BETWEEN):
            raise InvalidJson(f"The JSON is nested deeper than {DEPTH_MAX} levels.")
        if not too_many_strings and _arrays(outside) != outside.count(b"]") + outside.count(b"}"):
            raise InvalidJson("The body is not valid JSON: not every bracket is closed.")
        raise bounds.many(bounds.words, param=bounds.param)
    if outside.count(b",") > bounds.commas:
        raise bounds.many_commas(bounds.comma_words, param=bounds.param)


def _deeper_than(value: object, levels: int) -> bool:
    layer = [value]
    for _ in range(levels):
        children: list[object] = []
        for container in layer:
            if isinstance(container, dict):
                children += container.values()
            elif isinstance(container, list):
                children += container
        layer = [child for child in children if isinstance(child, dict | list)]
        if not layer:
            return False
    return True


def check_depth(loaded: object, levels: int = DEPTH_MAX) -> None:
    """Raise InvalidJson where parsed JSON is nested deeper than the `levels` that are left at its place in a body."""
    if _deeper_than(loaded, levels):
        raise InvalidJson(f"The JSON is nested deeper than {DEPTH_MAX} levels.") from None


def _arrays(part: bytes) -> int:
    """And objects."""
    return part.count(b"[") + part.count(b"{")
