"""The closed list of failures. Each says whose fault it was and whether trying again is safe.

A failure's `code` is its public name. Status numbers and headers are not here: one table (`embedmesh.http.failures`)
maps each class to HTTP. Any other exception is a bug of ours and leaves as `InternalError`.

A message says what is wrong, where, and what to do. It never holds a caller's text, a path or an address.
"""

from collections.abc import Callable
from enum import Enum

from embedmesh.rules.nodes import Check


class Fault(Enum):
    """Whose fault it was."""

    CALLER = "caller"
    NODE = "node"
    US = "us"


class Retry(Enum):
    """What trying the same thing again would do."""

    USELESS = "useless"  # the same request will fail the same way
    OTHER_NODE = "other_node"  # another node may do it, under the same hold
    LATER = "later"  # the same request may succeed after a pause


class Failure(Exception):
    """A request that did not succeed, in words for the person who made it.

    `param` names the request field at fault (`input.3`), or is None. `envelope` writes the failure in the request's
    dialect; None for OpenAI's.
    """

    code: str
    fault: Fault
    retry: Retry = Retry.USELESS
    envelope: "Callable[[Failure], bytes] | None" = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class CallerFailure(Failure):
    """The request itself must change."""

    fault = Fault.CALLER


# -- the request is wrong ------------------------------------------------------------------------------------------


class InvalidJson(CallerFailure):
    """The body is not one JSON value by RFC 8259, or is nested too deep."""

    code = "invalid_json"


class MalformedHttp(CallerFailure):
    """The request's HTTP is wrong: its line, its framing, or a header that says two things."""

    code = "invalid_value"


class UriTooLong(CallerFailure):
    """The request's line is longer than is read."""

    code = "invalid_value"


class HeadTooLarge(CallerFailure):
    """The request has a header that is larger than is read, or too many of them."""

    code = "invalid_value"


class MissingParameter(CallerFailure):
    """A required member is absent or null."""

    code = "missing_parameter"


class UnknownParameter(CallerFailure):
    """The request has a member that this API does not know."""

    code = "unknown_parameter"


class InvalidType(CallerFailure):
    """A member has the wrong JSON type."""

    code = "invalid_type"


class InvalidValue(CallerFailure):
    """A member has the right type and a value that is not accepted."""

    code = "invalid_value"


class EmptyInput(CallerFailure):
    """There is nothing to embed: an empty string or an empty array."""

    code = "empty_input"


class TooManyInputs(CallerFailure):
    """One request has more inputs than are accepted."""

    code = "too_many_inputs"


class ContextLengthExceeded(CallerFailure):
    """One input has more tokens than the model takes."""

    code = "context_length_exceeded"


class UnsupportedModality(CallerFailure):
    """The model does something else: it makes vectors and is asked to chat, or the other way round."""

    code = "unsupported_modality"


class MaxTokensPerRequest(CallerFailure):
    """All inputs together have more tokens than one request may have."""

    code = "max_tokens_per_request"


class InvalidApiKey(CallerFailure):
    """The key is missing, malformed, unknown, revoked or expired: one message for all, so nothing can be probed."""

    code = "invalid_api_key"


class InsufficientScope(CallerFailure):
    """The key is good and may not do this."""

    code = "insufficient_scope"


class ModelNotFound(CallerFailure):
    """No model of that name is in the catalogue, or not in that precision."""

    code = "model_not_found"


class NotFound(CallerFailure):
    """No such path."""

    code = "not_found"


class MethodNotAllowed(CallerFailure):
    """The path exists; it does not take this method. `allowed` lists the ones it takes."""

    code = "method_not_allowed"

    def __init__(self, message: str, *, allowed: tuple[str, ...]) -> None:
        super().__init__(message)
        self.allowed = allowed


class RequestTimeout(CallerFailure):
    """The request's head or body did not arrive in time."""

    code = "request_timeout"
    retry = Retry.LATER


class BodyTooLarge(CallerFailure):
    """The body is larger than is accepted."""

    code = "body_too_large"


