"""`/v1/nodes/lock` and `/v1/confidential/embeddings`: adapt HTTP to the flow; no rule lives here."""

from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from aiohttp import web
from msgspec import Meta

from embedmesh.dialects import confidential
from embedmesh.flow.confidential import ConfidentialEmbeddings, SealedNodes
from embedmesh.flow.generate import GENERATE_SCOPE
from embedmesh.flow.lock import lock_node
from embedmesh.flow.lock_ahead import Opened
from embedmesh.flow.world import World
from embedmesh.gateway.api.embeddings_api import EMBEDDING_HEADERS, EmbeddingsApi, EmbeddingUsage
from embedmesh.gateway.api.metrics import CountedRequest
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import Api, ApiCall, ApiReply, RawHandler, Route, admit
from embedmesh.http.bodies import SMALL_BODIES_BYTES_TOTAL_MAX, decoded
from embedmesh.http.exchange import Exchange
from embedmesh.http.failures import TABLE, status_and_type
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.confidential import (
    HPKE_SCHEME,
    NODES_LOCKED_MAX,
    SDK_SCHEME,
    Locks,
    LockTerms,
    Scheme,
    SealedAnswer,
    SealedCall,
    SealingNode,
    SignedKeys,
)
from embedmesh.rules.errors import (
    BodyTooLarge,
    Failure,
    InsufficientQuota,
    InvalidValue,
    MethodNotAllowed,
    ModelNotFound,
    NoNodeAvailable,
    NotFound,
    Overloaded,
    RateLimited,
    StoreUnavailable,
    UnsupportedModality,
)
from embedmesh.rules.exchange import NEXT_LOCK_HEADER, Reply
from embedmesh.rules.limits import LOCK_S, LOCK_TOKENS, LOCKS_OF_ACCOUNT_MAX, LOCKS_OF_KEY_MAX, SMALL_BODY_BYTES_MAX
from embedmesh.rules.lock_failures import ConfidentialRefused
from embedmesh.rules.ports import EMBED_SCOPE, Caller
from embedmesh.rules.shares import Room

LOCK_PATH, SEALED_PATH = "/v1/nodes/lock", "/v1/confidential/embeddings"

NodeName = Annotated[str, Meta(max_length=64)]
Base64 = Annotated[str, Meta(extra_json_schema={"contentEncoding": "base64"})]


class LockRequest(msgspec.Struct, frozen=True):
    """What to lock: a node that serves the model, for how many tokens at most, for how many seconds."""

    model: Annotated[str, Meta(min_length=1, max_length=200)]
    max_num_tokens: int | None = None
    timeout: int | None = None
    scheme: Scheme | None = None
    nodes: (
        Annotated[
            tuple[NodeName, ...],
            Meta(max_length=NODES_LOCKED_MAX, description="Nodes that you would seal for; else any."),
        ]
        | None
    ) = None


class NodeLock(msgspec.Struct, frozen=True):
    """A lock: under which key of which node to seal one request."""

    public_key: Annotated[bytes, doc("The node's key for this scheme, 32 bytes.")]
    node_small_id: Count
    stack_small_id: Annotated[Count, doc("The lock's id, for the request.")]
    stack_entry_digest: None
    scheme: Scheme
    model: Annotated[str, doc("The model's id.")]
    max_num_tokens: Count
    expires_ms: Annotated[Count, doc("Until when the lock can be used, Unix time in milliseconds.")]
    keys: Annotated[SignedKeys, doc("The node's keys, as its identity has signed them.")]


class SealedReply(msgspec.Struct, frozen=True):
    """A sealed reply, and what the node has signed about it. Three members are those of the SDKs' scheme."""

    ciphertext: Base64
    usage: EmbeddingUsage
    statement: Annotated[Base64, doc("JSON: lock, digests of request and reply, status, tokens.")]
    statement_signature: Annotated[Base64, doc("By the node's identity, Ed25519.")]
    nonce: Base64 | None = None
    response_hash: Base64 | None = None
    signature: Base64 | None = None
    next_lock: Annotated[NodeLock | msgspec.UnsetType, doc("For your next request, if you asked for one.")] = (
        msgspec.UNSET
    )


NEXT_LOCK = {
    "name": NEXT_LOCK_HEADER,
    "in": "header",
    "required": False,
    "description": "For how many tokens you would like a lock for your next request, and behind that number, if only "
    "some nodes will do, the ids of those. It comes in the reply as `next_lock`, if it can be had by then. Only for "
    f"the scheme `{HPKE_SCHEME}`.",
    "schema": {"type": "string", "pattern": r"^[0-9]{1,9}( \S{1,64})*$"},
    "example": "256",
}


