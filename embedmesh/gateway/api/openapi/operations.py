"""What is said of every method of a path in the same way."""

from embedmesh.gateway.api.openapi.replies import Failures, failure_responses
from embedmesh.gateway.api.openapi.shapes import Json
from embedmesh.rules import errors

ANY_ROUTE: Failures = (
    errors.MalformedHttp,
    errors.RequestTimeout,
    errors.UriTooLong,
    errors.HeadTooLarge,
    errors.InternalError,
)
SCOPED_KEY: Failures = (
    errors.InsufficientScope,
    errors.InvalidApiKey,
    errors.Overloaded,
    errors.StoreUnavailable,
    *ANY_ROUTE,
)
ANY_KEY: Failures = (
    errors.RateLimited,
    errors.InvalidApiKey,
    errors.Overloaded,
    errors.StoreUnavailable,
    *ANY_ROUTE,
)
LIMITED_KEY: Failures = (errors.InsufficientScope, *ANY_KEY)


def operation(
    name: str,
    tag: str,
    summary: str,
    description: str,
    replies: dict[int, Json],
    failures: Failures,
    scopes: tuple[str, ...] | None = None,
) -> Json:
    """One method of a path. Without `scopes` it needs no key; with none of them, any; else a key with one of them."""
    responses = failure_responses(failures) | replies
    return {
        "operationId": name,
        "tags": [tag],
        "summary": summary,
        "description": description,
        "security": [] if scopes is None else [{"bearerAuth": [scope]} for scope in scopes] or [{"bearerAuth": []}],
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }


def parameter(name: str, description: str, example: str) -> Json:
    """A part of the path."""
    schema = {"type": "string", "minLength": 1}
    return {
        "name": name,
        "in": "path",
        "required": True,
        "description": description,
        "schema": schema,
        "example": example,
    }


def query(name: str, description: str, schema: Json, *, required: bool = False) -> Json:
    """A parameter of the query."""
    return {"name": name, "in": "query", "required": required, "description": description, "schema": schema}


def body(schema: Json, *, required: bool = True) -> Json:
    """What is sent."""
    return {"requestBody": {"required": required, "content": {"application/json": {"schema": schema}}}}
