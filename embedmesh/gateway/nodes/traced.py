"""The links to nodes of a gateway that traces: what a traced request asks of a trusted node carries `traceparent`."""

from typing import Any

from embedmesh.gateway.nodes.own import (
    EMBED,
    ENCODE,
    FLOAT32_BYTES,
    REPLY_FRAME_BYTES_MAX,
    Endpoint,
    OwnAttempt,
    OwnLink,
)
from embedmesh.rules.embeddings import Counted, pack_ids
from embedmesh.rules.forwarding import Attempt, AttemptOwner, Part
from embedmesh.rules.models import Model
from embedmesh.rules.traces import traceparent_line
from embedmesh.signing.messages import SignedRequest
from embedmesh.upstream.server import UpstreamServer

LINE_END = b"\r\n"
LENGTH = b"Content-Length: "  # the last line of a head in the compact form


class TracedOwnLink(OwnLink):
    """A node of ours. The line is not signed: who could change it could as well cut the connection."""

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        if not traceparent_line(request_id):
            return super().ask(part, model, counted, request_id, owner)
        connection = self.pool.take()
        if connection is None:
            self.pool.grow()
            return None
        assert counted.ids is not None
        body = ENCODE(pack_ids(model.id, [counted.ids[row] for row in part.rows]))
        limit = len(part.rows) * model.width * FLOAT32_BYTES + REPLY_FRAME_BYTES_MAX
        request, signed = self._request(EMBED, body, request_id, before=False)
        attempt = OwnAttempt(self, connection, signed, body, limit, request_id, owner)
        connection.begin(request, limit, attempt)
        return attempt

    def _request(
        self, what: Endpoint, body: bytes, request_id: str, *, before: bool
    ) -> tuple[bytes, SignedRequest | None]:
        request, signed = super()._request(what, body, request_id, before=before)
        if line := traceparent_line(request_id):
            request = request.replace(LENGTH, line + LENGTH, 1)
        return request, signed


class TracedServer(UpstreamServer):
    """A server of another make."""

    def _request(self, path: str, body: dict[str, Any], accept: str) -> bytes:
        request = super()._request(path, body, accept)
        if line := traceparent_line():
            request = request.replace(LINE_END, LINE_END + line, 1)
        return request
