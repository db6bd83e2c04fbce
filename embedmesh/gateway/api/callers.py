"""Who may use a route: the key that a request brings, looked at before anything else of it is."""

import functools
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from embedmesh.flow.identify import identify
from embedmesh.http.aiohttp_connection import write_out
from embedmesh.http.bodies import CALLER
from embedmesh.http.routing import Handler, Routes
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.limits import WRITE_REPLY_S
from embedmesh.rules.ports import Keys, RateLimits
from embedmesh.rules.shares import Room

ADMIN_SCOPE = "admin"


def with_key(keys: Keys, handler: Handler, *any_of: str, rate_limits: RateLimits | None = None) -> Handler:
    """The handler, for those whose key has one of the scopes, where any are named.

    With `rate_limits` each call is one of the requests that the key may make in a minute, unless an operator has it.
    """

    @functools.wraps(handler)
    async def checked(request: web.BaseRequest) -> web.StreamResponse:
        caller = request[CALLER] = await identify(
            request.headers.get("Authorization"), keys, *any_of, api_key=request.headers.get("api-key")
        )
        if rate_limits is not None and ADMIN_SCOPE not in caller.scopes:
            with suppress(StoreUnavailable):  # what only reads goes on; what writes will meet it anyway
                await rate_limits.take_request(caller)
        return await handler(request)

    return checked


def for_keys(keys: Keys, routes: Routes, *any_of: str, rate_limits: RateLimits | None = None) -> Routes:
    """All of these routes, as `with_key` has them."""
    return {
        path: {method: with_key(keys, handler, *any_of, rate_limits=rate_limits) for method, handler in methods.items()}
        for path, methods in routes.items()
    }


def in_room(room: Room, routes: Routes, whose: Callable[[web.BaseRequest], str]) -> Routes:
    """All of these routes, where their replies need some memory: so many at one time until they are read."""

    def bounded(handler: Handler) -> Handler:
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

    return {path: {name: bounded(handler) for name, handler in methods.items()} for path, methods in routes.items()}


def account_of(request: web.BaseRequest) -> str:
    """Whose request it is, on routes that need a key."""
    return request[CALLER].account_id


def for_admins(keys: Keys, routes: Routes) -> Routes:
    """All of these routes, for keys with the scope `admin` only."""
    return for_keys(keys, routes, ADMIN_SCOPE)
