"""A route in one row: what it takes, who may use it, what it replies.

Each API lists its rows as `ROUTES`, below its handlers; `embedmesh.gateway.api.table` lists the APIs. The router
(`router`) and the OpenAPI document (`embedmesh.gateway.api.openapi`) are both made from these rows and their structs.
"""

import functools
import inspect
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from embedmesh.flow.identify import HEADER_CHARS_MAX, identify
from embedmesh.gateway.api.metrics import CountedRequest, RouteCounts
from embedmesh.gateway.api.queries import path_parameter, query_of
from embedmesh.http.aiohttp_connection import write_out
from embedmesh.http.bodies import CALLER, decoded, json_reply, small_body
from embedmesh.http.receive import BodyBudget
from embedmesh.http.rendering import REQUEST_ID
from embedmesh.http.routing import PATH_REMAINDER, Handler, Routes
from embedmesh.rules.acts import Actor
from embedmesh.rules.errors import Failure, InsufficientScope, InvalidApiKey, StoreUnavailable
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.metrics import MetricReadings
from embedmesh.rules.ports import Caller, Keys, RateLimits
from embedmesh.rules.request_record import CURRENT
from embedmesh.rules.shares import Room

ADMIN_SCOPE = "admin"
ACTING_SCOPES = (ADMIN_SCOPE, "keys")  # of routes whose calls make rows of the audit, but for those that only read
ACTOR = web.RequestKey("actor", Actor)  # set on those routes

Scope = tuple[str, ...] | Literal["signed"] | None
NO_KEY: Scope = None
ANY_KEY: Scope = ()
ADMIN_KEY: Scope = (ADMIN_SCOPE,)
READ_KEY: Scope = (ADMIN_SCOPE, "admin:read")
AUDIT_KEY: Scope = (ADMIN_SCOPE, "admin:read", "audit")
SIGNED: Scope = "signed"  # by a node; the handler checks the signature

Body = TypeVar("Body")
Query = TypeVar("Query")


class ApiCall(NamedTuple, Generic[Body, Query]):
    """What a handler gets: the decoded body and query of its row, and the path parameter."""

    request: web.BaseRequest
    parameter: str  # of the path
    body: Body
    query: Query

    @property
    def caller(self) -> Caller:
        """The owner of the key."""
        return self.request[CALLER]

    @property
    def viewer(self) -> str:
        """On a route for operators: the key of somebody who may only look; empty for an operator."""
        return "" if ADMIN_SCOPE in self.caller.scopes else self.caller.key_id

    @property
    def by(self) -> Actor:
        """Who acts, on a route that changes something for operators, or keys."""
        return actor_of(self.request)


class ApiReply(NamedTuple):
    """One documented reply. `body` is a type that msgspec knows; None is text. An empty `content_type` is no body.

    `event` is the type of a stream's events, where the caller may have a stream instead.
    """

    description: str
    body: Any = None
    content_type: str = "application/json"
    headers: tuple[str, ...] = ()
    event: Any = None


class RawHandler(NamedTuple):
    """What a handler takes and replies that speaks HTTP itself. A tuple of types means: one of them."""

    replies: Mapping[int, ApiReply]
    request: Any = None
    key_checked_by_flow: bool = False  # on the fast path, too
    extra: Mapping[str, Any] = {}  # more for the operation in the OpenAPI document
    error: Any = None  # the type of a failure in another dialect


