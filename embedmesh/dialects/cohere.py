"""Cohere's `/v1/embed` and `/v2/embed`: https://docs.cohere.com/reference/embed. Texts only.

A text that is too long is cut at its end unless `truncate` says otherwise, as Cohere does.
"""

from typing import Annotated, Any, Literal

import msgspec
import orjson
from msgspec import Meta

from embedmesh.dialects.adapted import Adapted
from embedmesh.dialects.openai.render import SAME_ID
from embedmesh.dialects.quantised import FORMS, PRINTED_BYTES, Kind, Matrix
from embedmesh.rules.errors import Failure
from embedmesh.rules.forwarding import Answer
from embedmesh.rules.limits import REQUEST_INPUTS_MAX

Texts = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)]
Kinds = Annotated[list[Kind], Meta(min_length=1, max_length=len(FORMS))]
InputType = Literal["search_document", "search_query"]
Truncation = Literal["NONE", "START", "END"]


class CohereContent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of an input."""

    type: Literal["text"]
    text: Annotated[str, Meta(min_length=1)]


class CohereInput(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input: one piece of text."""

    content: Annotated[list[CohereContent], Meta(min_length=1, max_length=1)]


class CohereEmbed(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/v2/embed`. Either `texts` or `inputs`; `priority` changes nothing."""

    model: str
    texts: Texts | None = None
    inputs: Annotated[list[CohereInput], Meta(min_length=1, max_length=REQUEST_INPUTS_MAX)] | None = None
    input_type: InputType | None = None
    embedding_types: Kinds | None = None
    truncate: Truncation | None = None
    output_dimension: Annotated[int, Meta(ge=1)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    priority: int | None = None


class CohereEmbedV1(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A request of `/v1/embed`."""

    model: str
    texts: Texts
    input_type: InputType | None = None
    embedding_types: Kinds | None = None
    truncate: Truncation | None = None


class CohereVectors(msgspec.Struct, frozen=True):
    """A vector for each text in each type that was asked for; from `/v1/embed` a list, where none was."""

    id: str
    embeddings: dict[Kind, Any] | list[list[float]]
    texts: list[str]
    meta: dict[str, Any]
    response_type: Literal["embeddings_by_type", "embeddings_floats"]


def envelope(failure: Failure) -> bytes:
    """How Cohere tells failures."""
    return orjson.dumps({"message": failure.message})


def _texts(asked: CohereEmbed | CohereEmbedV1) -> list[str] | None:
    if isinstance(asked, CohereEmbed) and asked.inputs is not None:
        if asked.texts is None:
            return [each.content[0].text for each in asked.inputs]
        return [*asked.texts, *(each.content[0].text for each in asked.inputs)]
    return asked.texts


def _ours(asked: CohereEmbed | CohereEmbedV1) -> dict[str, Any]:
    return {
        "model": asked.model,
        "input": _texts(asked),
        "input_type": asked.input_type,
        "truncate": asked.truncate,
        "output_dimension": asked.output_dimension if isinstance(asked, CohereEmbed) else None,
        "truncate_prompt_tokens": asked.max_tokens if isinstance(asked, CohereEmbed) else None,
        "normalize": True if set(_kinds(asked)) & {"int8", "uint8"} else None,  # their formula is for unit length
    }


def _kinds(asked: CohereEmbed | CohereEmbedV1) -> list[Kind]:
    return asked.embedding_types or ["float"]


def _write(asked: CohereEmbed | CohereEmbedV1, matrix: Matrix, answer: Answer) -> Any:
    flat = isinstance(asked, CohereEmbedV1) and asked.embedding_types is None
    return {
        "id": SAME_ID,
        "embeddings": matrix if flat else {kind: FORMS[kind](matrix) for kind in _kinds(asked)},
        "texts": _texts(asked),
        "meta": {
            "api_version": {"version": "2" if isinstance(asked, CohereEmbed) else "1"},
            "billed_units": {"input_tokens": answer.tokens},
        },
        "response_type": "embeddings_floats" if flat else "embeddings_by_type",
    }


def _bytes_of(asked: CohereEmbed | CohereEmbedV1) -> int:
    return sum(PRINTED_BYTES[kind] for kind in _kinds(asked))


NAMES = {"input": "texts", "truncate_prompt_tokens": "max_tokens"}
EMBED = Adapted(CohereEmbed, _ours, _write, envelope, NAMES, cuts=True, echoes=True, bytes_of=_bytes_of)
EMBED_V1 = Adapted(CohereEmbedV1, _ours, _write, envelope, NAMES, cuts=True, echoes=True, bytes_of=_bytes_of)
