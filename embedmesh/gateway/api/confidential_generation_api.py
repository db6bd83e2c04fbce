"""Confidential chat, completions and images: adapts HTTP to the flow; no rule lives here."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

import msgspec
from aiohttp import web

from embedmesh.dialects import confidential, confidential_generation
from embedmesh.flow.confidential_generation import ConfidentialGeneration
from embedmesh.flow.generate import GENERATE_SCOPE
from embedmesh.flow.leases import Leases
from embedmesh.gateway.api.confidential_api import Base64, EnvelopeForm
from embedmesh.gateway.api.embeddings_api import EmbeddingsApi
from embedmesh.gateway.api.generation_api import FAILURES, HEADERS
from embedmesh.gateway.api.replies import Count, doc
from embedmesh.gateway.api.routes import Api, ApiReply, RawHandler, Route
from embedmesh.rules.confidential import Locks
from embedmesh.rules.generation import Generating
from embedmesh.rules.sealed_generation import GeneratingNodes, confidential_path

STREAMED = (
    "With `stream`, the reply is `text/event-stream` of such objects, one an event, each sealed under its own nonce "
    "and signed. There is no `[DONE]`: the statement of the last event says that it is `final`. A stream that ends "
    "without one was cut. The same body again gets 409 `lock_used`, as streams are not kept."
)


class SealedTokens(msgspec.Struct, frozen=True):
    """What the node has counted and signed."""

    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count


class SealedGenerationReply(msgspec.Struct, frozen=True):
    """A sealed answer, or one event of it. The last three members are those of the SDKs' scheme."""

    ciphertext: Base64
    statement: Annotated[Base64, doc("JSON: lock, digests, the event's number, whether it is the last, counts.")]
    statement_signature: Annotated[Base64, doc("By the node's identity, Ed25519.")]
    usage: SealedTokens | None = None
    nonce: Base64 | None = None
    response_hash: Base64 | None = None
    signature: Base64 | None = None


class GenerationEnvelopeForm:
    """Implements `flow.confidential_generation.GenerationEnvelopes`."""

    parse = staticmethod(confidential_generation.parse)
    plaintext_bytes_max = staticmethod(confidential_generation.plaintext_bytes_max)
    render = staticmethod(confidential_generation.render)
    event = staticmethod(confidential_generation.event)
    refusal = EnvelopeForm.refusal


def _route(modality: Generating, handler: Callable[[Any, Any], Awaitable[Any]], details: str = "") -> Route:
    return Route(
        "POST",
        confidential_path(modality),
        (GENERATE_SCOPE,),
        handler,
        failures=FAILURES,
        details=details,
        raw=RawHandler(
            {200: ApiReply("A sealed answer.", SealedGenerationReply, headers=HEADERS)},
            confidential.Envelope,
            key_checked_by_flow=True,
        ),
    )


class ConfidentialGenerationApi(Api):
    """What callers ask of models that generate, and do not show the gateway."""

    TAG = "Confidential chat, completions, images"

    def __init__(self, embeddings: EmbeddingsApi, locks: Locks, nodes: GeneratingNodes, leases: Leases) -> None:
        self._embeddings = embeddings
        self.bodies = embeddings.bodies

        def operation(modality: Generating) -> ConfidentialGeneration:
            return ConfidentialGeneration(modality, GenerationEnvelopeForm(), locks, nodes, leases)

        self._chat, self._completions, self._images = operation("chat"), operation("completions"), operation("images")

    async def create_confidential_chat_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a confidential chat completion.

        The request is sealed for the node that was locked, which asks the server beside it, and seals what it says. You
        pay for the tokens that the node has counted and signed, at most the lock's: what you are handed, if you leave.
        """
        return await self._embeddings.exchange(request, self._chat, confidential_path("chat"))

    async def create_confidential_completion(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a confidential completion.

        As a confidential chat completion, for how a text goes on.
        """
        return await self._embeddings.exchange(request, self._completions, confidential_path("completions"))

    async def create_confidential_image(self, request: web.BaseRequest) -> web.StreamResponse:
        """Create a confidential image.

        As a confidential chat completion, for one image: its lock holds the price of the dearest size.
        """
        return await self._embeddings.exchange(request, self._images, confidential_path("images"))

    ROUTES = (
        _route("chat", create_confidential_chat_completion, STREAMED),
        _route("completions", create_confidential_completion, STREAMED),
        _route("images", create_confidential_image),
    )
