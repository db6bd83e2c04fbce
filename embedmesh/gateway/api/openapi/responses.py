"""Responses of operations: replies with their headers, and failures narrowed to those of the route."""

from collections.abc import Iterable, Mapping
from itertools import groupby

from embedmesh.gateway.api.openapi.schemas import Json, ref, unique
from embedmesh.http.failures import TABLE, hint_headers
from embedmesh.rules import errors
from embedmesh.rules.errors import Failure

Failures = tuple[type[Failure], ...]

STATUS_WORDS = {
    400: "The request is wrong.",
    401: "The API key is missing or not valid.",
    403: "The API key may not do this.",
    404: "It does not exist.",
    405: "The path does not take this method.",
    408: "The request did not arrive in time.",
    409: "The request contradicts an earlier one.",
    413: "The body is too large.",
    414: "The request's line is too long.",
    415: "The body is not plain JSON.",
    429: "A limit of the account is reached.",
    431: "A header is too large, or there are too many.",
    500: "A bug in the gateway. Trying again may help.",
    502: "All nodes that were tried failed.",
    503: "The gateway cannot do it right now. Try again shortly.",
    504: "The request took too long.",
    507: "The disk for files has no room now. Try again later.",
}

COUNT_HEADERS = {
    "openai-processing-ms": "Time in the gateway, in milliseconds.",
    "x-embedmesh-cached": "How many vectors or scores came from the cache, if the account's `cache` is on.",
    "x-embedmesh-cost-nanousd": "The charge, in nano-USD (1e-9 USD).",
    "x-embedmesh-truncated": "How many inputs or documents were cut, as `truncate` requests.",
    "x-ratelimit-limit-requests": "The key's limit of requests per minute, if it has one.",
    "x-ratelimit-remaining-requests": "How many are left now.",
    "x-ratelimit-limit-tokens": "The key's limit of tokens per minute, if it has one.",
    "x-ratelimit-remaining-tokens": "How many are left now.",
    "Retry-After": "Seconds to wait before trying again, with jitter.",
    "retry-after-ms": "The same wait in milliseconds.",
}
TEXT_HEADERS = {
    "x-request-id": "The id of this exchange: the request's own `x-request-id` if it has one, else a new id.",
    "x-embedmesh-ignored": "Fields of the request that have no effect.",
    "x-embedmesh-node": "The nodes that computed the vectors or scores, most first; `cache` for those from the cache.",
    "x-embedmesh-request": "The ledger's id of the request; the same as `x-request-id` unless you sent one.",
    "x-ratelimit-reset-requests": "When the whole limit is available again, as in `7.000s`.",
    "x-ratelimit-reset-tokens": "When the whole limit is available again, as in `7.000s`.",
    "idempotent-replayed": "`true` on the stored reply to an `Idempotency-Key` or a retry: it was paid before.",
    "Content-Security-Policy": "Allows this page's own script and style, by hash, and nothing else.",
    "x-should-retry": "`false`: trying again will fail the same way.",
    "Location": "Where the page is.",
    "Allow": "The methods that this path takes.",
    "WWW-Authenticate": "`Bearer`: how to send the key.",
    "Content-Digest": "SHA-256 of the body (RFC 9530).",
    "Embedmesh-Receipt": "Always 0 here: only a node's own replies have receipts.",
    "Signature-Input": "What the signature covers (RFC 9421).",
    "Signature": "The gateway's signature, under the session with this node.",
}
HEADERS = COUNT_HEADERS | TEXT_HEADERS


def response(description: str, content: Mapping[str, Json], headers: Iterable[str] = ()) -> Json:
    """A response, with a schema for each content type; `x-request-id` is always among its headers."""
    return {
        "description": description,
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in ("x-request-id", *headers)},
        "content": {content_type: {"schema": schema} for content_type, schema in content.items()},
    }


def failure_responses(failures: Failures, other: Json | None = None) -> dict[int, Json]:
    """One response for each status: the envelope, narrowed to the types and codes of these failures.

    `other` is the envelope of another dialect; what is refused before the request is read still has ours.
    """
    by_status = sorted(failures, key=_status)
    return {status: _failure_response(status, tuple(group), other) for status, group in groupby(by_status, key=_status)}


def _failure_response(status: int, failures: Failures, other: Json | None) -> Json:
    narrowed = {
        "type": {"enum": unique(TABLE[failure][1] for failure in failures)},
        "code": {"enum": unique(failure.code for failure in failures)},
    }
    schema = {"allOf": [ref("Error"), {"properties": {"error": {"properties": narrowed}}}]}
    if other is not None:
        schema = {"anyOf": [other, schema]}
    headers = unique(name for failure in failures for name in _hints(failure))
    return response(STATUS_WORDS[status], {"application/json": schema}, headers)


def failure_row(failure: type[Failure]) -> Json:
    """A row of the error table on the documentation page."""
    status, kind = TABLE[failure]
    return {
        "status": status,
        "code": failure.code,
        "type": kind,
        "meaning": (failure.__doc__ or "").split(". ")[0].rstrip(".") + ".",
        "retry": failure.retry.value,
        "headers": list(_hints(failure)),
    }


def _status(failure: type[Failure]) -> int:
    return TABLE[failure][0]


def _hints(failure: type[Failure]) -> Json:
    """The headers of such a failure."""
    sample = errors.MethodNotAllowed("", allowed=()) if failure is errors.MethodNotAllowed else failure("")
    return dict(hint_headers(sample))


def header(name: str) -> Json:
    """One entry of `components.headers`."""
    schema = {"type": "integer", "minimum": 0} if name in COUNT_HEADERS else {"type": "string"}
    return {"description": HEADERS[name], "schema": schema}
