"""JSON bodies of small requests and replies."""

import re
from typing import TypeVar

import msgspec
from aiohttp import web

from embedmesh.http.receive import JSON_TYPE, BodyBudget, read_body
from embedmesh.rules import errors
from embedmesh.rules.limits import SMALL_BODY_BYTES_MAX
from embedmesh.rules.ports import Caller
from embedmesh.rules.utf8 import broken_bytes

JSON_HEADERS = {"Content-Type": JSON_TYPE}
SMALL_BODIES_BYTES_TOTAL_MAX = 8 * 1024 * 1024  # a hundred of the largest; they are here for milliseconds
PARAM_PATH, PARAM_NAME = re.compile(r"`\$\.([^`]+)`$"), re.compile("field `([^`]+)`")  # in msgspec's messages
PARAM_CHARS_MAX = 64

CALLER = web.RequestKey("caller", Caller)  # set on routes that need a key

T = TypeVar("T")


async def small_body(request: web.BaseRequest, budget: BodyBudget) -> bytes:
    """The whole body of a request for a small route, in the share of its account; b"" if it has none.

    Raises what `read_body` raises.
    """
    if not request.can_read_body:
        return b""
    account_id = request[CALLER].account_id
    body = await read_body(request, SMALL_BODY_BYTES_MAX, budget, account_id)
    budget.give_back(account_id, len(body))
    return body


def decoded(body: bytes, kind: type[T]) -> T:
    """The body as `kind`. Raises InvalidValue, which names the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if (broken := broken_bytes(body)) is not None:
            raise errors.InvalidValue(broken) from None
        message = str(error)
        found = PARAM_PATH.search(message) or PARAM_NAME.search(message)
        path = found[1].replace("[...]", "") if found else None  # of an object whose names are the caller's
        param = re.sub(r"\[(\d+)\]", r".\1", path)[:PARAM_CHARS_MAX] if path else None  # `limits.models.3`
        raise errors.InvalidValue(f"The body is not what this path takes: {message}.", param=param) from None


def json_reply(value: object, status: int = 200) -> web.Response:
    """Anything that msgspec can encode."""
    return web.Response(status=status, body=msgspec.json.encode(value), headers=JSON_HEADERS)
