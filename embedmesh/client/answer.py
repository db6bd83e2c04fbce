"""Vectors of a reply: checked, and in the form in which the openai package gives them."""

import base64
import sys
from array import array
from operator import mul
from typing import Literal, cast

import msgspec

from embedmesh.client.wanted import Wanted
from embedmesh.rules.limits import VECTOR_WIDTH_MAX

COMPONENT_BYTES = 4  # little-endian float32


class _Item(msgspec.Struct):
    index: int
    embedding: bytes
    object: Literal["embedding"]


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _List(msgspec.Struct):
    data: list[_Item]
    model: str
    usage: _Usage
    object: Literal["list"]


class Embedding(msgspec.Struct, frozen=True):
    """The vector of one input. With `encoding_format="base64"` it is a text in spite of its type, as in openai."""

    embedding: list[float]
    index: int
    object: Literal["embedding"] = "embedding"


class TokenUsage(msgspec.Struct, frozen=True):
    """Tokens that were embedded, special tokens included: what is paid."""

    prompt_tokens: int
    total_tokens: int


class CreateEmbeddingResponse(msgspec.Struct, frozen=True):
    """A reply. `node_id` is that of the node that has signed it, where the request was confidential."""

    data: list[Embedding]
    model: str
    usage: TokenUsage
    object: Literal["list"] = "list"
    request_id: str | None = None
    node_id: str | None = None


class Rows(msgspec.Struct, frozen=True):
    """The vectors of a reply as little-endian float32, in input order. A sealed reply may have a lock for the next."""

    vectors: list[bytes]
    model: str
    tokens: int
    next_lock: bytes | None = None


def read_rows(body: bytes, wanted: Wanted) -> Rows:
    """The vectors of a reply to what was wanted. Raises ValueError with one word for what is wrong."""
    try:
        reply = msgspec.json.decode(body, type=_List)
    except (msgspec.DecodeError, ValueError, RecursionError):
        raise ValueError("form") from None
    if len(reply.data) != wanted.inputs:
        raise ValueError("count")
    if any(item.index != at for at, item in enumerate(reply.data)):
        raise ValueError("order")
    if not 0 < reply.usage.prompt_tokens == reply.usage.total_tokens:
        raise ValueError("tokens")
    vectors = [item.embedding for item in reply.data]
    size = COMPONENT_BYTES * wanted.dimensions if wanted.dimensions else len(vectors[0])
    if not 0 < size <= COMPONENT_BYTES * VECTOR_WIDTH_MAX or size % COMPONENT_BYTES:
        raise ValueError("width")
    for vector in vectors:
        if len(vector) != size:
            raise ValueError("width")
        floats = _floats(vector)
        square = sum(map(mul, floats, floats))  # float32 squared and summed has room in a double
        if not square < float("inf"):
            raise ValueError("finite")
        if square == 0.0:
            raise ValueError("zero")
    return Rows(vectors, reply.model, reply.usage.total_tokens)


def to_response(
    rows: Rows, wanted: Wanted, *, request_id: str | None, node_id: str | None = None
) -> CreateEmbeddingResponse:
    """The rows as the caller wants them."""
    if wanted.encoding == "base64":
        vectors = cast("list[list[float]]", [base64.b64encode(row).decode("ascii") for row in rows.vectors])
    else:
        vectors = [_floats(row).tolist() for row in rows.vectors]
    return CreateEmbeddingResponse(
        data=[Embedding(vector, index) for index, vector in enumerate(vectors)],
        model=rows.model,
        usage=TokenUsage(rows.tokens, rows.tokens),
        request_id=request_id,
        node_id=node_id,
    )


def _floats(row: bytes) -> "array[float]":
    numbers = array("f", row)
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers
