"""The reply's bytes. Vectors are printed as the shortest decimals that give back the same float32, or as base64."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import count

import msgspec
import numpy as np
import orjson

from embedmesh.dialects.quantised import FORMS, Matrix
from embedmesh.rules.embeddings import Call
from embedmesh.rules.exchange import Reply
from embedmesh.rules.forwarding import Answer

IGNORED_HEADER, TRUNCATED_HEADER = "x-embedmesh-ignored", "x-embedmesh-truncated"
UNIT_WITHIN = 1e-6  # of a length that is 1 to float32: such a vector stays as it is, bit for bit
DECIMAL_BYTES_MAX, BASE64_BYTES_MAX = 15, 6  # of a component: `-1.1754944e-38,`; four bytes are 5.4 in base64
COMPONENT_BYTES = 4  # of what they are printed of
ITEM_BYTES_MAX, FRAME_BYTES_MAX = 64, 512  # `{"object":"embedding","index":2047,"embedding":[]},`; all else

SAME_ID = "embeddings"  # some clients want an id; the same request again gets the same bytes, so it says nothing

ENCODE = msgspec.json.Encoder().encode  # bytes become base64

Buffer = bytes | memoryview


class _Item(msgspec.Struct, tag_field="object", tag="embedding"):
    index: int
    embedding: Buffer | msgspec.Raw


class _Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int


class _Body(msgspec.Struct, tag_field="object", tag="list"):
    data: list[_Item]
    model: str
    usage: _Usage
    id: str = SAME_ID


def reply_bytes_max(call: Call, width: int) -> int:
    """What a reply to this call takes in memory, known before anything is embedded: its body and its vectors.

    `width` is the model's. A bound: the body is 2 % to 20 % smaller.
    """
    inputs = len(call.texts) or len(call.ids)
    printed = DECIMAL_BYTES_MAX if call.encoding == "float" else BASE64_BYTES_MAX
    item = ITEM_BYTES_MAX + (call.dimensions or width) * printed + width * COMPONENT_BYTES
    return FRAME_BYTES_MAX + 6 * len(call.model) + inputs * item


def render(call: Call, truncated: int, answer: Answer, headers: dict[str, str]) -> Reply:
    """The reply with these headers and our own; `truncated` is how many inputs were cut."""
    if call.dimensions is not None or call.normalize:
        items = _items(call, *finished(call, answer))
    elif call.single and call.encoding == "base64":  # the ordinary case
        items = [_Item(0, answer.data)]
    else:
        items = _items(call, answer.data, answer.width)
    headers[TRUNCATED_HEADER] = f"{truncated}"
    if call.ignored:
        headers[IGNORED_HEADER] = ",".join(call.ignored)
    return Reply(headers, ENCODE(_Body(items, call.model, _Usage(answer.tokens, answer.tokens))))


def finished(call: Call, answer: Answer) -> tuple[bytes, int]:
    """The vectors as the caller wants them, little-endian float32, and their width."""
    data, width, wanted = answer.data, answer.width, call.dimensions
    if wanted is not None and wanted != width:
        return shorten(np.frombuffer(data, dtype="<f4").reshape(-1, width), wanted).tobytes(), wanted
    if call.normalize:
        data = to_unit_length(np.frombuffer(data, dtype="<f4").reshape(-1, width)).tobytes()
    return data, width


def _items(call: Call, data: bytes, width: int) -> list[_Item]:
    vectors: Iterable[Buffer | msgspec.Raw]
    if call.dtype != "float":
        vectors = _quantised(call, data, width)
    else:
        vectors = _as_floats(data, width) if call.encoding == "float" else _rows(data, width)
    return list(map(_Item, count(), vectors))


def _as_floats(data: bytes, width: int) -> Iterator[msgspec.Raw]:
    matrix: Matrix = np.frombuffer(data, dtype="<f4").reshape(-1, width)
    return (msgspec.Raw(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)) for row in matrix)


def _quantised(call: Call, data: bytes, width: int) -> Iterator[Buffer | msgspec.Raw]:
    rows = FORMS[call.dtype](np.frombuffer(data, dtype="<f4").reshape(-1, width))
    if call.encoding == "base64":
        return (row.tobytes() for row in rows)
    return (msgspec.Raw(orjson.dumps(row, option=orjson.OPT_SERIALIZE_NUMPY)) for row in rows)


def _rows(data: bytes, width: int) -> Sequence[Buffer]:
    size = width * COMPONENT_BYTES
    starts, ends = range(0, len(data), size), range(size, len(data) + 1, size)
    return list(map(memoryview(data).__getitem__, map(slice, starts, ends)))


def shorten(matrix: Matrix, dimensions: int) -> Matrix:
    """The first components of each row, scaled back to unit length. Shape (n, width) in, (n, dimensions) out."""
    head = matrix[:, :dimensions].astype(np.float64)
    norms = np.linalg.norm(head, axis=1, keepdims=True)
    norms[norms == 0] = 1.0  # a vector whose first components are all zero stays as it is
    shortened: Matrix = (head / norms).astype("<f4")
    return shortened


def to_unit_length(matrix: Matrix) -> Matrix:
    """Each row scaled to unit length. What has it already, and what is all zero, stays as it is. Shape (n, width)."""
    rows = matrix.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    norms[(norms == 0) | (np.abs(norms - 1.0) <= UNIT_WITHIN)] = 1.0
    scaled: Matrix = (rows / norms).astype("<f4")
    return scaled
