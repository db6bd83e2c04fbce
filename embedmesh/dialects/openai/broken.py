"""Where a body that should be JSON is broken, in words: its bytes, its characters, half a surrogate pair.

Looked for only once a parser has refused the body; at most one more pass over it, in pieces.
"""

import orjson

from embedmesh.dialects.openai.fields import FIELDS
from embedmesh.rules.errors import InvalidJson
from embedmesh.rules.utf8 import broken_bytes, pieces

SENTINEL = "\ue000embedmesh"  # stands where the text broke off
QUOTES_MAX = 64 * 1024  # in a body that is looked into: 2,048 texts have 4,096, and as many as they hold themselves
OPEN_ENDS = (b'"}', b'"]}')  # of a field that is a text, and of one that is an array of texts


def broken_json(body: bytes, error: orjson.JSONDecodeError) -> InvalidJson:
    """What to tell of a body that orjson has refused."""
    if (said := broken_bytes(body)) is not None:
        return InvalidJson(said)
    where = f"line {error.lineno}, column {error.colno}"
    if "surrogate" not in error.msg:
        return InvalidJson(f"The body is not valid JSON ({where}).")
    name = _text_that_ends(_first(body, error.pos))
    return InvalidJson(
        f"{f'`{name}`' if name else 'The body'} holds half a surrogate pair ({where}): an escape from \\ud800 to "
        "\\udfff means something only as one of a pair.",
        param=name,
    )


def _first(body: bytes, characters: int) -> bytes:
    """The bytes of its first characters."""
    for begin, text in pieces(body):
        if characters <= len(text):
            return body[: begin + len(text[:characters].encode())]
        characters -= len(text)
    return body


def _text_that_ends(begun: bytes) -> str | None:
    """The field, or its text, that is open where the body breaks off; None if it is nested deeper than our fields."""
    for end in OPEN_ENDS if begun.count(b'"') <= QUOTES_MAX else ():
        try:
            loaded = orjson.loads(begun + SENTINEL.encode() + end)
        except orjson.JSONDecodeError:
            continue
        for name, value in loaded.items() if isinstance(loaded, dict) else ():
            if name not in FIELDS:
                continue
            if isinstance(value, str) and value.endswith(SENTINEL):
                return str(name)
            if isinstance(value, list) and value and isinstance(value[-1], str) and value[-1].endswith(SENTINEL):
                return f"{name}.{len(value) - 1}"
    return None
