"""Bodies of JSON: what operators and nodes send, and what every small route answers."""

from typing import TypeVar

import msgspec
from aiohttp import web

from embedmesh.edge.receive import JSON_TYPE
from embedmesh.rules import errors

JSON = {"Content-Type": JSON_TYPE}

T = TypeVar("T")


def decoded(body: bytes, kind: type[T]) -> T:
    """A body of that form. Raises InvalidValue, which says where it is another."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise errors.InvalidValue(f"The body is not what this path takes: {error}.") from None


def json_reply(value: object, status: int = 200) -> web.Response:
    """Anything that msgspec can write."""
    return web.Response(status=status, body=msgspec.json.encode(value), headers=JSON)