class Route(NamedTuple):
    """One method of one path.

    `handler` is a method of the API: it takes an `ApiCall` and returns the struct of the reply. Its name is the
    operation id, its docstring the summary and the description; its annotations are the types of body, query and
    reply. A handler with `raw` takes aiohttp's request and returns aiohttp's response. `failures` are those that the
    rest of the row does not imply: see `failures_of` in `openapi.operations`.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str  # with named parameters: /v1/admin/keys/{key_id}
    scope: Scope  # no default: each row says it
    handler: Callable[[Any, Any], Awaitable[Any]]
    failures: tuple[type[Failure], ...] = ()
    body_optional: bool = False
    any_name: bool = False  # the path parameter is any text, slashes included
    details: str = ""  # more for the description
    raw: RawHandler | None = None

    @property
    def acts(self) -> bool:
        """Whether its calls are acts: they change something for operators, or keys, and make rows of the audit."""
        return self.method != "GET" and isinstance(self.scope, tuple) and not set(self.scope).isdisjoint(ACTING_SCOPES)

    @property
    def request(self) -> Any:
        """The type of the body, or None."""
        return self.raw.request if self.raw is not None else _given(self._call[0])

    @property
    def query(self) -> type[msgspec.Struct] | None:
        """The struct of the query, or None where the query is not read."""
        return None if self.raw is not None else _given(self._call[1])

    @property
    def replies(self) -> Mapping[int, ApiReply]:
        """Status -> reply. The reply of an ordinary handler is described by the docstring of its struct."""
        if self.raw is not None:
            return self.raw.replies
        body = self.handler.__annotations__["return"]
        return {200: ApiReply(inspect.cleandoc(getattr(body, "__origin__", body).__doc__ or ""), body)}

    @property
    def _call(self) -> tuple[Any, Any]:
        body, query = self.handler.__annotations__["call"].__args__
        return body, query


class Api:
    """Handlers, and the rows that lead to them."""

    TAG: ClassVar[str]  # in the OpenAPI document
    ROUTES: ClassVar[tuple[Route, ...]]
    bodies: BodyBudget

    def bounded(self, handler: Handler) -> Handler:
        """The handler, within the bounds that all routes of this API share. It runs after the key was checked."""
        return handler

    def readings(self) -> MetricReadings:
        """What `/metrics` shows of this API, besides its requests."""
        return {}


class OperatorAccess(NamedTuple):
    """How the routes for operators are guarded: those for keys with the scope `admin`.

    `keys` are those that are good there, with tokens of up to `token_chars_max`; None: the same as elsewhere.
    `certificate`: a client certificate is wanted, too. `refused` is called for each request that is refused for its
    key, its scopes or its certificate.
    """

    keys: Keys | None = None
    token_chars_max: int = HEADER_CHARS_MAX
    certificate: bool = False
    refused: Callable[[], object] = lambda: None


def router(
    apis: Iterable[Api],
    keys: Keys,
    rate_limits: RateLimits | None,
    *,
    operators: OperatorAccess | None = None,
    origin_of: Callable[[web.BaseRequest], str] = lambda request: "",
    counts: Callable[[str], RouteCounts] | None = None,
) -> Routes:
    """All routes of these APIs. Paths and methods without a row are refused. Without `rate_limits` none apply.

    `origin_of` says from where a request comes, for the audit. `counts` are those of a path, for requests that the flow
    does not count.
    """
    operators = operators or OperatorAccess()
    routes: dict[str, dict[str, Handler]] = {}
    for api in apis:
        for route in api.ROUTES:
            handler = api.bounded(_adapted(route, api))
            by_flow = route.raw is not None and route.raw.key_checked_by_flow
            if isinstance(route.scope, tuple) and not by_flow:
                if route.acts:
                    handler = _acting(handler, origin_of)
                if ADMIN_SCOPE in route.scope:
                    handler = _for_operators(handler, route.scope, operators, keys, rate_limits)
                else:
                    handler = _with_key(handler, route.scope, keys, rate_limits)
            if counts is not None and not by_flow:
                handler = _counted(handler, counts(route.path))
            routes.setdefault(starred(route.path), {})[route.method] = handler
    return routes


def starred(path: str) -> str:
    """A row's path as `embedmesh.http.server.Routes` writes it: neighbouring parameters are one star."""
    return re.sub("{.+}", "*", path)


def in_room(room: Room, handler: Handler, whose: Callable[[web.BaseRequest], str]) -> Handler:
    """The handler, where replies take memory until they are read: `room` bounds how many there are at one time."""

    @functools.wraps(handler)
    async def inside(request: web.BaseRequest) -> web.StreamResponse:
        name = whose(request)
        room.take(name)
        try:
            response = await handler(request)
            await write_out(request, response, WRITE_REPLY_S)
            return response
        finally:
            room.give_back(name)

    return inside


