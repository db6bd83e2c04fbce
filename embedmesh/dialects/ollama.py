"""Ollama's `/api/embed` and `/api/embeddings`: https://github.com/ollama/ollama/blob/main/docs/api.md.

Vectors are of unit length, as Ollama's are, and a text that is too long is cut unless `truncate` is false.
"""

from typing import Annotated, Any

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.quantised import Matrix
from embedmesh.rules.errors import Failure
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.limits import REQUEST_INPUTS_MAX
from embedmesh.rules.ports import Catalogue

LATEST = ":latest"  # Ollama's clients may add it to any name

Text = Annotated[str, Meta(min_length=1)]


class OllamaEmbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/api/embed`. `options` and `keep_alive` are for a server that loads models: they change nothing."""

    model: str
    input: Text | Annotated[list[Text], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)]
    truncate: bool | None = None
    dimensions: Annotated[int, Meta(ge=1)] | None = None
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class OllamaEmbeddings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/api/embeddings`, which takes one text."""

    model: str
    prompt: Text
    options: dict[str, Any] | None = None
    keep_alive: str | float | None = None


class OllamaVectors(msgspec.Struct, frozen=True):
    """A vector for each input, in input order. Durations are not told: 0."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaVector(msgspec.Struct, frozen=True):
    """The vector."""

    embedding: list[float]


def name_of(name: str, catalogue: Catalogue) -> str:
    """What a model is called here: its name as it is, or without the tag that stands for none."""
    return name if catalogue.find(name) is not None else name.removesuffix(LATEST)


def envelope(failure: Failure) -> bytes:
    """How Ollama tells failures."""
    return orjson.dumps({"error": failure.message})


def _embed(asked: OllamaEmbed) -> dict[str, Any]:
    return {
        "model": asked.model,
        "input": asked.input,
        "truncate": None if asked.truncate is None else "end" if asked.truncate else "none",
        "dimensions": asked.dimensions,
        "normalize": True,
    }


def _embeddings(asked: OllamaEmbeddings) -> dict[str, Any]:
    return {"model": asked.model, "input": asked.prompt, "normalize": True}


def _vectors(asked: OllamaEmbed, matrix: Matrix, answer: Answer) -> dict[str, Any]:
    return {
        "model": asked.model,
        "embeddings": matrix,
        "total_duration": 0,  # the same request again gets the same bytes
        "load_duration": 0,
        "prompt_eval_count": answer.tokens,
    }


def _vector(asked: OllamaEmbeddings, matrix: Matrix, answer: Answer) -> dict[str, Any]:
    return {"embedding": matrix[0]}


EMBED = Adapted(OllamaEmbed, _embed, _vectors, envelope, cuts=True, name_of=name_of)
EMBEDDINGS = Adapted(OllamaEmbeddings, _embeddings, _vector, envelope, {"input": "prompt"}, cuts=True, name_of=name_of)
