"""Where a body that should be JSON is broken, in words: its bytes, its characters, half a surrogate pair.

Looked for only once a parser has refused the body; at most one more pass over it, in pieces.
"""

import re
from collections.abc import Collection

import orjson

from embedmesh.rules.errors import InvalidJson
from embedmesh.rules.utf8 import broken_bytes, pieces

SENTINEL = "\ue000embedmesh"  # stands where the text broke off
QUOTES_MAX = 64 * 1024  # in a body that is looked into: 2,048 texts have 4,096, and as many as they hold themselves
STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
BRACKETS = re.compile(rb"[\[\]{}]")
CLOSES = {b"[": b"]", b"{": b"}"}
PLAIN = re.compile("[A-Za-z0-9_-]{1,64}")  # of a name on the way: can be shown


def broken_json(body: bytes, error: orjson.JSONDecodeError, names: Collection[str]) -> InvalidJson:
    """What to tell of a body that orjson has refused; `names` are those of the request's members."""
    if (said := broken_bytes(body)) is not None:
        return InvalidJson(said)
    where = f"line {error.lineno}, column {error.colno}"
    if "surrogate" not in error.msg:
        return InvalidJson(f"The body is not valid JSON ({where}).")
    name = _text_that_ends(_first(body, error.pos), names)
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


def _text_that_ends(begun: bytes, names: Collection[str]) -> str | None:
    """The text that is open where the body breaks off, like `input.3`; None if it is none in a member of that name."""
    if begun.count(b'"') > QUOTES_MAX:
        return None
    closed = _closing(STRING.sub(b"", begun).partition(b'"')[0])
    for end in (b'"' + closed, b'":0' + closed):  # a value, a name
        try:
            loaded = orjson.loads(begun + SENTINEL.encode() + end)
        except orjson.JSONDecodeError:
            continue
        path = _last(loaded)
        if path and path[0] in names and all(PLAIN.fullmatch(part) for part in path):
            return ".".join(path)
    return None


def _closing(outside: bytes) -> bytes:
    """What closes the brackets that are open, in their order."""
    open_ones = bytearray()
    for mark in BRACKETS.findall(outside):
        if mark in CLOSES:
            open_ones += CLOSES[mark]
        elif open_ones:
            open_ones.pop()
    return bytes(reversed(open_ones))


def _last(value: object) -> list[str]:
    """The path to the value that was written last, if that is the text that broke off."""
    path: list[str] = []
    while isinstance(value, dict | list) and value:
        name = next(reversed(value)) if isinstance(value, dict) else len(value) - 1
        path.append(str(name))
        value = value[name]
    return path if isinstance(value, str) and value.endswith(SENTINEL) else []