def account_of(request: web.BaseRequest) -> str:
    """The account whose key the request has."""
    return request[CALLER].account_id


def actor_of(request: web.BaseRequest) -> Actor:
    """Who acts, on a route of which `acts` is true."""
    return request[ACTOR]


def _given(kind: Any) -> Any:
    return None if kind is type(None) else kind


def _adapted(route: Route, api: Api) -> Handler:
    """A row's handler as the server calls it."""
    if route.raw is not None:
        return functools.partial(route.handler, api)
    kind, query_kind = route.request, route.query

    async def answer(request: web.BaseRequest) -> web.StreamResponse:
        parameter = path_parameter(request, any_name=route.any_name) if PATH_REMAINDER in request else ""
        query = None if query_kind is None else query_of(request, query_kind)
        body = None
        if kind is not None:
            sent = await small_body(request, api.bodies)
            body = decoded(sent if sent or not route.body_optional else b"{}", kind)
        return json_reply(await route.handler(api, ApiCall(request, parameter, body, query)))

    return answer


def _counted(handler: Handler, counts: RouteCounts) -> Handler:
    """The handler, with a count of how its requests end."""

    async def watched(request: web.BaseRequest) -> web.StreamResponse:
        with CountedRequest(counts) as counted:
            response = await handler(request)
            if response.status >= 400:
                counted.code = f"http_{response.status}"
            return response

    return watched


def _acting(handler: Handler, origin_of: Callable[[web.BaseRequest], str]) -> Handler:
    """The handler, which is told who acts, and from where."""

    async def acting(request: web.BaseRequest) -> web.StreamResponse:
        request[ACTOR] = Actor(request[CALLER].key_id, origin_of(request), request[REQUEST_ID])
        return await handler(request)

    return acting


def _for_operators(
    handler: Handler, scopes: tuple[str, ...], operators: OperatorAccess, keys: Keys, rate_limits: RateLimits | None
) -> Handler:
    """The handler, for operators. What is refused is counted, and no row of the audit: strangers could fill it."""
    handler = _with_certificate(handler) if operators.certificate else handler
    checked = _with_key(handler, scopes, operators.keys or keys, rate_limits, operators.token_chars_max)

    async def counted(request: web.BaseRequest) -> web.StreamResponse:
        try:
            return await checked(request)
        except (InvalidApiKey, InsufficientScope):
            operators.refused()
            raise

    return counted


def _with_key(
    handler: Handler,
    scopes: tuple[str, ...],
    keys: Keys,
    rate_limits: RateLimits | None,
    token_chars_max: int = HEADER_CHARS_MAX,
) -> Handler:
    """The handler, for keys with one of the scopes; with no scopes, for any key.

    Each call counts as one of the requests that the key may make in a minute, unless it has the scope `admin`.
    """

    async def checked(request: web.BaseRequest) -> web.StreamResponse:
        request[CALLER] = await admit(request.headers.get, scopes, keys, rate_limits, token_chars_max)
        return await handler(request)

    return checked


def _with_certificate(handler: Handler) -> Handler:
    """The handler, for connections that proved themselves with a certificate; TLS has checked who issued it."""

    async def checked(request: web.BaseRequest) -> web.StreamResponse:
        if request.transport is None or not request.transport.get_extra_info("peercert"):
            raise InsufficientScope("The admin API of this gateway wants a client certificate besides the key.")
        return await handler(request)

    return checked


async def admit(
    header: Callable[[str], str | None],
    scopes: tuple[str, ...],
    keys: Keys,
    rate_limits: RateLimits | None,
    token_chars_max: int = HEADER_CHARS_MAX,
) -> Caller:
    """Whose key a request has, which is one of those that it may make. Raises CallerFailure or StoreUnavailable."""
    caller = await identify(
        header("authorization"), keys, *scopes, api_key=header("api-key"), chars_max=token_chars_max
    )
    if (record := CURRENT.get()) is not None:
        record.account = caller.account_id
    if rate_limits is not None and ADMIN_SCOPE not in caller.scopes:
        with suppress(StoreUnavailable):  # reads go on; writes meet it later
            await rate_limits.take_request(caller)
    return caller
