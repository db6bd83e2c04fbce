"""`/openapi.json`, `/docs` and `/`: the API, described."""

from typing import Any

import orjson
from aiohttp import web

from embedmesh.gateway.api.pages import docs_page
from embedmesh.gateway.api.routes import NO_KEY, Api, ApiReply, RawHandler, Route, in_room
from embedmesh.http.bodies import JSON_HEADERS
from embedmesh.http.connections import Origins
from embedmesh.http.routing import Handler
from embedmesh.rules.errors import Overloaded
from embedmesh.rules.limits import PAGE_REPLIES_MAX
from embedmesh.rules.shares import Room


class PagesApi(Api):
    """Handlers for everybody. They need no key, so each origin has a share of the room."""

    TAG = "About"

    def __init__(self, document: dict[str, Any], origins: Origins) -> None:
        """`document` is the OpenAPI document."""
        self._openapi = orjson.dumps(document)
        self._docs, self._docs_csp = docs_page()
        self._origins = origins
        self.room = Room(
            PAGE_REPLIES_MAX, f"This gateway sends {PAGE_REPLIES_MAX} of its pages at a time. Try again shortly."
        )

    def bounded(self, handler: Handler) -> Handler:
        return in_room(self.room, handler, self._origins.of_request)

    async def get_openapi(self, request: web.BaseRequest) -> web.StreamResponse:
        """Get this document. The OpenAPI 3.1 document of this API."""
        return web.Response(body=self._openapi, headers=JSON_HEADERS)

    async def get_docs(self, request: web.BaseRequest) -> web.StreamResponse:
        """Get the documentation page. This API to read and to try in a browser. Loads nothing from elsewhere."""
        headers = {
            "Content-Type": "text/html; charset=utf-8",
            "Content-Security-Policy": self._docs_csp,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
        }
        return web.Response(body=self._docs, headers=headers)

    async def get_root(self, request: web.BaseRequest) -> web.StreamResponse:
        """Redirect to the documentation page. For those who open the server's address in a browser."""
        headers = {"Location": "/docs", "Content-Type": "text/plain"}
        return web.Response(status=302, body=b"See /docs.\n", headers=headers)

    ROUTES = (
        Route(
            "GET",
            "/openapi.json",
            NO_KEY,
            get_openapi,
            failures=(Overloaded,),
            raw=RawHandler({200: ApiReply("The document.", dict[str, Any])}),
        ),
        Route(
            "GET",
            "/docs",
            NO_KEY,
            get_docs,
            failures=(Overloaded,),
            raw=RawHandler({200: ApiReply("The page.", None, "text/html", ("Content-Security-Policy",))}),
        ),
        Route(
            "GET",
            "/",
            NO_KEY,
            get_root,
            failures=(Overloaded,),
            raw=RawHandler({302: ApiReply("The page is at `/docs`.", None, "text/plain", ("Location",))}),
        ),
    )