class UnsupportedMediaType(CallerFailure):
    """The body is not plain `application/json`."""

    code = "unsupported_media_type"


class InsufficientQuota(CallerFailure):
    """The account's available money does not cover this request."""

    code = "insufficient_quota"


class RateLimited(CallerFailure):
    """The key has asked as often, or for as much, as it may. `retry_after_s` is when it may again; None is never."""

    code = "rate_limit_exceeded"
    retry = Retry.LATER

    def __init__(self, message: str, *, retry_after_s: float | None = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class IdempotencyConflict(CallerFailure):
    """The `Idempotency-Key` was used for another body."""

    code = "idempotency_conflict"


# -- a node, or we, failed -----------------------------------------------------------------------------------------


class BadNodeResponse(Failure):
    """Every node tried answered wrongly."""

    code = "bad_node_response"
    fault = Fault.NODE
    retry = Retry.LATER


class NoNodeAvailable(Failure):
    """No live node serves the model now."""

    code = "no_node_available"
    fault = Fault.NODE
    retry = Retry.LATER


class Overloaded(Failure):
    """There is more work waiting than may wait. `retry_after_s` is a hint in seconds."""

    code = "overloaded"
    fault = Fault.US
    retry = Retry.LATER

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StoreUnavailable(Failure):
    """The store did not take the hold; nothing was forwarded and nothing is charged."""

    code = "store_unavailable"
    fault = Fault.US
    retry = Retry.LATER


class DeadlineExceeded(Failure):
    """The request's own deadline passed."""

    code = "deadline_exceeded"
    fault = Fault.US
    retry = Retry.LATER


class InternalError(Failure):
    """A bug of ours."""

    code = "internal_error"
    fault = Fault.US
    retry = Retry.LATER


# -- between gateway and node: never shown to a caller as they are ---------------------------------------------------


class NodeFailure(Failure):
    """One attempt on one node failed; another node may do it.

    `check` is what it failed. `retry_after_s` is when the node wants to be asked again, 0.0 where it does not say.
    """

    code = "bad_node_response"
    fault = Fault.NODE
    retry = Retry.OTHER_NODE
    check = Check.CLOSED

    def __init__(self, message: str, *, check: Check | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(message)
        self.check = check or self.check
        self.retry_after_s = retry_after_s


class NodeUnreachable(NodeFailure):
    """No connection, or it broke before work can have begun. Costs no retry budget."""

    check = Check.CONNECT


class NodeBroke(NodeFailure):
    """The connection broke, or the node said 5xx, after the request was sent."""


class NodeBusy(NodeFailure):
    """The node refused more load (429 or 503): load, not failure."""

    check = Check.BUSY


class NodeTooSlow(NodeFailure):
    """The attempt's deadline passed."""

    check = Check.TIMEOUT


class NodeRefused(NodeFailure):
    """The node says the request is wrong though the gateway found it right: they disagree about the model."""

    check = Check.STATUS_4XX


class UpstreamRefused(NodeFailure):
    """A server that is not ours says the request is wrong: it may know better than we do what its model takes."""

    check = Check.STATUS_4XX
    said = ""  # why, in its own words, bounded and printable: for the caller, never for a log
    too_long = False  # it says that the context does not suffice


class WrongAnswer(NodeFailure):
    """The answer failed a check: form, count, order, width, base64, finite, norm, token count or signature."""

    check = Check.FORM


class TooLarge(WrongAnswer):
    """The answer has more bytes than any right one."""


class NotAsAsked(WrongAnswer):
    """A server made more or less than was asked for. Its caller may be the reason, and must not have it sent away."""

    check = Check.COUNT


# -- at start-up: shown in one line, exit code 78 ---------------------------------------------------------------------


class SetupError(Exception):
    """This machine or set-up must be mended first. The message is one line that says what to do."""


class StoreAway(SetupError):
    """The store's server does not answer: it may soon, so that trying again may help."""
