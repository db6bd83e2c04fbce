"""What a caller is told where the HTTP parser has refused: the status that HTTP has for it, and the bound."""

from aiohttp.http_exceptions import BadHttpMessage, BadHttpMethod, LineTooLong

from embedmesh.rules.errors import BodyTooLarge, Failure, HeadTooLarge, MalformedHttp, UriTooLong
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX

URI_BYTES_MAX = 8_000  # as long as RFC 9110 wants at least
HEAD_BYTES_MAX = 8_190  # a field; a bearer key has 50
FIELDS_MAX = 128  # an SDK sends twenty


def refused_by_parser(exc: BaseException | None) -> Failure:
    """By its kind; what it says may quote the request, and is not repeated."""
    if isinstance(exc, LineTooLong):
        if exc.args[1] == URI_BYTES_MAX:
            return UriTooLong(f"The address in the request is longer than {URI_BYTES_MAX:,} bytes.")
        return HeadTooLarge(f"A header of the request is longer than {HEAD_BYTES_MAX:,} bytes.")
    said = exc.message if isinstance(exc, BadHttpMessage) else ""
    if isinstance(exc, BadHttpMethod) or said.startswith("Pause on PRI"):
        return MalformedHttp("This is not an HTTP/1.1 request. Is the client speaking TLS or HTTP/2?")
    if said.startswith("Content-Length overflow"):
        return BodyTooLarge(
            f"The body is larger than {REQUEST_BODY_BYTES_MAX:,} bytes, which is the most that is read."
        )
    if said.startswith("Too many headers"):
        return HeadTooLarge(f"The request has more than {FIELDS_MAX} headers.")
    if said.startswith("Duplicate"):
        return MalformedHttp("A header that is given once at most is given more than once.")
    return MalformedHttp("The HTTP request could not be parsed: wrong request line, headers or framing.")
