"""What a gateway says to nodes, and how it reads their answers: the compact form of the node protocol.

docs/reference/node-protocol.md. How a node is reached, and whether both sides sign what they say, is its link's.
"""

from typing import Protocol

import msgspec

from embedmesh.edge.wire import Reply, Wires, busy
from embedmesh.rules.embeddings import COMPACT, Counted, EmbedVectors, ServedModels, pack_ids
from embedmesh.rules.errors import NodeBroke, NodeRefused, NodeUnreachable, WrongAnswer
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Part

SMALL_REPLY_BYTES_MAX = 1024 * 1024  # a list of models
BYTES_PER_COMPONENT = 4
BYTES_PER_REPLY = 4_096  # around the vectors, or of a refusal


class Link(Protocol):
    """One node as a gateway talks to it."""

    async def embed(self, part: Part, model: Model, counted: Counted) -> EmbedVectors:
        """Vectors for a part. Raises a NodeFailure; the answer is not yet checked against the question."""
        ...

    async def served(self) -> ServedModels:
        """What the node offers. Raises a NodeFailure."""
        ...

    def close(self) -> None:
        """Drop its idle connections."""
        ...


class NodeClients:
    """The links to all nodes, by id. Implements the port `NodeClient`."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}

    def add(self, node_id: str, link: Link) -> None:
        """Talk to that node by this link from now on."""
        self.remove(node_id)
        self._links[node_id] = link

    def remove(self, node_id: str) -> None:
        """Talk to it no more."""
        if (link := self._links.pop(node_id, None)) is not None:
            link.close()

    async def embed(self, part: Part, model: Model, counted: Counted) -> EmbedVectors:
        return await self._link(part.node_id).embed(part, model, counted)

    async def served(self, node_id: str) -> ServedModels:
        """What a node offers. Raises a NodeFailure."""
        return await self._link(node_id).served()

    def close(self) -> None:
        """Drop every idle connection."""
        for link in self._links.values():
            link.close()

    def _link(self, node_id: str) -> Link:
        link = self._links.get(node_id)
        if link is None:
            raise NodeUnreachable("the node was removed")
        return link


class OwnLink:
    """A node of our making, over some wires."""

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_reply = msgspec.msgpack.Decoder(EmbedVectors).decode
        self._decode_models = msgspec.json.Decoder(ServedModels).decode

    async def embed(self, part: Part, model: Model, counted: Counted) -> EmbedVectors:
        assert counted.ids is not None  # the line gives us no other work
        asked = [counted.ids[place] for place in part.places]
        body = self._encode(pack_ids(model.id, asked))
        limit = len(asked) * model.width * BYTES_PER_COMPONENT + BYTES_PER_REPLY
        reply = await self._exchange("POST", "/v1/embeddings", body, limit)
        try:
            return self._decode_reply(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's reply is not of the protocol's form") from None

    async def served(self) -> ServedModels:
        reply = await self._exchange("GET", "/v1/models", b"", SMALL_REPLY_BYTES_MAX)
        try:
            return self._decode_models(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's list of models is not of the protocol's form") from None

    def close(self) -> None:
        self._wires.close()

    async def _exchange(self, method: str, path: str, body: bytes, limit: int) -> Reply:
        """A reply of status 200. Raises a NodeFailure."""

        def build() -> bytes:
            head = (
                f"{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\nContent-Length: {len(body)}\r\n"
            )
            return head.encode("ascii") + b"\r\n" + body

        reply = await self._wires.exchange(build, limit)
        check_status(reply)
        return reply


def check_status(reply: Reply) -> None:
    """Raises what a status other than 200 means."""
    if reply.status == 200:
        return
    if reply.status in (404, 408, 429, 503):  # 404: it has unloaded the model, and we have not heard of it yet
        raise busy(reply)
    if 400 <= reply.status < 500:
        raise NodeRefused(f"the node answered {reply.status}")
    raise NodeBroke(f"the node answered {reply.status}")
