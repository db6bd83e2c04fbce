"""Google's `:embedContent` and `:batchEmbedContents`; the path names the model. https://ai.google.dev/api/embeddings"""

from collections.abc import Callable
from typing import Annotated, Any, NoReturn

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.quantised import Matrix
from embedmesh.rules.errors import Failure, InvalidValue
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

MODELS = "models/"
STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    409: "ABORTED",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class GooglePart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a text."""

    text: Annotated[str, Meta(min_length=1)]


class GoogleContent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A text, in one piece."""

    parts: Annotated[list[GooglePart], Meta(min_length=1, max_length=1)]
    role: str | None = None


class GoogleEmbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `:embedContent`, and one of several of `:batchEmbedContents`."""

    content: GoogleContent
    model: str | None = None
    task_type: Annotated[str, Meta(max_length=64)] | None = msgspec.field(default=None, name="taskType")
    output_dimensionality: Annotated[int, Meta(ge=1)] | None = msgspec.field(default=None, name="outputDimensionality")


class GoogleEmbeds(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `:batchEmbedContents`: its requests agree in everything but their texts."""

    requests: Annotated[list[GoogleEmbed], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)]


class GoogleValues(msgspec.Struct, frozen=True):
    """A vector."""

    values: list[float]


class GoogleVector(msgspec.Struct, frozen=True):
    """The vector of the text."""

    embedding: GoogleValues


class GoogleVectors(msgspec.Struct, frozen=True):
    """A vector for each request, in their order."""

    embeddings: list[GoogleValues]


def envelope_of(status_of: Callable[[Failure], int]) -> Callable[[Failure], bytes]:
    """How Google tells failures, by their HTTP status."""

    def envelope(failure: Failure) -> bytes:
        status = status_of(failure)
        error = {"code": status, "message": failure.message, "status": STATUS.get(status, "INTERNAL")}
        return orjson.dumps({"error": error})

    return envelope


def _same(asked: GoogleEmbed, text: Any) -> dict[str, Any]:
    return {
        "model": asked.model.removeprefix(MODELS) if asked.model else None,
        "input": text,
        "task": asked.task_type,
        "dimensions": asked.output_dimensionality,
    }


def _one(asked: GoogleEmbed) -> dict[str, Any]:
    return _same(asked, asked.content.parts[0].text)


def _all(asked: GoogleEmbeds) -> dict[str, Any]:
    first, *others = asked.requests
    for at, each in enumerate(others, start=1):
        for name, theirs in (("model", "model"), ("task_type", "taskType"), ("output_dimensionality", DIMENSIONS)):
            if getattr(each, name) != getattr(first, name):
                _differs(at, theirs)
    return _same(first, [each.content.parts[0].text for each in asked.requests])


def _differs(at: int, name: str) -> NoReturn:
    words = f"`requests.{at}.{name}` differs from that of the first request: send those together that agree."
    raise InvalidValue(words, param=f"requests.{at}.{name}")


def _vector(asked: GoogleEmbed, matrix: Matrix, answer: Answer) -> Any:
    return {"embedding": {"values": matrix[0]}}


def _vectors(asked: GoogleEmbeds, matrix: Matrix, answer: Answer) -> Any:
    return {"embeddings": [{"values": row} for row in matrix]}


DIMENSIONS = "outputDimensionality"
NAMES = {"task": "taskType", "dimensions": DIMENSIONS}


def dialects(status_of: Callable[[Failure], int]) -> tuple[Adapted, Adapted]:
    """Of one text, and of several."""
    envelope = envelope_of(status_of)
    return (
        Adapted(GoogleEmbed, _one, _vector, envelope, NAMES | {"input": "content"}),
        Adapted(GoogleEmbeds, _all, _vectors, envelope, NAMES | {"input": "requests"}),
    )
