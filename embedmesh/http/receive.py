"""Reading a request's body: in time, within its size, within the memory for all bodies, of the right media type."""

import asyncio

from aiohttp import web

from embedmesh.rules import errors
from embedmesh.rules.limits import AWAITED_BODIES_MAX, REQUEST_BODY_S
from embedmesh.rules.shares import Room

JSON_TYPE = "application/json"
BODIES_FULL = (
    "This server holds {:,} bytes of request bodies at one time; each caller has a share of that. Try again shortly."
)


class BodyBudget(Room):
    """Bytes of bodies that may be in memory at one time, over all requests, with a share for each account."""

    def __init__(self, total_bytes: int) -> None:
        super().__init__(total_bytes, BODIES_FULL.format(total_bytes))
        self.awaited = Room(
            AWAITED_BODIES_MAX,
            f"This server waits for {AWAITED_BODIES_MAX:,} unfinished request bodies at one time; each caller has a "
            "share of that. Try again shortly.",
        )


async def read_body(
    request: web.BaseRequest,
    limit_bytes: int,
    budget: BodyBudget,
    whose: str = "",
    *,
    content_type: str = JSON_TYPE,
    body_s: float = REQUEST_BODY_S,
) -> bytes:
    """The whole body of a request of that content type. Its bytes stay taken from the share of `whose` in `budget`.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout, Overloaded, MalformedHttp; then nothing stays taken. The
    deadline is for the whole body, not for each read: dripping a byte a second is as late as sending nothing.
    """
    if request.content_type != content_type:
        raise errors.UnsupportedMediaType("Send the body as JSON, with the header Content-Type: application/json.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.UnsupportedMediaType("Send the body uncompressed, without a Content-Encoding header.")
    too_large = errors.BodyTooLarge(
        f"The body is larger than {limit_bytes:,} bytes. Split the inputs over several requests."
    )
    if (request.content_length or 0) > limit_bytes:
        raise too_large
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    chunks: list[bytes] = []
    size = 0
    budget.awaited.take(whose)
    try:
        async with asyncio.timeout(body_s):
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > limit_bytes:
                    raise too_large
                budget.take(whose, len(chunk))
                chunks.append(chunk)
    except BaseException as error:
        budget.give_back(whose, sum(map(len, chunks)))
        if isinstance(error, TimeoutError):
            raise errors.RequestTimeout(f"The request's body did not arrive within {body_s:.0f} s.") from None
        if isinstance(error, web.RequestPayloadError):
            raise errors.MalformedHttp("The request's body is framed wrongly or broke off.") from None
        raise
    finally:
        budget.awaited.give_back(whose)
    return b"".join(chunks)
