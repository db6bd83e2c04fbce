"""One request and its reply, over the fast path or the general server."""

from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from embedmesh.http.aiohttp_connection import deliver
from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.rendering import REPLY_HEADERS, REQUEST_ID
from embedmesh.http.request_notes import note_reply
from embedmesh.http.streaming import stream
from embedmesh.rules.exchange import REQUEST_HEADER, Delivery, Reply, StreamedReply
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX, WRITE_REPLY_S
from embedmesh.rules.request_record import CURRENT


class Exchange(Protocol):
    """What a handler needs of HTTP."""

    @property
    def own_id(self) -> str | None:
        """The id that we gave the request; None if its caller brought one, which is only echoed."""

    def header(self, name: str) -> str | None:
        """The header of that name in lower case."""

    async def body(self, account_id: str) -> bytes:
        """The whole body, in the account's share of the room for bodies. Raises what `read_body` raises."""

    async def deliver(self, reply: Reply | StreamedReply) -> Delivery:
        """See the port `Deliver`. Raises ConnectionError where nothing of the body was handed to the socket."""
        ...


@dataclass(eq=False)
class GeneralExchange:
    """Over the general server. The handler returns `response` in the end.

    The caller has `write_s` seconds to read a reply, or each part of a stream."""

    request: web.BaseRequest
    bodies: BodyBudget
    response: web.StreamResponse
    write_s: float = WRITE_REPLY_S
    _account_id: str = field(default="", init=False)
    _taken: int = field(default=0, init=False)

    @property
    def own_id(self) -> str | None:
        request_id = self.request[REQUEST_ID]
        return None if request_id == self.request.headers.get("x-request-id") else request_id

    def header(self, name: str) -> str | None:
        return self.request.headers.get(name)

    async def body(self, account_id: str) -> bytes:
        body = await read_body(self.request, REQUEST_BODY_BYTES_MAX, self.bodies, account_id)
        self._account_id, self._taken = account_id, len(body)
        return body

    async def deliver(self, reply: Reply | StreamedReply) -> Delivery:
        if (record := CURRENT.get()) is not None:
            note_reply(record, reply.headers, len(reply.body) if isinstance(reply, Reply) else 0)
        if self.own_id is not None and REQUEST_HEADER in reply.headers:
            self.request[REPLY_HEADERS]["x-request-id"] = reply.headers[REQUEST_HEADER]
        if isinstance(reply, StreamedReply):
            self.response = web.StreamResponse(headers={"Content-Type": reply.content_type, **reply.headers})
            return await stream(self.request, self.response, reply, self.write_s)
        assert isinstance(self.response, web.Response)
        self.response.headers.update(reply.headers)
        self.response.body = reply.body
        return await deliver(self.request, self.response, self.write_s)

    def end(self) -> None:
        """The body is no longer needed."""
        self.bodies.give_back(self._account_id, self._taken)
