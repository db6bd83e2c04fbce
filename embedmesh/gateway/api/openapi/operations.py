"""Operations of the OpenAPI document, each made from one row of the route table."""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec

from embedmesh.gateway.api.fleet_api import ACTIONS
from embedmesh.gateway.api.openapi.responses import failure_responses, response
from embedmesh.gateway.api.openapi.schemas import Json
from embedmesh.gateway.api.pages.samples import EXAMPLE_MODEL
from embedmesh.gateway.api.routes import ADMIN_KEY, SIGNED, ApiReply, Route
from embedmesh.http.failures import TABLE
from embedmesh.rules import errors
from embedmesh.rules.errors import Failure

SchemaOf = Callable[[Any], Json]


class PathParameter(NamedTuple):
    """What the document says about a `{parameter}`."""

    description: str
    example: str
    schema: Json = {"type": "string", "minLength": 1}  # noqa: RUF012 - nobody changes it


PATH_PARAMETERS = {
    "id": PathParameter("The model's id or alias.", EXAMPLE_MODEL),
    "node_id": PathParameter("The node's id; operators may use its number.", "node_5d41402abc4b2a76b9719d911017c592"),
    "action": PathParameter("The decision.", "drain", {"enum": [*ACTIONS, "weight"]}),
    "invite_id": PathParameter("The invite's id.", "Gd0kZ5wQ1xYb"),
    "file_id": PathParameter("The file's id.", "file-019aa0b4c0de7b62a1f0c3d4e5f60718"),
    "batch_id": PathParameter("The batch's id.", "batch_019aa0b4c0de7b62a1f0c3d4e5f60718"),
    "job_id": PathParameter("The job's id.", "job_019aa0b4c0de7b62a1f0c3d4e5f60718"),
    "account_id": PathParameter("The account's id.", "local"),
    "key_id": PathParameter("The key's id.", "key_019aa0b4c0de7b62a1f0c3d4e5f60718"),
    "entry_id": PathParameter("The entry's id.", "3"),
    "tab_id": PathParameter("The tab's id, as in entries.", "tab_1"),
    "request_id": PathParameter("The ledger's id of the request, as in entries.", "req_1"),
}

EVENT_STREAM = "text/event-stream"
EVERY_ROUTE: set[type[Failure]] = {errors.MalformedHttp, errors.RequestTimeout, errors.UriTooLong, errors.HeadTooLarge}
NOT_NOW: set[type[Failure]] = {errors.Overloaded, errors.StoreUnavailable}


def failures_of(route: Route) -> tuple[type[Failure], ...]:
    """All failures of a route: those in its row, and those that the rest of the row implies."""
    found = {errors.InternalError, *EVERY_ROUTE, *route.failures}
    if route.scope == SIGNED:
        found |= {errors.InvalidApiKey}
    elif route.scope is not None:
        found |= {errors.InvalidApiKey, *NOT_NOW}
        found |= {errors.InsufficientScope} if route.scope else set()
        found |= {errors.RateLimited} if route.scope != ADMIN_KEY else set()
    if route.request is not None:
        found |= {errors.InvalidValue, errors.BodyTooLarge, errors.UnsupportedMediaType, *NOT_NOW}
    if route.query is not None:
        found |= {errors.UnknownParameter, errors.InvalidValue}
    if "{" in route.path:
        found |= {errors.NotFound}
    return tuple(failure for failure in TABLE if failure in found)


def operation(route: Route, tag: str, schema_of: SchemaOf) -> Json:
    """One method of one path. The first sentence of the handler's docstring is its summary."""
    docstring = " ".join((route.handler.__doc__ or "").split())
    summary, *rest = re.split(r"(?<=[.?]) ", docstring, maxsplit=1)
    description = f"{rest[0] if rest else summary} {route.details}".strip()
    error = route.raw.error if route.raw is not None else None
    responses = failure_responses(failures_of(route), None if error is None else schema_of(error)) | {
        status: response(reply.description, _content(reply, schema_of), reply.headers)
        if reply.content_type
        else {"description": reply.description, "headers": {}}
        for status, reply in route.replies.items()
    }
    if route.scope == SIGNED:
        responses[401]["description"] = "The request is not signed under a session of this node. Register again."
    parameters = [_path_parameter(name) for name in re.findall(r"{(\w+)}", route.path)]
    if route.query is not None:
        parameters += _query_parameters(route.query)
    made: Json = {
        "operationId": _camel_case(route.handler.__name__),
        "tags": [tag],
        "summary": summary.removesuffix("."),
        "description": description,
        "security": _security(route),
        "responses": {str(status): responses[status] for status in sorted(responses)},
    }
    extra = dict(route.raw.extra) if route.raw is not None else {}
    if parameters := parameters + extra.pop("parameters", []):
        made["parameters"] = parameters
    if route.request is not None:
        content = {"application/json": {"schema": schema_of(route.request)}}
        made["requestBody"] = {"required": not route.body_optional, "content": content}
    return made | extra


def types_of(route: Route) -> Iterator[Any]:
    """All types whose schemas the row needs. A tuple of types in a row means: one of them."""
    error = route.raw.error if route.raw is not None else None
    replies = (kind for reply in route.replies.values() for kind in (reply.body, reply.event))
    for kind in (route.request, error, *replies):
        if kind is not None:
            yield from kind if isinstance(kind, tuple) else (kind,)


def _camel_case(name: str) -> str:
    return re.sub("_(.)", lambda found: found[1].upper(), name)


def _content(reply: ApiReply, schema_of: SchemaOf) -> Json:
    """Schemas by content type; of a stream, the schema is that of an event's data, as OpenAI's document has it."""
    content = {reply.content_type: {"type": "string"} if reply.body is None else schema_of(reply.body)}
    if reply.event is not None:
        content[EVENT_STREAM] = schema_of(reply.event)
    return content


def _security(route: Route) -> list[Json]:
    if route.scope is None:
        return []
    if route.scope == SIGNED:
        return [{"nodeSignature": []}]
    return [{"bearerAuth": [scope]} for scope in route.scope] or [{"bearerAuth": []}]


def _path_parameter(name: str) -> Json:
    described = PATH_PARAMETERS[name]._asdict()
    return {"name": name, "in": "path", "required": True, **described}


def _query_parameters(query: type[msgspec.Struct]) -> list[Json]:
    """A parameter for each field; its description says the default."""
    schema = msgspec.json.schema_components([query])[1][query.__name__]
    found = []
    for name, field in schema["properties"].items():
        field |= field.pop("anyOf", [{}])[0]  # a parameter that may be left out is never null
        field.pop("default", None)
        described = {"required": name in schema["required"], "description": field.pop("description")}
        found.append({"name": name, "in": "query", **described, "schema": field})
    return found
