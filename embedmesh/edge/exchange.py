"""One request and its reply, whichever way they travel."""

from typing import Protocol

from aiohttp import web

from embedmesh.edge.receive import BodyBudget, read_body
from embedmesh.edge.server import deliver
from embedmesh.rules.embeddings import BODY_BYTES_MAX
from embedmesh.rules.holds import WRITE_REPLY_S
from embedmesh.rules.ports import Reply


class Exchange(Protocol):
    """What a handler needs of HTTP."""

    def header(self, name: str) -> str | None:
        """A field of the request's head, its name in lower case."""
        ...

    async def body(self, account_id: str) -> bytes:
        """All of it, of the share of the account whose request this is. Raises what `read_body` raises."""
        ...

    async def deliver(self, reply: Reply) -> None:
        """Returns when the reply's last byte is in the kernel. Raises ConnectionError where it never gets there."""
        ...


class GeneralExchange:
    """Over the general server. `response` is what the server is given back in the end."""

    def __init__(self, request: web.BaseRequest, bodies: BodyBudget, response: web.Response) -> None:
        self._request = request
        self._bodies = bodies
        self._response = response
        self._account_id = ""
        self._taken = 0

    def header(self, name: str) -> str | None:
        return self._request.headers.get(name)

    async def body(self, account_id: str) -> bytes:
        body = await read_body(self._request, BODY_BYTES_MAX, self._bodies, account_id)
        self._account_id, self._taken = account_id, len(body)
        return body

    async def deliver(self, reply: Reply) -> None:
        self._response.headers.update(reply.headers)
        self._response.body = reply.body
        await deliver(self._request, self._response, WRITE_REPLY_S)

    def end(self) -> None:
        """The body is needed no more."""
        self._bodies.give_back(self._account_id, self._taken)
