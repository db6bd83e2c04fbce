"""The links to nodes of our own making: what a gateway sends them, and how it reads their replies.

The form is the compact one of docs/reference/node-protocol.md.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import get_args

import msgspec

from embedmesh.gateway.nodes.told import tokens_told
from embedmesh.rules.embeddings import COMPACT, Counted, EmbedVectors, Ids, ServedModels, pack_ids
from embedmesh.rules.errors import (
    NodeBroke,
    NodeBusy,
    NodeFailure,
    NodeRefused,
    NodeTooSlow,
    WrongAnswer,
)
from embedmesh.rules.forwarding import Attempt, AttemptOwner, Part
from embedmesh.rules.generation import Generating, GenerationRequest, NodeStream
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check
from embedmesh.rules.ports import Clock
from embedmesh.rules.sealed_generation import confidential_path
from embedmesh.signing.messages import RequestSigner, SignedRequest, Unauthenticated
from embedmesh.signing.session import Session
from embedmesh.upstream.http1 import Connection, retry_after_s
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.http1_stream import BodyStream
from embedmesh.upstream.pools import ConnectionPool
from embedmesh.upstream.refusals import check_of

MODELS_REPLY_BYTES_MAX = 1024 * 1024
FLOAT32_BYTES = 4
NO_CHAT = "a node of our own takes chat, completions and images only sealed"
REPLY_FRAME_BYTES_MAX = 4_096  # around the vectors, or of a refusal

Endpoint = tuple[str, str]
EMBED: Endpoint = ("POST", "/v1/embeddings")
MODELS: Endpoint = ("GET", "/v1/models")
SEALED: Endpoint = ("POST", "/v1/confidential/embeddings")
GENERATE: dict[Generating, Endpoint] = {each: ("POST", confidential_path(each)) for each in get_args(Generating)}
HEADS = {
    (method, path): f"{method} {path} HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n".encode("ascii")
    for method, path in (EMBED, MODELS, SEALED, *GENERATE.values())
}
REQUEST = b"%b%bContent-Length: %d\r\n\r\n%b"  # one of HEADS, the signature's headers, the length of the body, that
EMBED_REQUEST = HEADS[EMBED] + b"Content-Length: %d\r\n\r\n%b"  # the same, of one that is not signed
ENCODE = msgspec.msgpack.Encoder().encode
DECODE = msgspec.msgpack.Decoder(EmbedVectors).decode
DECODE_MODELS = msgspec.json.Decoder(ServedModels).decode


Answered = Callable[[str, str, str, int], None]
"""Called with each answer: request id, digests of request and reply as in `Content-Digest`, tokens."""


class Signing:
    """Signs our requests to one node, and checks its replies. `instance` names this process."""

    def __init__(self, node_id: str, instance: str, clock: Clock, answered: Answered) -> None:
        self._node_id = node_id
        self._instance = instance
        self._clock = clock
        self._session = ""
        self._newest: RequestSigner | None = None
        self._before: RequestSigner | None = None
        self.answered = answered

    def add(self, session: Session) -> None:
        """Sign under this session from now on. Replies under way are still checked under theirs."""
        if session.key_id != self._session:  # else its counter would begin again
            self._session, self._before = session.key_id, self._newest
            self._newest = RequestSigner(session, self._node_id, self._instance)

    def is_too_new(self, reply: Http1Reply) -> bool:
        """Whether the newest session may be unknown yet to the node that refused a request: try the one before."""
        return reply.status == 401 and self._before is not None

    def sign(self, what: "Endpoint", body: bytes, request_id: str, *, before: bool = False) -> SignedRequest:
        """Sign a request under the newest session, or under the one before."""
        signer = self._before if before else self._newest
        assert signer is not None  # a link is made with a session
        return signer.sign(*what, body, request_id, self._now_s())

    def check(self, signed: SignedRequest, reply: Http1Reply) -> None:
        """Raises WrongAnswer where the reply is not the node's own to this request."""
        try:
            signed.check_reply(reply.status, reply.body, reply.headers, self._now_s())
        except Unauthenticated as refused:
            words = f"the node's reply is not signed as agreed ({refused.reason})"
            raise WrongAnswer(words, check=Check.SIGNATURE) from None

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000


