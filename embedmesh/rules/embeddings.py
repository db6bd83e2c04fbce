"""Embedding requests and answers: the words that gateway and node share.

The node protocol is written down in docs/reference/node-protocol.md; the structs here are its messages.
"""

import struct
import sys
from array import array
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import msgspec

from embedmesh.rules.confidential import SignedKeys

Encoding = Literal["float", "base64"]
Dtype = Literal["float", "int8", "uint8", "binary", "ubinary"]
Role = Literal["query", "document"]
Truncate = Literal["none", "end", "start"]

Ids = list[int] | bytes
"""The token ids of one input: numbers, or little-endian uint32 as in messages. See `bytes_of` and `numbers_of`."""

ID_BYTES = 4
UINT32 = struct.Struct("<I").pack
ENDS_FIRST = 1 << 31
"""Added to the last id of a pair's first segment, which is the query with the special tokens behind it. No vocabulary
has as many ids. Tokens behind it are of the second segment, also where a text spells a special token."""

COMPACT = "application/vnd.embedmesh.v2+msgpack"  # content type of EmbedIds, EmbedVectors and sealed calls

# The heads of the compact form, as gateway and node write them: constant up to a signature's lines and the length.
EMBED_HEAD = f"POST /v1/embeddings HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n".encode()
SEALED_HEAD = f"POST /v1/confidential/embeddings HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n".encode()
LIST_HEAD = f"GET /v1/models HTTP/1.1\r\nHost: node\r\nContent-Type: {COMPACT}\r\n".encode()
VECTORS_HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: {COMPACT}\r\nContent-Length: ".encode()
LISTED_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: "


class Call(msgspec.Struct, frozen=True):
    """A validated request: either `texts` or lists of token `ids`, never both, never neither."""

    model: str  # as sent, tier suffix and alias included
    texts: list[str] = []
    ids: list[list[int]] = []
    single: bool = False  # whether `input` was one text or one list of ids, not an array of them
    encoding: Encoding = "float"
    dimensions: int | None = None
    user: str | None = None
    role: Role | None = None
    truncate: Truncate = "none"
    keep: int | None = None  # tokens of an input, special ones included, that are kept where it is cut
    dtype: Dtype = "float"  # of a component; another one than float32 wants `normalize`
    normalize: bool = False  # whether vectors have to be of unit length
    ignored: tuple[str, ...] = ()  # names of fields that change nothing


class Counted(msgspec.Struct, frozen=True):
    """What will be embedded, and how many tokens each input is, special tokens included.

    `ids` are in the model's own vocabulary, special tokens not yet added; `texts` are the same inputs, prompt included,
    for servers that take only texts. One of them may be missing: texts where the caller sent the model's own ids, ids
    where nobody here has the model's tokenizer. Then `exact` is false and the lengths are upper bounds. `truncated`
    says how many inputs were cut.

    Inputs of a model that reranks are pairs: `query` is the first text of each, `texts` are the second ones, and `ids`
    are both with the special tokens between them; see `ENDS_FIRST`. Where pairs have more or less of the query,
    `queries` are theirs, and `query` is the longest.
    """

    lengths: list[int]
    ids: Sequence[Ids] | None = None
    texts: list[str] | None = None
    truncated: int = 0
    exact: bool = True
    query: str | None = None
    queries: list[str] | None = None

    @property
    def tokens(self) -> int:
        """Of all inputs."""
        return sum(self.lengths)


class EmbedIds(msgspec.Struct, forbid_unknown_fields=True):
    """Gateway to node, in MessagePack: token ids of the model's own vocabulary; the node adds the special tokens.

    Both members are little-endian uint32: how many ids each input has, and the ids of all of them, one after another.
    """

    model: str
    lengths: bytes
    ids: bytes


class EmbedVectors(msgspec.Struct):
    """Node to gateway, in MessagePack: `data` is little-endian float32, a row of the model's width an input, in order.

    `tokens` counts all inputs, special tokens included.
    """

    tokens: int
    data: bytes


def pack_ids(model: str, ids: Sequence[Ids]) -> EmbedIds:
    """The message that asks for vectors of some inputs' ids."""
    if len(ids) == 1 and (alone := ids[0]).__class__ is bytes:  # the ordinary case, in half the time
        return EmbedIds(model, UINT32(len(alone) // ID_BYTES), alone)
    try:
        joined = b"".join(ids)  # type: ignore[arg-type]  # the ordinary case: all are bytes
    except TypeError:
        ids = [bytes_of(each) for each in ids]
        joined = b"".join(ids)  # type: ignore[arg-type]
    sizes = struct.pack(f"<{len(ids)}I", *map(len, ids))
    lengths = int.from_bytes(sizes, "little") >> 2  # of all at once: each size is a multiple of four
    return EmbedIds(model, lengths.to_bytes(len(sizes), "little"), joined)


def bytes_of(ids: Ids) -> bytes:
    """One input's ids as bytes."""
    return ids if isinstance(ids, bytes) else _uint32(ids)


def numbers_of(ids: Ids) -> list[int]:
    """One input's ids as numbers."""
    return _from_uint32(ids) if isinstance(ids, bytes) else ids


def unpack_ids(message: EmbedIds) -> list[list[int]]:
    """The ids of each input. Raises ValueError if the lengths do not add up to the ids."""
    lengths, ids = _from_uint32(message.lengths), _from_uint32(message.ids)
    if len(lengths) == 1 and lengths[0] == len(ids):
        return [ids]
    if sum(lengths) != len(ids):
        raise ValueError("the lengths do not add up to the ids")
    ends = list(accumulate(lengths, initial=0))
    return [ids[start:end] for start, end in pairwise(ends)]


def _uint32(values: list[int]) -> bytes:
    numbers = array("I", values)
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers.tobytes()


def _from_uint32(data: bytes) -> list[int]:
    numbers = array("I")
    numbers.frombytes(data)  # ValueError where it is no multiple of four
    if sys.byteorder != "little":
        numbers.byteswap()
    return numbers.tolist()


class EmbedItem(msgspec.Struct):
    """One vector: base64 of little-endian float32."""

    index: int
    embedding: str
    object: Literal["embedding"] = "embedding"


class EmbedUsage(msgspec.Struct):
    """Tokens really embedded, special tokens included."""

    prompt_tokens: int
    total_tokens: int


class EmbedReply(msgspec.Struct):
    """The public API's reply with base64, as a client of ours reads it."""

    data: list[EmbedItem]
    model: str
    usage: EmbedUsage
    object: Literal["list"] = "list"


class ServedModel(msgspec.Struct):
    """What a node says it serves. A gateway believes the digest only as far as it equals the catalogue's."""

    id: str
    width: int
    max_tokens: int
    digest: str
    tier: str
    aliases: tuple[str, ...] = ()
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "embedmesh"


class ServedModels(msgspec.Struct):
    """`GET /v1/models` of a node. `shortage` is one of `rules.nodes.SHORTAGES` while an engine of it is starved.

    `threads` says how many its engines have, and why. `keys` are those under which the node takes confidential
    requests, if it does.
    """

    data: list[ServedModel]
    object: Literal["list"] = "list"
    shortage: str = ""
    threads: str = ""
    keys: SignedKeys | msgspec.UnsetType = msgspec.UNSET