class EnvelopeForm:
    """Implements `flow.confidential.EnvelopeDialect`."""

    plaintext_bytes_max = staticmethod(confidential.plaintext_bytes_max)

    def render(
        self, scheme: str, answer: SealedAnswer, tokens: int, headers: dict[str, str], ahead: Opened | None
    ) -> Reply:
        next_lock = None if ahead is None else msgspec.json.encode(_node_lock(*ahead))
        return confidential.render(scheme, answer, tokens, headers, next_lock)

    def parse(self, body: bytes) -> SealedCall:
        return confidential.parse(body)[1]

    def refusal(self, failure: Failure) -> bytes:
        scheme, answer = SDK_SCHEME, None
        if isinstance(failure, ConfidentialRefused) and failure.answer is not None:
            scheme, answer = failure.answer
        return confidential.refusal(failure, status_and_type(failure)[1], scheme, answer)


class ConfidentialApi(Api):
    """What callers ask that do not show the gateway their texts."""

    TAG = "Confidential embeddings"

    def __init__(self, world: World, embeddings: EmbeddingsApi, room: Room, locks: Locks, nodes: SealedNodes) -> None:
        """`room` is that of all requests under way: each lock is a write that others' requests wait for, too."""
        self._world = world
        self._room = room
        self._embeddings = embeddings
        self._locks = locks
        self._nodes = nodes
        self._operation = ConfidentialEmbeddings(EnvelopeForm(), locks, nodes, EMBED_SCOPE)
        self.bodies = BodyBudget(SMALL_BODIES_BYTES_TOTAL_MAX)

    async def lock_node(self, call: ApiCall[LockRequest, None]) -> NodeLock:
        """Lock a node.

        Sets money aside for one confidential request to one node, and says under which of its keys to seal it. A lock
        that is not used is released when it expires.
        """
        return await self._locked(call.body, call.caller)

    async def answer_lock(self, exchange: Exchange) -> None:
        """Lock a node, on the fast path."""
        with CountedRequest(self._embeddings.metrics.route(LOCK_PATH)):
            caller = await admit(exchange.header, (EMBED_SCOPE,), self._world.keys, self._world.rate_limits)
            body = await exchange.body(caller.account_id)
            if len(body) > SMALL_BODY_BYTES_MAX:
                raise BodyTooLarge(f"The body is larger than {SMALL_BODY_BYTES_MAX:,} bytes.")
            lock = await self._locked(decoded(body, LockRequest), caller)
            await exchange.deliver(Reply({}, msgspec.json.encode(lock)))

    async def _locked(self, asked: LockRequest, caller: Caller) -> NodeLock:
        self._room.take(caller.account_id)
        try:
            terms, node = await lock_node(
                self._world,
                self._locks,
                self._nodes,
                caller,
                asked.model,
                LOCK_TOKENS if asked.max_num_tokens is None else asked.max_num_tokens,
                LOCK_S if asked.timeout is None else asked.timeout,
                asked.scheme or SDK_SCHEME,
                None if asked.nodes is None else frozenset(asked.nodes),
            )
        finally:
            self._room.give_back(caller.account_id)
        return _node_lock(terms, node)

    async def create_confidential_embeddings(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create confidential embeddings.

        The request is sealed for the node that was locked, and so is the reply for you: this gateway carries both and
        reads neither. You pay for the tokens that the node has counted and signed, at most the lock's. The same body
        again gets the same reply without a second charge.
        """
        return await self._embeddings.exchange(request, self._operation, SEALED_PATH)

    def fast(self) -> dict[bytes, Callable[[Exchange], Awaitable[None]]]:
        """What the fast path takes, too, by the first line of a request."""
        return {
            b"POST /v1/nodes/lock HTTP/1.1\r\n": self.answer_lock,
            b"POST /v1/confidential/embeddings HTTP/1.1\r\n": self.answer,
        }

    async def answer(self, exchange: Exchange) -> None:
        """Answer one sealed request, on the fast path."""
        await self._embeddings.answer(exchange, operation=self._operation, path=SEALED_PATH)

    ROUTES = (
        Route(
            "POST",
            LOCK_PATH,
            (EMBED_SCOPE, GENERATE_SCOPE),
            lock_node,
            failures=(
                InvalidValue,
                UnsupportedModality,
                ModelNotFound,
                NoNodeAvailable,
                InsufficientQuota,
                Overloaded,
                RateLimited,
                StoreUnavailable,
            ),
            details=f"At one time a key may have {LOCKS_OF_KEY_MAX} locks open, an account {LOCKS_OF_ACCOUNT_MAX}.",
        ),
        Route(
            "POST",
            SEALED_PATH,
            (EMBED_SCOPE,),
            create_confidential_embeddings,
            failures=tuple(failure for failure in TABLE if failure not in (NotFound, MethodNotAllowed)),
            raw=RawHandler(
                {200: ApiReply("A sealed reply.", SealedReply, headers=EMBEDDING_HEADERS)},
                confidential.Envelope,
                key_checked_by_flow=True,
                extra={"parameters": [NEXT_LOCK]},
            ),
        ),
    )


def _node_lock(terms: LockTerms, node: SealingNode) -> NodeLock:
    return NodeLock(
        public_key=terms.node_key,
        node_small_id=node.small_id,
        stack_small_id=terms.lock_id,
        stack_entry_digest=None,
        scheme=terms.scheme,
        model=terms.model,
        max_num_tokens=terms.units,
        expires_ms=terms.expires_ms,
        keys=node.signed,
    )
