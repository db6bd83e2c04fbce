"""A client of embedmesh: the OpenAI call for embeddings, of few texts or many, plain or sealed for a node; and rerank.

Importing it is light: what a call does not need (aiohttp, cryptography) is imported with what needs it.
"""

from typing import TYPE_CHECKING, Any

from embedmesh.client.answer import CreateEmbeddingResponse, Embedding, TokenUsage
from embedmesh.client.blocking import Client
from embedmesh.client.bulk.options import BulkProgress, Chunk
from embedmesh.client.errors import (
    CallNotAnswered,
    CallRefused,
    CallTooSlow,
    EmbedmeshError,
    InputRefused,
    NodeNotTrusted,
    NotEmbeddings,
    NotScores,
    NotTrusted,
    ReplyNotTrusted,
    WrongCall,
    WrongPins,
)
from embedmesh.client.rerank import Reranked, RerankOptions
from embedmesh.rules.reranking import Ranked

if TYPE_CHECKING:
    from embedmesh.client.aio import AsyncClient
    from embedmesh.client.pins import Pins

__all__ = [
    "AsyncClient",
    "BulkProgress",
    "CallNotAnswered",
    "CallRefused",
    "CallTooSlow",
    "Chunk",
    "Client",
    "CreateEmbeddingResponse",
    "Embedding",
    "EmbedmeshError",
    "InputRefused",
    "NodeNotTrusted",
    "NotEmbeddings",
    "NotScores",
    "NotTrusted",
    "Pins",
    "Ranked",
    "ReplyNotTrusted",
    "RerankOptions",
    "Reranked",
    "TokenUsage",
    "WrongCall",
    "WrongPins",
]


def __getattr__(name: str) -> Any:
    if name == "AsyncClient":
        from embedmesh.client.aio import AsyncClient

        return AsyncClient
    if name == "Pins":
        from embedmesh.client.pins import Pins

        return Pins
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
