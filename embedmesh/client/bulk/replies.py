"""The vectors of a reply, as rows of an array: of base64, or of floats, which servers send that know no base64."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from embedmesh.client.answer import COMPONENT_BYTES
from embedmesh.client.wire import CLIENT_REPLY_BYTES_MAX
from embedmesh.rules.limits import VECTOR_WIDTH_MAX

Rows = NDArray[np.float32]
"""Vectors, one a row; also one vector. Little-endian, as on the wire."""

FLOAT32 = np.dtype("<f4")
FLOAT_TEXT_BYTES_MAX = 32  # of a component as a decimal, its comma included
REPLY_BESIDE_BYTES_MAX = 64 * 1024  # beside the vectors


class _BulkItem(msgspec.Struct):
    embedding: bytes
    index: int | None = None


class _FloatItem(msgspec.Struct):
    embedding: list[float]
    index: int | None = None


class _BulkUsage(msgspec.Struct):
    total_tokens: int = 0


class _Reply(msgspec.Struct):
    data: list[_BulkItem]
    usage: _BulkUsage | None = None


class _FloatReply(msgspec.Struct):
    data: list[_FloatItem]
    usage: _BulkUsage | None = None


class ReplyVectors(NamedTuple):
    """Those of one reply, in input order, not copied yet. `parts` are bytes of float32, or lists of floats."""

    parts: Sequence[bytes | list[float]]
    width: int
    tokens: int

    def write(self, rows: Rows) -> None:
        """Into as many rows of that width, which are contiguous. Raises ValueError where a component is no number."""
        if isinstance(self.parts[0], bytes):
            into, size = rows.data.cast("B"), COMPONENT_BYTES * self.width
            for at, part in enumerate(cast("Sequence[bytes]", self.parts)):
                into[at * size : (at + 1) * size] = part
        else:
            with np.errstate(over="ignore"):  # what is too large for float32 is found below
                rows[:] = self.parts
        if not np.isfinite(rows).all():
            raise ValueError("finite")


_decode = msgspec.json.Decoder(_Reply).decode
_decode_floats = msgspec.json.Decoder(_FloatReply).decode


def read_vectors(body: bytes | bytearray | memoryview, inputs: int) -> ReplyVectors:
    """The vectors of a reply to that many inputs. Raises ValueError with one word for what is wrong."""
    try:
        reply: _Reply | _FloatReply = _decode(body)
    except (ValueError, RecursionError):
        try:
            reply = _decode_floats(body)
        except (ValueError, RecursionError):
            raise ValueError("form") from None
    indexes = [item.index for item in reply.data]
    if len(indexes) != inputs or not inputs:
        raise ValueError("count")
    parts: list[bytes | list[float]] = [item.embedding for item in reply.data]
    if indexes != list(range(inputs)) and any(index is not None for index in indexes):
        by_index = dict(zip(indexes, parts, strict=True))
        if by_index.keys() != set(range(inputs)):
            raise ValueError("order")
        parts = [by_index[index] for index in range(inputs)]
    return made_vectors(parts, reply.usage.total_tokens if reply.usage else 0)


def made_vectors(parts: Sequence[bytes | list[float]], tokens: int) -> ReplyVectors:
    """All of one width, at least one. Raises ValueError where they are not."""
    size = len(parts[0])
    width = size // COMPONENT_BYTES if isinstance(parts[0], bytes) else size
    if not 0 < width <= VECTOR_WIDTH_MAX or (isinstance(parts[0], bytes) and size % COMPONENT_BYTES):
        raise ValueError("width")
    if set(map(len, parts)) != {size}:
        raise ValueError("width")
    return ReplyVectors(parts, width, tokens)


def reply_bytes_max(inputs: int) -> int:
    """How large a reply with that many vectors can be."""
    return min(REPLY_BESIDE_BYTES_MAX + inputs * VECTOR_WIDTH_MAX * FLOAT_TEXT_BYTES_MAX, CLIENT_REPLY_BYTES_MAX)
