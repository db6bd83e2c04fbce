"""The links to all nodes: whatever a node is, it is asked in the same way."""

from collections.abc import Callable
from typing import Protocol

from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModels
from embedmesh.rules.errors import NodeUnreachable
from embedmesh.rules.forwarding import NodeLink, Part
from embedmesh.rules.generation import Generating, GenerationRequest, NodeStream
from embedmesh.rules.models import Model
from embedmesh.upstream.http1_stream import BodyStream


class Link(NodeLink, Protocol):
    """One node as a gateway talks to it."""

    async def served(self) -> ServedModels:
        """What the node offers. Raises a NodeFailure."""
        ...

    async def generate(self, model: Model, asked: GenerationRequest) -> bytes:
        """As `GeneratingClient.generate`."""
        ...

    async def stream(self, model: Model, asked: GenerationRequest) -> NodeStream:
        """As `GeneratingClient.stream`."""
        ...

    async def post_sealed(self, body: bytes, limit: int, request_id: str) -> bytes:
        """The answer, of at most `limit` bytes, to a confidential request. Raises a NodeFailure."""
        ...

    async def generate_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> bytes:
        """The same of chat, completions and images."""
        ...

    async def stream_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> BodyStream:
        """The same as a stream, read as it comes."""
        ...

    def close(self) -> None:
        """Drop its idle connections."""
        ...


class NodeClients:
    """The links to all nodes, by id. Implements the ports `NodeClient` and `GeneratingClient`."""

    def __init__(self) -> None:
        self._links: dict[str, Link] = {}
        self.link_to: Callable[[str], Link | None] = self._links.get  # of the port, without a call of ours

    def add(self, node_id: str, link: Link) -> None:
        """Use this link for a node from now on."""
        self.remove(node_id)
        self._links[node_id] = link

    def remove(self, node_id: str) -> None:
        """Close a node's link."""
        if (link := self._links.pop(node_id, None)) is not None:
            link.close()

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        return await self._link(part.node_id).embed(part, model, counted, request_id)

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        return await self._link(part.node_id).generate(model, asked)

    async def stream(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> NodeStream:
        return await self._link(part.node_id).stream(model, asked)

    async def served(self, node_id: str) -> ServedModels:
        """What a node offers. Raises a NodeFailure."""
        return await self._link(node_id).served()

    async def post_sealed(self, node_id: str, body: bytes, limit: int, request_id: str) -> bytes:
        """A node's answer, of at most `limit` bytes, to a confidential request. Raises a NodeFailure."""
        return await self._link(node_id).post_sealed(body, limit, request_id)

    async def generate_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> bytes:
        """The same of chat, completions and images."""
        return await self._link(node_id).generate_sealed(modality, body, limit, request_id)

    async def stream_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> BodyStream:
        """The same as a stream, read as it comes."""
        return await self._link(node_id).stream_sealed(modality, body, limit, request_id)

    def close(self) -> None:
        """Drop every idle connection."""
        for link in self._links.values():
            link.close()

    def _link(self, node_id: str) -> Link:
        link = self._links.get(node_id)
        if link is None:
            raise NodeUnreachable("the node was removed")
        return link
