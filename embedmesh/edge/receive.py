"""A request's body: in time, not too large, not too many at once, and plain JSON by its own word."""

import asyncio
from collections import Counter

from aiohttp import web

from embedmesh.rules import errors

JSON_TYPE = "application/json"
BODY_S = 20.0  # 4 MiB in 20 s is 1.7 Mbit/s
ACCOUNT_SHARE = 4  # times what is free is the most of one account: alone four fifths, of two each four ninths


class Room:
    """Requests that are handled at one time.

    However many one account sends, others find room: dynamic thresholds (Choudhury and Hahne, 1998).
    """

    def __init__(self, requests_max: int) -> None:
        self._free = requests_max
        self.taken = 0
        self._accounts: Counter[str] = Counter()

    def enter(self, account_id: str) -> None:
        """One more of an account. Raises Overloaded where it should not go on."""
        if self._accounts[account_id] >= ACCOUNT_SHARE * self._free:
            raise errors.Overloaded("This gateway is handling as many requests as it may. Try again shortly.")
        self._accounts[account_id] += 1
        self.taken += 1
        self._free -= 1

    def leave(self, account_id: str) -> None:
        """It has ended."""
        self.taken -= 1
        self._free += 1
        self._accounts[account_id] -= 1
        if not self._accounts[account_id]:
            del self._accounts[account_id]


class BodyBudget:
    """Bytes of bodies that may be in memory at one time, over all requests. What was taken must be given back."""

    def __init__(self, total_bytes: int) -> None:
        self._free_bytes = total_bytes

    def take(self, size: int) -> None:
        """Raise Overloaded if there is no room."""
        if size > self._free_bytes:
            raise errors.Overloaded("This server holds as many request bodies as it may. Try again shortly.")
        self._free_bytes -= size

    def give_back(self, size: int) -> None:
        self._free_bytes += size


async def read_body(
    request: web.BaseRequest,
    limit_bytes: int,
    budget: BodyBudget,
    *,
    content_type: str = JSON_TYPE,
    body_s: float = BODY_S,
) -> bytes:
    """The whole body of a request that says it is plain JSON, or what else; its bytes stay taken from `budget`.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout, Overloaded; then nothing stays taken. The deadline is
    for the whole body, not for each read: a sender that drips a byte a second is as late as one that sends nothing.
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
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0
    chunks: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(body_s):
            async for chunk in request.content.iter_any():
                size += len(chunk)
                if size > limit_bytes:
                    raise too_large
                budget.take(len(chunk))
                chunks.append(chunk)
    except BaseException as error:
        budget.give_back(sum(map(len, chunks)))
        if isinstance(error, TimeoutError):
            raise errors.RequestTimeout(f"The request's body did not arrive within {body_s:.0f} s.") from None
        if isinstance(error, web.RequestPayloadError):
            raise errors.MalformedHttp("The request's body is framed wrongly or broke off.") from None
        raise
    return b"".join(chunks)
