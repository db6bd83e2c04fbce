"""What a node and a gateway say to each other about the node itself: joining, moving, reporting, leaving.

docs/reference/node-protocol.md tells the story of it. The structs here are the messages, in JSON (bytes as base64);
both sides decode into them, and what does not fit is refused.
"""

from enum import Enum
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from embedmesh.rules.limits import (
    CONTEXT_TOKENS_MAX,
    HEARTBEAT_RECEIPTS_MAX,
    OFFERS_MAX,
    REQUEST_INPUTS_MAX,
    VECTOR_WIDTH_MAX,
)

VERSION: Literal[1] = 1  # of these messages
STATEMENT = b"statement"  # what a node's identity signs a registration for,
CHALLENGE = b"challenge"  # both identities the challenge and its answer,
TRANSCRIPT = b"transcript"  # and a gateway's the session
NONCE_S = 60  # how long a gateway's nonce is good for, and how far clocks may differ
HEARTBEAT_S = 2.0  # between two reports; three that are missing are a node that has gone

SESSION_S = 12 * 3600.0  # a new session key is agreed twice a day
DIGEST_BYTES = 32

Key = Annotated[bytes, Meta(min_length=32, max_length=32)]
Signature = Annotated[bytes, Meta(min_length=64, max_length=64)]
Digest = Annotated[bytes, Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
Whole = Annotated[int, Meta(ge=0, le=10**15 - 1)]  # exact wherever JSON is read
Country = Annotated[str, Meta(pattern="^([A-Z]{2})?$")]


class Standing(Enum):
    """What the operator has said of a node."""

    PENDING = "pending"  # it asked to join, and nobody has said yes
    ADMITTED = "admitted"
    REMOVED = "removed"  # for good: its key is not taken again


class Greeting(msgspec.Struct, frozen=True):
    """`GET /v1/nodes`: who this gateway is, and a nonce that shows that a registration is new."""

    gateway_key: Key
    nonce: bytes


class Offer(msgspec.Struct, frozen=True):
    """A model that a node offers. `price` is what it asks, in nano-USD per million tokens.

    The width of a model that generates is 0.

    Of an upstream server: `name` is what it calls the model, `prefix` what it wants before every text.
    """

    id: Annotated[str, Meta(max_length=200)]
    width: Annotated[int, Meta(ge=0, le=VECTOR_WIDTH_MAX)]
    max_tokens: Annotated[int, Meta(ge=1, le=CONTEXT_TOKENS_MAX)]
    digest: Annotated[str, Meta(max_length=64)]
    tier: Literal["exact", "fast", "int8"]
    price: Whole = 0
    name: Annotated[str, Meta(max_length=200)] = ""
    prefix: Annotated[str, Meta(max_length=1_024)] = ""


class Statement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node says of itself, and signs. An empty `address` means that it dials out."""

    version: Literal[1]
    public_key: Key
    address: Annotated[str, Meta(max_length=300)]
    certificate: Annotated[bytes, Meta(max_length=8_192)]  # DER; empty where it speaks plain HTTP, or dials out
    country: Country
    offers: Annotated[tuple[Offer, ...], Meta(max_length=OFFERS_MAX)]
    inputs_max: Annotated[int, Meta(ge=1, le=REQUEST_INPUTS_MAX)]
    ephemeral: Key  # its half of the session key
    nonce: Annotated[bytes, Meta(max_length=64)]  # the gateway's
    time_ms: Whole


class Registration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/nodes`. `statement` is the JSON of a Statement, byte for byte what was signed."""

    statement: bytes
    signature: Signature
    invite_id: str | None = None
    proof: Digest | None = None  # that the node holds the invite's secret


class Welcome(msgspec.Struct, frozen=True):
    """The answer to a registration. `signature` is the gateway's, over the transcript of the session.

    A pending node has no session: it asks again later.
    """

    node_id: str
    small_id: int
    standing: Literal["pending", "admitted"]
    ephemeral: bytes = b""
    signature: bytes = b""
    heartbeat_s: float = HEARTBEAT_S


class Challenge(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Gateway to the address that a node has named: is it you? Signed, since a node answers nobody but its gateway."""

    nonce: Digest
    gateway_key: Key
    signature: Signature


class ChallengeAnswer(msgspec.Struct, frozen=True):
    """The node's signature over the nonce and the address that it believes to have."""

    signature: Signature


class Receipt(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """One reply of a node. Both digests are SHA-256 of a body. Limits hold where it is decoded."""

    number: Annotated[int, Meta(ge=1, le=10**15 - 1)]  # from 1, without gaps
    request_id: Annotated[str, Meta(max_length=64)]
    request_digest: Digest
    reply_digest: Digest
    tokens: Whole
    time_ms: Whole


class SignedHead(msgspec.Struct, frozen=True):
    """A node stands by its log up to receipt number `count`."""

    count: Whole
    head: Digest
    time_ms: Whole
    signature: Signature


class Heartbeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`POST /v1/nodes/{id}/heartbeat`. `receipts` are those from the wanted number on."""

    tokens_waiting: Whole
    tokens_per_s: Annotated[float, Meta(ge=0, le=1e9)]
    receipts: Annotated[tuple[Receipt, ...], Meta(max_length=HEARTBEAT_RECEIPTS_MAX)] = ()
    head: SignedHead | None = None


class HeartbeatReply(msgspec.Struct, frozen=True):
    """Which receipts the gateway wants next."""

    receipts_from: int
