"""What is asked and what is answered: the only words that gateway and node share.

The node protocol is written down in docs/reference/node-protocol.md; the structs here are its messages.
"""

from typing import Literal

import msgspec

Encoding = Literal["float", "base64"]
Role = Literal["query", "document"]
Truncate = Literal["none", "end", "start"]

INPUTS_MAX = 2_048  # what OpenAI's API takes in one request
REQUEST_TOKENS_MAX = 300_000  # what OpenAI's API takes in one request
BODY_BYTES_MAX = 4 * 1024 * 1024  # 300,000 tokens of ordinary text are about 1.5 MB; JSON escapes may double that
USER_CHARS_MAX = 512


class Call(msgspec.Struct, frozen=True):
    """A validated request: either `texts` or lists of token `ids`, never both, never neither."""

    model: str  # as asked, tier suffix and alias included
    texts: list[str] = []
    ids: list[list[int]] = []
    single: bool = False  # whether `input` was one text or one list of ids, not an array of them
    encoding: Encoding = "float"
    dimensions: int | None = None
    user: str | None = None
    role: Role | None = None
    truncate: Truncate = "none"


class Counted(msgspec.Struct, frozen=True):
    """A call in the model's own token ids, special tokens not yet added.

    `tokens` counts what will really be embedded, special tokens included; `truncated` how many inputs were cut.
    """

    ids: list[list[int]]
    tokens: int
    truncated: int = 0


class EmbedRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Gateway to node. An input is a text, or token ids of the model's own vocabulary; the node adds special tokens."""

    model: str
    input: list[str | list[int]]
    encoding_format: Encoding = "base64"


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
    """Node to gateway, in input order."""

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
    object: Literal["model"] = "model"


class ServedModels(msgspec.Struct):
    """`GET /v1/models` of a node."""

    data: list[ServedModel]
    object: Literal["list"] = "list"
