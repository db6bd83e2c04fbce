"""The headers of every reply, and replies as the bytes of HTTP/1.1."""

import re
from collections.abc import Mapping
from email.utils import formatdate
from http import HTTPStatus
from time import time

from aiohttp import web

from embedmesh.http.failures import envelope, hint_headers, status_and_type
from embedmesh.http.receive import JSON_TYPE
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.errors import Failure
from embedmesh.rules.ids import new_id

SERVER_HEADER = {"Server": "embedmesh"}
SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
CLOCK = SystemClock()  # for ids: nothing is decided by them
STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {JSON_TYPE}\r\nContent-Length: "
    for status in HTTPStatus
}
"""By status: the beginning of a head, up to the length."""

REQUEST_ID = web.RequestKey("request_id", str)  # the caller's x-request-id where it is sane, else our own
REPLY_HEADERS = web.RequestKey("reply_headers", dict[str, str])  # headers that every reply to this request has

_second, _middle = 0, ""  # what stands in the heads of that second between the length and the request id


def request_id_of(header: str | None) -> str:
    """The caller's `x-request-id` where it is sane, else one of our own."""
    return header if header is not None and SANE_REQUEST_ID.fullmatch(header) else own_request_id()


def own_request_id() -> str:
    """An id for a request that brought none. The ledger keeps the request under the same id."""
    return new_id("req", CLOCK)


def json_head(status: int, request_id: str, headers: Mapping[str, str], body_bytes: int) -> bytes:
    """The head of a response with a JSON body of `body_bytes`."""
    global _second, _middle
    now = int(time())
    if now != _second:  # formatted once a second
        _second, _middle = now, f"\r\nDate: {formatdate(now, usegmt=True)}\r\nServer: embedmesh\r\nx-request-id: "
    more = "\r\n".join([request_id, *map(": ".join, headers.items())])
    return f"{STATUS_LINES[status]}{body_bytes}{_middle}{more}\r\n\r\n".encode("ascii")


def failure_bytes(failure: Failure, request_id: str, *, close: bool, more: dict[str, str] | None = None) -> bytes:
    """The whole response to a request that failed; with `close` it is the connection's last. `more`: more headers."""
    status, _ = status_and_type(failure)
    headers = hint_headers(failure) | ({"Connection": "close"} if close else {}) | (more or {})
    body = envelope(failure)
    return json_head(status, request_id, headers, len(body)) + body
