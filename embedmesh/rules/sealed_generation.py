"""Confidential chat, completions and images: what gateway and sidecar say to each other, and what the node signs.

A whole answer is one sealed event. A stream is many: each is sealed and signed by itself, and the last one says so.
"""

from typing import Annotated, Literal, Protocol

import msgspec
from msgspec import Meta

from embedmesh.rules.confidential import LockTerms, SealedAnswer, SealedCall
from embedmesh.rules.generation import PATHS, Generating, StreamEnd
from embedmesh.rules.membership import Digest, Whole
from embedmesh.rules.models import Model

GENERATED = b"confidential generation"  # what a node's identity signs a GenerationStatement for
CONFIDENTIAL = "/v1/confidential/"  # before the path of a modality: see `rules.generation.PATHS`
SEALED_EVENTS = "application/vnd.embedmesh.sealed-events"  # frames: the length as four bytes, then MessagePack
FRAME_LENGTH_BYTES = 4  # big-endian
SEALED_EVENT_BYTES_MAX = 1536 * 1024  # of a stream: the largest event that is read, padded, and its statement
SEALED_FRAMING_BYTES = 1_024  # around what is sealed of one event: statement, signatures, names
EVENTS_MORE = 64  # of a stream, than tokens: roles, ends, usage, and pieces of characters


class SealedGeneration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of `POST /v1/confidential/…` of a sidecar, in MessagePack. `stream`: as the sealed request says."""

    call: SealedCall
    stream: bool = False


class GenerationStatement(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a node stands by, with each event. The counts are of all until now: they replace those of the event before.

    `number` counts the events of one answer from 0; after the one that is `final` comes none. `status` 400: it refused,
    and all counts are 0. `request_digest` is of the sealed request, `reply_digest` of this sealed event. `cached` is a
    part of `input`; `estimated`: the counts of tokens are the node's own, and not those of the server that it asked.
    `size` is that of the `images`.
    """

    version: Literal[1]
    node_id: str
    lock: Whole
    request_digest: Digest
    reply_digest: Digest
    modality: Generating
    stream: bool
    number: Whole
    final: bool
    status: Literal[200, 400]
    input: Whole
    cached: Whole
    output: Whole
    images: Whole
    size: Annotated[str, Meta(max_length=16)]
    estimated: bool
    time_ms: Whole


class SignedCounts(msgspec.Struct, frozen=True):
    """What an answer has used until now, in tokens or images, as a GenerationStatement says it."""

    input: int = 0
    output: int = 0
    cached: int = 0
    images: int = 0
    size: str = ""
    estimated: bool = False


class CheckedEvent(msgspec.Struct, frozen=True):
    """A sealed event whose statement fits the call and its place, and is signed by the node."""

    answer: SealedAnswer
    statement: GenerationStatement


class SealedBounds(msgspec.Struct, frozen=True):
    """What is believed of a node's counts: the input at most, input and output together, and how much may come back."""

    input: int
    tokens: int
    bytes: int
    sizes: tuple[str, ...] = ()  # of an image, if it may be one


class SealedStream(Protocol):
    """A sealed stream of a node. Closed once."""

    @property
    def end(self) -> StreamEnd | None:
        """What has ended it; None until `next` has given None."""
        ...

    async def next(self) -> CheckedEvent | None:
        """The next event, in order, none missing; None after the final one. Raises a NodeFailure."""
        ...

    def close(self) -> None:
        """No more is wanted: the node can stop. Wakes who waits for `next` with NodeBroke."""
        ...


class GeneratingNodes(Protocol):
    """The sidecars."""

    def is_here(self, terms: LockTerms) -> bool:
        """Whether the node that was locked is one of this gateway's."""
        ...

    async def generate(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> CheckedEvent:
        """A whole answer. Raises a NodeFailure."""
        ...

    async def stream(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> SealedStream:
        """A stream, once its head has come. Raises a NodeFailure."""
        ...


def confidential_path(modality: Generating) -> str:
    """The path of a confidential request, at a gateway and at a sidecar."""
    return CONFIDENTIAL + PATHS[modality]


def operation_of(modality: Generating, stream: bool) -> str:
    """What our own scheme binds a request to, beside its terms: no chat is done as a completion."""
    return f"{modality} stream" if stream else modality


def largest_size(model: Model) -> str:
    """The size of an image with the most pixels."""
    return max(model.image_prices, key=_pixels)


def _pixels(size: str) -> int:
    width, _, height = size.partition("x")
    return int(width) * int(height)
