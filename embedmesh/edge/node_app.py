"""The node's HTTP: the node protocol (docs/reference/node-protocol.md) over whatever socket it is given."""

import time
from base64 import b64encode
from collections.abc import Sequence

import msgspec
from aiohttp import web

from embedmesh.edge.failures import failure_response
from embedmesh.edge.node_metrics import NodeMetrics
from embedmesh.edge.receive import BodyBudget, read_json_body
from embedmesh.edge.server import Routes
from embedmesh.engine.served import Served
from embedmesh.rules import errors
from embedmesh.rules.embeddings import (
    BODY_BYTES_MAX,
    EmbedItem,
    EmbedReply,
    EmbedRequest,
    EmbedUsage,
    ServedModel,
    ServedModels,
)

JSON = {"Content-Type": "application/json"}
TOO_MANY_REQUESTS = 429  # what the protocol says of a full queue; the public API has its own number for it


class NodeApp:
    """Handlers over the models of one node."""

    def __init__(self, served: Sequence[Served], metrics: NodeMetrics, bodies: BodyBudget) -> None:
        self._served = served
        self._by_name = {name: one for one in served for name in (one.model.id, *one.model.aliases)}
        self._metrics = metrics
        self._bodies = bodies

    def routes(self) -> Routes:
        """Path -> method -> handler."""
        return {
            "/v1/embeddings": {"POST": self.embeddings},
            "/v1/models": {"GET": self.models},
            "/health": {"GET": self.health},
            "/readyz": {"GET": self.readyz},
            "/metrics": {"GET": self.show_metrics},
        }

    async def embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Embed. A caller who hangs up cancels this, and its waiting work leaves the queue."""
        body = await read_json_body(request, BODY_BYTES_MAX, self._bodies)
        try:
            return await self._embed(decode_request(body))
        except errors.Overloaded as failure:
            response = failure_response(failure)
            response.set_status(TOO_MANY_REQUESTS)
            return response
        finally:
            self._bodies.give_back(len(body))

    async def _embed(self, asked: EmbedRequest) -> web.Response:
        begun = time.monotonic()
        served = self._by_name.get(asked.model)
        if served is None:
            message = "This node does not serve that model; GET /v1/models lists what it serves."
            raise errors.ModelNotFound(message, param="model")
        sequences = await served.prepare(asked.input)
        try:
            vectors = await served.embed(sequences)
        except errors.Overloaded:
            self._metrics.refused(served.model.id)
            raise
        tokens = sum(map(len, sequences))
        self._metrics.answered(served.model.id, len(vectors), tokens, time.monotonic() - begun)
        items = [EmbedItem(at, b64encode(vector).decode("ascii")) for at, vector in enumerate(vectors)]
        return _json(EmbedReply(items, asked.model, EmbedUsage(tokens, tokens)))

    async def models(self, request: web.BaseRequest) -> web.StreamResponse:
        """What this node serves. The digest is the catalogue's, which the worker has compared with the files."""
        models = [one.model for one in self._served]
        return _json(ServedModels([ServedModel(m.id, m.width, m.max_tokens, m.digest, m.tier) for m in models]))

    async def health(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 while the process answers."""
        return _json({"message": "ok"})

    async def readyz(self, request: web.BaseRequest) -> web.StreamResponse:
        """200 while each model embedded something within the last two seconds; else 503 and which did not."""
        waiting = [one.model.id for one in self._served if not one.ready()]
        if waiting:
            raise errors.NoNodeAvailable(f"Not ready: {', '.join(waiting)}.")
        return _json({"message": "ready"})

    async def show_metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        """Prometheus text."""
        for one in self._served:
            self._metrics.state(one.model.id, waiting_tokens=one.waiting_tokens, ready=one.ready())
        body, content_type = self._metrics.text()
        return web.Response(body=body, headers={"Content-Type": content_type})


def decode_request(body: bytes) -> EmbedRequest:
    """The request in a body. Raises InvalidJson, InvalidType or InvalidValue, without quoting the body."""
    try:
        asked = msgspec.json.decode(body, type=EmbedRequest)
    except msgspec.ValidationError:
        raise errors.InvalidType("The body is not an embeddings request of the node protocol.") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise errors.InvalidJson("The body is not JSON.") from None
    if asked.encoding_format != "base64":
        message = 'A node answers in base64; leave encoding_format out or set it to "base64".'
        raise errors.InvalidValue(message, param="encoding_format")
    return asked


def _json(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), headers=JSON)
