"""What a gateway says to nodes, and how it reads their answers: the compact form of the node protocol.

docs/reference/node-protocol.md. How a node is reached, and whether both sides sign what they say, is its link's.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from embedmesh.gateway.nodes.http1 import Reply, Wires, busy
from embedmesh.rules.embeddings import COMPACT, Counted, EmbedVectors, ServedModels, pack_ids
from embedmesh.rules.errors import NodeBroke, NodeRefused, NodeTooSlow, NodeUnreachable, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Clock
from embedmesh.signing.messages import RequestSigner, SignedRequest, Unauthenticated
from embedmesh.signing.session import Session

SMALL_REPLY_BYTES_MAX = 1024 * 1024  # a list of models
BYTES_PER_COMPONENT = 4
BYTES_PER_REPLY = 4_096  # around the vectors, or of a refusal


class Link(Protocol):
    """One node as a gateway talks to it."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
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

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        return await self._link(part.node_id).embed(part, model, counted, request_id)

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


Answered = Callable[[str, str, str, int], None]
"""Told of each answer: request id, digests of request and reply as in `Content-Digest`, tokens."""


class Signing:
    """How what we say to one node is signed, and what it says is checked. `instance` names this process."""

    def __init__(self, node_id: str, instance: str, clock: Clock, answered: Answered) -> None:
        self._node_id = node_id
        self._instance = instance
        self._clock = clock
        self._session = ""
        self._newest: RequestSigner | None = None
        self._before: RequestSigner | None = None
        self.answered = answered

    def add(self, session: Session) -> None:
        """Sign under this session from now on; who waits for an answer still checks it under its own."""
        if session.key_id != self._session:  # or its counter would begin again
            self._session, self._before = session.key_id, self._newest
            self._newest = RequestSigner(session, self._node_id, self._instance)

    @property
    def has_before(self) -> bool:
        """Whether there was a session before the newest."""
        return self._before is not None

    def sign(self, method: str, path: str, body: bytes, request_id: str, *, before: bool = False) -> SignedRequest:
        """Sign a request under the newest session, or under the one before."""
        signer = self._before if before else self._newest
        assert signer is not None  # a link is made with a session
        return signer.sign(method, path, body, request_id, self._now_s())

    def check(self, signed: SignedRequest, reply: Reply) -> None:
        """Raises WrongAnswer where the reply is not the node's to this very request."""
        try:
            signed.check_reply(reply.status, reply.body, reply.headers, self._now_s())
        except Unauthenticated as refused:
            words = f"the node's reply is not signed as agreed ({refused.reason})"
            raise WrongAnswer(words, check=Check.SIGNATURE) from None

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000


class OwnLink:
    """A node of our making, over some wires; signed, where it is not on a socket that only we may open."""

    def __init__(self, wires: Wires, clock: Clock, signing: Signing | None = None) -> None:
        self._wires = wires
        self._clock = clock
        self._signing = signing
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode_reply = msgspec.msgpack.Decoder(EmbedVectors).decode
        self._decode_models = msgspec.json.Decoder(ServedModels).decode

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.ids is not None  # the line gives us no other work
        return await self.embed_ids(model, [counted.ids[place] for place in part.places], request_id)

    async def embed_ids(self, model: Model, asked: Sequence[Sequence[int]], request_id: str) -> EmbedVectors:
        """Vectors for inputs that are no part of one request."""
        body = self._encode(pack_ids(model.id, asked))
        limit = len(asked) * model.width * BYTES_PER_COMPONENT + BYTES_PER_REPLY
        reply, signed = await self._exchange("POST", "/v1/embeddings", body, limit, request_id)
        try:
            vectors = self._decode_reply(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's reply is not of the protocol's form") from None
        if self._signing is not None and signed is not None:
            reply_digest = reply.headers[b"content-digest"].decode("ascii")
            self._signing.answered(request_id, signed.digest, reply_digest, vectors.tokens)
        return vectors

    async def served(self) -> ServedModels:
        request_id = new_id("req", self._clock)
        reply, _ = await self._exchange("GET", "/v1/models", b"", SMALL_REPLY_BYTES_MAX, request_id)
        try:
            return self._decode_models(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's list of models is not of the protocol's form") from None

    def close(self) -> None:
        self._wires.close()

    async def _exchange(
        self, method: str, path: str, body: bytes, limit: int, request_id: str
    ) -> tuple[Reply, SignedRequest | None]:
        """A reply of status 200, and the request that it answers. Raises a NodeFailure."""
        signing = self._signing
        signed: SignedRequest | None = None
        before = False

        def build() -> bytes:
            nonlocal signed
            if signing is not None:
                signed = signing.sign(method, path, body, request_id, before=before)
            head = f"{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n"
            end = b"Content-Length: %d\r\n\r\n" % len(body)
            return head.encode("ascii") + (signed.headers if signed is not None else b"") + end + body

        reply = await self._wires.exchange(build, limit)
        if reply.status == 401 and signing is not None and signing.has_before:
            before = True  # we know of a new session a little earlier than the node
            reply = await self._wires.exchange(build, limit)
        if reply.by_closing:
            raise NodeBroke("the node closed the connection")  # ours always say how long their reply is
        check_status(reply)  # a refusal needs no signature: whoever could forge it could as well cut the connection
        if signing is not None and signed is not None:
            signing.check(signed, reply)
        return reply, signed


def check_status(reply: Reply) -> None:
    """Raises what a status other than 200 means."""
    if reply.status == 200:
        return
    if reply.status in (404, 408, 429, 503):  # 404: it has unloaded the model, and we have not heard of it yet
        raise busy(reply)
    if 400 <= reply.status < 500:
        raise NodeRefused(f"the node answered {reply.status}", check=check_of(reply.status))
    if reply.status == 504:
        raise NodeTooSlow("the node's own time for the call was over")
    raise NodeBroke(f"the node answered {reply.status}", check=check_of(reply.status))


def check_of(status: int) -> Check:
    """Which check a status that is neither success nor load fails."""
    if status in (401, 403):
        return Check.ACCESS
    return {4: Check.STATUS_4XX, 5: Check.STATUS_5XX}.get(status // 100, Check.STATUS_OTHER)