class OwnLink:
    """A node of our making. Messages are signed, unless the node is on a socket that only we may open."""

    def __init__(self, pool: ConnectionPool, clock: Clock, signing: Signing | None = None) -> None:
        self.pool = pool
        self.signing = signing
        self._clock = clock
        self._again: set[asyncio.Task[None]] = set()

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        assert counted.ids is not None  # the scheduler gives us no other work
        return await self.embed_ids(model, [counted.ids[row] for row in part.rows], request_id)

    async def embed_ids(self, model: Model, inputs: Sequence[Ids], request_id: str) -> EmbedVectors:
        """Vectors for inputs of several requests."""
        limit = len(inputs) * model.width * FLOAT32_BYTES + REPLY_FRAME_BYTES_MAX
        return await self.embed_body(ENCODE(pack_ids(model.id, inputs)), limit, request_id)

    async def embed_body(self, body: bytes, limit: int, request_id: str) -> EmbedVectors:
        """Vectors for a request's body; those of its reply have at most `limit` bytes."""
        reply, signed = await self._exchange(EMBED, body, limit, request_id)
        return self.read(reply, signed, request_id)

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Attempt | None:
        connection = self.pool.take()
        if connection is None:
            self.pool.grow()
            return None
        ids = counted.ids
        assert ids is not None
        body = ENCODE(pack_ids(model.id, ids if len(ids) == 1 else tuple(map(ids.__getitem__, part.rows))))
        limit = len(part.rows) * model.width * FLOAT32_BYTES + REPLY_FRAME_BYTES_MAX
        if self.signing is None:  # the ordinary case, in half the time
            signed, request = None, EMBED_REQUEST % (len(body), body)
        else:
            signed = self.signing.sign(EMBED, body, request_id)
            request = REQUEST % (HEADS[EMBED], signed.headers, len(body), body)
        attempt = OwnAttempt(self, connection, signed, body, limit, request_id, owner)
        connection.begin(request, limit, attempt)
        return attempt

    def begin_again(self, attempt: "OwnAttempt") -> asyncio.Task[None]:
        """Make an attempt once more, with time for it."""
        task = asyncio.get_running_loop().create_task(attempt.embed())
        self._again.add(task)
        task.add_done_callback(self._again.discard)
        return task

    def read(self, reply: Http1Reply, signed: SignedRequest | None, request_id: str) -> EmbedVectors:
        """The vectors of a reply. Raises a NodeFailure."""
        if reply.status != 200 or reply.by_closing or self.signing is not None:
            self._check(reply, signed)
        try:
            vectors = DECODE(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's reply is not of the protocol's form") from None
        if signed is not None:
            self._note(reply, signed, request_id, vectors.tokens)
        return vectors

    async def served(self) -> ServedModels:
        request_id = new_id("req", self._clock)
        reply, signed = await self._exchange(MODELS, b"", MODELS_REPLY_BYTES_MAX, request_id)
        self._check(reply, signed)
        try:
            return DECODE_MODELS(reply.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's list of models is not of the protocol's form") from None

    async def generate(self, model: Model, asked: GenerationRequest) -> bytes:
        raise NodeRefused(NO_CHAT)

    async def stream(self, model: Model, asked: GenerationRequest) -> NodeStream:
        raise NodeRefused(NO_CHAT)

    async def post_sealed(self, body: bytes, limit: int, request_id: str) -> bytes:
        return await self._sealed(SEALED, body, limit, request_id)

    async def generate_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> bytes:
        return await self._sealed(GENERATE[modality], body, limit, request_id)

    async def stream_sealed(self, modality: Generating, body: bytes, limit: int, request_id: str) -> BodyStream:
        what = GENERATE[modality]
        for before in (False, True):
            stream = await self.pool.stream(lambda: self._request(what, body, request_id, before=before)[0], limit)  # noqa: B023 - called at once
            if stream.status == 200:
                return stream  # unsigned: each of its events is signed by the node's identity
            refused = Http1Reply(stream.status, stream.headers, b"")
            stream.close()
            if before or self.signing is None or not self.signing.is_too_new(refused):
                check_status(refused)
        raise NodeBroke("the node does not know the session")

    async def _sealed(self, what: Endpoint, body: bytes, limit: int, request_id: str) -> bytes:
        reply, signed = await self._exchange(what, body, limit, request_id)
        self._check(reply, signed)
        if signed is not None and (tokens := tokens_told(reply.body)):  # what was refused has no receipt
            self._note(reply, signed, request_id, tokens)
        return reply.body

    def close(self) -> None:
        self.pool.close()

    async def _exchange(
        self, what: Endpoint, body: bytes, limit: int, request_id: str
    ) -> tuple[Http1Reply, SignedRequest | None]:
        """A reply, not checked, and its request. Raises a NodeFailure."""
        signing = self.signing
        signed: SignedRequest | None = None
        before = False

        def build() -> bytes:
            nonlocal signed
            request, signed = self._request(what, body, request_id, before=before)
            return request

        reply = await self.pool.exchange(build, limit)
        if signing is not None and signing.is_too_new(reply):
            before = True
            reply = await self.pool.exchange(build, limit)
        return reply, signed

    def _request(
        self, what: Endpoint, body: bytes, request_id: str, *, before: bool
    ) -> tuple[bytes, SignedRequest | None]:
        """A request's bytes, signed under the newest session or the one before."""
        signed = None if self.signing is None else self.signing.sign(what, body, request_id, before=before)
        return REQUEST % (HEADS[what], b"" if signed is None else signed.headers, len(body), body), signed

    def _note(self, reply: Http1Reply, signed: SignedRequest, request_id: str, tokens: int) -> None:
        """For the comparison with the node's receipts."""
        if self.signing is not None:
            reply_digest = reply.headers[b"content-digest"].decode("ascii")
            self.signing.answered(request_id, signed.digest, reply_digest, tokens)

    def _check(self, reply: Http1Reply, signed: SignedRequest | None) -> None:
        """Raises a NodeFailure unless the reply is of status 200 and, where we sign, signed."""
        if reply.by_closing:
            raise NodeBroke("the node closed the connection")  # our nodes always send Content-Length
        check_status(reply)  # unsigned: a forger could as well cut the connection
        if self.signing is not None and signed is not None:
            self.signing.check(signed, reply)


class OwnAttempt(msgspec.Struct, eq=False):
    """An attempt at a node of ours that was begun at once. Implements `Attempt` and `Receiver`."""

    link: OwnLink
    connection: Connection | None  # until it has replied
    signed: SignedRequest | None
    body: bytes
    limit: int
    request_id: str
    owner: AttemptOwner
    again: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        if (connection := self.connection) is not None:
            self.connection = None
            connection.cancel()
            self.link.pool.put_back(connection)
        if self.again is not None:
            self.again.cancel()

    def replied(self, reply: Http1Reply) -> None:
        connection, self.connection, link = self.connection, None, self.link
        assert connection is not None
        link.pool.put_back(connection)
        if link.signing is not None and link.signing.is_too_new(reply):
            self.again = link.begin_again(self)
            return
        try:
            vectors = link.read(reply, self.signed, self.request_id)
        except NodeFailure as failure:
            self.owner.failed(failure)
        else:
            self.owner.answered(vectors)

    def broke(self, failure: NodeFailure) -> None:
        connection, self.connection, link = self.connection, None, self.link
        assert connection is not None
        link.pool.put_back(connection)
        if connection.heard:
            self.owner.failed(failure)
        else:
            self.again = link.begin_again(self)  # the idle connection was closed: embedding twice does no harm

    async def embed(self) -> None:
        """Once more, on any connection."""
        try:
            vectors = await self.link.embed_body(self.body, self.limit, self.request_id)
        except NodeFailure as failure:
            self.owner.failed(failure)
        else:
            self.owner.answered(vectors)


def check_status(reply: Http1Reply) -> None:
    """Raises the failure that a status other than 200 means."""
    if reply.status == 200:
        return
    if reply.status in (404, 408, 429, 503):  # 404: it has unloaded the model a moment ago
        raise NodeBusy(f"the node answered {reply.status}", retry_after_s=retry_after_s(reply.headers))
    if 400 <= reply.status < 500:
        raise NodeRefused(f"the node answered {reply.status}", check=check_of(reply.status))
    if reply.status == 504:
        raise NodeTooSlow("the node's own time for the call was over")
    raise NodeBroke(f"the node answered {reply.status}", check=check_of(reply.status))
