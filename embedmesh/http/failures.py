"""The one table that maps failures to HTTP, and the error envelope."""

import math
import random

import orjson
from aiohttp import web

from embedmesh.rules import errors, file_failures, lock_failures
from embedmesh.rules.errors import Failure

REQUEST_ERROR = "invalid_request_error"
SERVER_ERROR = "server_error"

TABLE: dict[type[Failure], tuple[int, str]] = {
    errors.InvalidJson: (400, REQUEST_ERROR),
    errors.MalformedHttp: (400, REQUEST_ERROR),
    errors.MissingParameter: (400, REQUEST_ERROR),
    errors.UnknownParameter: (400, REQUEST_ERROR),
    errors.InvalidType: (400, REQUEST_ERROR),
    errors.InvalidValue: (400, REQUEST_ERROR),
    errors.EmptyInput: (400, REQUEST_ERROR),
    errors.TooManyInputs: (400, REQUEST_ERROR),
    errors.ContextLengthExceeded: (400, REQUEST_ERROR),
    errors.MaxTokensPerRequest: (400, REQUEST_ERROR),
    errors.UnsupportedModality: (400, REQUEST_ERROR),
    errors.InvalidApiKey: (401, "authentication_error"),
    errors.InsufficientScope: (403, "permission_error"),
    errors.ModelNotFound: (404, REQUEST_ERROR),
    errors.NotFound: (404, REQUEST_ERROR),
    errors.MethodNotAllowed: (405, REQUEST_ERROR),
    errors.RequestTimeout: (408, REQUEST_ERROR),
    errors.UriTooLong: (414, REQUEST_ERROR),
    errors.HeadTooLarge: (431, REQUEST_ERROR),
    errors.BodyTooLarge: (413, REQUEST_ERROR),
    errors.UnsupportedMediaType: (415, REQUEST_ERROR),
    errors.IdempotencyConflict: (409, REQUEST_ERROR),
    lock_failures.LockNotFound: (404, REQUEST_ERROR),
    lock_failures.LockUsed: (409, REQUEST_ERROR),
    lock_failures.LockExpired: (409, REQUEST_ERROR),
    lock_failures.KeyMismatch: (400, REQUEST_ERROR),
    lock_failures.ConfidentialRefused: (400, REQUEST_ERROR),
    errors.InsufficientQuota: (429, "insufficient_quota"),
    file_failures.JobOver: (409, REQUEST_ERROR),
    file_failures.TooMuchKept: (429, "insufficient_quota"),
    errors.RateLimited: (429, "rate_limit_error"),
    errors.InternalError: (500, SERVER_ERROR),
    errors.BadNodeResponse: (502, SERVER_ERROR),
    errors.NoNodeAvailable: (503, SERVER_ERROR),
    errors.Overloaded: (503, SERVER_ERROR),
    errors.StoreUnavailable: (503, SERVER_ERROR),
    errors.DeadlineExceeded: (504, SERVER_ERROR),
    file_failures.StorageFull: (507, SERVER_ERROR),
}

RETRY_AFTER_S = 1.0  # a restarted node is back in about this time
RATE_LIMIT_JITTER_S = 0.25  # after the minute is over


def status_and_type(failure: Failure) -> tuple[int, str]:
    """The HTTP status and the envelope's `type`; a failure that is not in the table is a bug of ours."""
    return TABLE.get(type(failure), (500, SERVER_ERROR))


def envelope(failure: Failure) -> bytes:
    """The JSON body of a failure: always the same four members."""
    if failure.envelope is not None:  # of another dialect
        return failure.envelope(failure)
    _, kind = status_and_type(failure)
    error = {"message": failure.message, "type": kind, "param": failure.param, "code": failure.code}
    return orjson.dumps({"error": error})


def hint_headers(failure: Failure) -> dict[str, str]:
    """The headers that tell a client what to do next."""
    status, _ = status_and_type(failure)
    if isinstance(failure, errors.MethodNotAllowed):
        return {"Allow": ", ".join(failure.allowed)}
    if isinstance(failure, errors.InvalidApiKey):
        return {"WWW-Authenticate": "Bearer"}
    never = isinstance(failure, errors.RateLimited) and failure.retry_after_s is None
    if never or isinstance(
        failure,
        errors.InsufficientQuota
        | errors.IdempotencyConflict
        | file_failures.TooMuchKept
        | file_failures.JobOver
        | lock_failures.LockUsed
        | lock_failures.LockExpired,
    ):
        return {"x-should-retry": "false"}
    if status in (429, 503):
        # Jitter, so that clients that were refused together do not all come back together.
        if isinstance(failure, errors.RateLimited) and failure.retry_after_s is not None:  # no earlier than that
            wait_s = failure.retry_after_s + RATE_LIMIT_JITTER_S * random.random()
        else:
            base = failure.retry_after_s if isinstance(failure, errors.Overloaded) else RETRY_AFTER_S
            wait_s = base * (1 + random.random())
        return {"Retry-After": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}
    return {}


def failure_response(failure: Failure) -> web.Response:
    """The whole answer to a request that failed."""
    status, _ = status_and_type(failure)
    headers = hint_headers(failure) | {"Content-Type": "application/json"}
    return web.Response(status=status, body=envelope(failure), headers=headers)
