"""Bodies of JSON: what operators and nodes send, and what every small route answers."""

import re
from typing import TypeVar

import msgspec
from aiohttp import web

from embedmesh.http.receive import JSON_TYPE, BodyBudget, read_body
from embedmesh.rules import errors
from embedmesh.rules.ports import Caller
from embedmesh.rules.utf8 import broken_bytes

JSON = {"Content-Type": JSON_TYPE}
SMALL_BYTES_MAX = 64 * 1024
SMALL_BYTES_TOTAL_MAX = 8 * 1024 * 1024  # a hundred of the largest; they are here for milliseconds
PLACE, FIELD = re.compile(r"`\$\.([^`]+)`$"), re.compile("field `([^`]+)`")  # where msgspec says that it is wrong
PLACE_CHARS_MAX = 64

CALLER = web.RequestKey("caller", Caller)  # who asks, on routes that need a key

T = TypeVar("T")


async def small_body(request: web.BaseRequest, budget: BodyBudget) -> bytes:
    """The whole body of a request for a small route, of the share of the account whose key it brings.

    Nothing where it brings no body. Raises what `read_body` raises.
    """
    if not request.can_read_body:
        return b""
    whose = request[CALLER].account_id
    body = await read_body(request, SMALL_BYTES_MAX, budget, whose)
    budget.give_back(whose, len(body))
    return body


def decoded(body: bytes, kind: type[T]) -> T:
    """A body of that form. Raises InvalidValue, which says where it is another, and names the member."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if (broken := broken_bytes(body)) is not None:
            raise errors.InvalidValue(broken) from None
        said = str(error)
        raise errors.InvalidValue(f"The body is not what this path takes: {said}.", param=_member(said)) from None


def json_reply(value: object, status: int = 200) -> web.Response:
    """Anything that msgspec can write."""
    return web.Response(status=status, body=msgspec.json.encode(value), headers=JSON)


def _member(said: str) -> str | None:
    """Which member it is about, as in `limits.models.3`; None for the body itself."""
    found = PLACE.search(said) or FIELD.search(said)
    return re.sub(r"\[(\d+)\]", r".\1", found[1])[:PLACE_CHARS_MAX] if found else None
