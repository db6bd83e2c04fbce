"""Who may use a route: the key that a request brings, looked at before anything else of it is."""

import functools

from aiohttp import web

from embedmesh.edge.server import Handler, Routes
from embedmesh.flow.identify import identify
from embedmesh.rules.ports import Caller, Keys

ADMIN_SCOPE = "admin"
CALLER = web.RequestKey("caller", Caller)  # who asks, on routes that need a key


def with_key(keys: Keys, handler: Handler, *any_of: str) -> Handler:
    """The handler, for those whose key has one of the scopes, where any are named."""

    @functools.wraps(handler)
    async def checked(request: web.BaseRequest) -> web.StreamResponse:
        request[CALLER] = await identify(
            request.headers.get("Authorization"), keys, *any_of, api_key=request.headers.get("api-key")
        )
        return await handler(request)

    return checked


def for_keys(keys: Keys, routes: Routes, *any_of: str) -> Routes:
    """All of these routes, for those whose key has one of the scopes, where any are named."""
    return {
        path: {method: with_key(keys, handler, *any_of) for method, handler in methods.items()}
        for path, methods in routes.items()
    }


def for_admins(keys: Keys, routes: Routes) -> Routes:
    """All of these routes, for keys with the scope `admin` only."""
    return for_keys(keys, routes, ADMIN_SCOPE)
