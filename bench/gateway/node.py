"""A cheap node that signs what it says, or does not: `python -m bench.gateway.node PATH signed|plain VECTOR MODELS`.

`ends` cannot sign. Both forms are this same process, so that what differs is the signatures alone.
"""

import asyncio
import socket
import sys
from pathlib import Path

import msgspec
import uvloop
from aiohttp import web

from embedmesh.http.receive import BodyBudget, read_body
from embedmesh.http.server import HttpServer
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import COMPACT, EmbedIds, EmbedVectors, unpack_ids
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX
from embedmesh.signing.messages import RequestChecker
from embedmesh.signing.session import Session

SESSION = Session("0123456789abcdef", bytes(range(32)))  # both sides know it: the bench is about cost
NODE_ID = "node_" + 32 * "0"
SPECIALS = 2


class CheapNode:
    """Answers with the same vector for every input."""

    def __init__(self, signed: bool, vector: bytes, models: bytes) -> None:
        self._vector, self._models = vector, models
        self._clock = SystemClock()
        self._bodies = BodyBudget(1 << 30)
        self._checker: RequestChecker | None = None
        if signed:
            self._checker = RequestChecker(NODE_ID)
            self._checker.add(SESSION, self._now_s())

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """The compact form."""
        body = await read_body(request, REQUEST_BODY_BYTES_MAX, self._bodies, content_type=COMPACT)
        self._bodies.give_back("", len(body))
        ids = unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds))
        tokens = sum(len(each) + SPECIALS for each in ids)
        answer = msgspec.msgpack.encode(EmbedVectors(tokens, self._vector * len(ids)))
        return self._signed(request, body, web.Response(body=answer, headers={"Content-Type": COMPACT}))

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        """What it serves."""
        return self._signed(request, b"", web.Response(body=self._models, headers={"Content-Type": "application/json"}))

    def _signed(self, request: web.BaseRequest, body: bytes, response: web.Response) -> web.Response:
        if self._checker is not None:
            headers = {name.lower(): value for name, value in request.headers.items()}
            checked = self._checker.check_head(request.method, request.rel_url.raw_path, headers, self._now_s())
            checked.check_body(body, self._now_s())
            assert isinstance(response.body, bytes)
            response.headers.extend(checked.sign_reply(200, response.body, 0, self._now_s()))
        return response

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000


async def serve(path: str, node: CheapNode) -> None:
    """For ever."""
    server = HttpServer({"/v1/embeddings": {"POST": node.embeddings}, "/v1/models": {"GET": node.models}})
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    await server.start(sock)
    await asyncio.Event().wait()


if __name__ == "__main__":
    path, form, vector, models = sys.argv[1:]
    reply = Path(models).read_bytes()
    uvloop.run(serve(path, CheapNode(form == "signed", Path(vector).read_bytes(), reply.partition(b"\r\n\r\n")[2])))
