"""Confidential chat, completions and images of sidecars: each event must be the node's own, and in its place."""

from typing import Protocol

import msgspec

from embedmesh.confidential.failures import Untrusted
from embedmesh.confidential.generation_statements import AnsweredRequest, read_event
from embedmesh.confidential.statements import request_digest
from embedmesh.rules.confidential import LockTerms, SealedAnswer, SealedCall
from embedmesh.rules.errors import NodeBroke, WrongAnswer
from embedmesh.rules.generation import Generating, StreamEnd
from embedmesh.rules.nodes import Check
from embedmesh.rules.sealed_generation import (
    EVENTS_MORE,
    FRAME_LENGTH_BYTES,
    SEALED_EVENT_BYTES_MAX,
    SEALED_FRAMING_BYTES,
    CheckedEvent,
    GenerationStatement,
    SealedBounds,
    SealedGeneration,
)
from embedmesh.upstream.http1_stream import BodyStream

ENCODE = msgspec.msgpack.Encoder().encode
DECODE = msgspec.msgpack.Decoder(SealedAnswer).decode


class SidecarClient(Protocol):
    """What is needed of the links to nodes."""

    async def generate_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> bytes:
        """The body of a node's reply of at most `limit` bytes. Raises a NodeFailure."""
        ...

    async def stream_sealed(
        self, node_id: str, modality: Generating, body: bytes, limit: int, request_id: str
    ) -> BodyStream:
        """The same, read as it comes. Raises a NodeFailure."""
        ...


class KnownNodes(Protocol):
    """Which nodes are this gateway's."""

    def is_here(self, terms: LockTerms) -> bool:
        """Whether the node that was locked is one of them."""
        ...


class Sidecars:
    """Implements `rules.sealed_generation.GeneratingNodes`."""

    def __init__(self, nodes: KnownNodes, client: SidecarClient) -> None:
        self.is_here = nodes.is_here
        self._client = client

    async def generate(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> CheckedEvent:
        asked = ENCODE(SealedGeneration(call))
        limit = bounds.bytes + SEALED_FRAMING_BYTES
        body = await self._client.generate_sealed(terms.node_id, modality, asked, limit, request_id)
        return _Reading(_answered(terms, call, modality, stream=False), bounds).read(body)

    async def stream(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> "SidecarStream":
        asked = ENCODE(SealedGeneration(call, stream=True))
        limit = bounds.bytes + (bounds.tokens + EVENTS_MORE) * SEALED_FRAMING_BYTES
        body = await self._client.stream_sealed(terms.node_id, modality, asked, limit, request_id)
        return SidecarStream(body, _Reading(_answered(terms, call, modality, stream=True), bounds))


class SidecarStream:
    """One sealed stream. Implements `SealedStream`."""

    def __init__(self, body: BodyStream, reading: "_Reading") -> None:
        self.end: StreamEnd | None = None
        self._body = body
        self._reading = reading
        self._buffer = bytearray()

    async def next(self) -> CheckedEvent | None:
        frame = await self._frame()
        if frame is None:
            if not self._reading.is_over:
                raise NodeBroke("the node's sealed stream ended before its final event")
            self.end = "whole"
            return None
        try:
            return self._reading.read(frame)
        except WrongAnswer:
            self.close()
            raise

    def close(self) -> None:
        self._body.close()

    async def _frame(self) -> bytes | None:
        """The next frame; None at the end. Raises a NodeFailure."""
        buffer = self._buffer
        while True:
            if len(buffer) >= FRAME_LENGTH_BYTES:
                size = int.from_bytes(buffer[:FRAME_LENGTH_BYTES], "big")
                if size > SEALED_EVENT_BYTES_MAX:
                    self.close()
                    raise WrongAnswer("an event of the node's sealed stream is larger than any right one")
                end = FRAME_LENGTH_BYTES + size
                if len(buffer) >= end:
                    frame = bytes(buffer[FRAME_LENGTH_BYTES:end])
                    del buffer[:end]
                    return frame
            data = await self._body.read()
            if data is None:
                if buffer:
                    raise NodeBroke("the node's sealed stream ended within an event")
                return None
            buffer += data


class _Reading:
    """The events of one answer, in order."""

    def __init__(self, answered: AnsweredRequest, bounds: SealedBounds) -> None:
        self.is_over = False
        self._answered = answered
        self._bounds = bounds
        self._number = 0

    def read(self, message: bytes) -> CheckedEvent:
        """The next event. Raises WrongAnswer where it is not the node's, not the next of this answer, or too much."""
        bounds = self._bounds
        try:
            answer = DECODE(message)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise WrongAnswer("the node's sealed answer is not of the protocol's form") from None
        if self.is_over or self._number > bounds.tokens + EVENTS_MORE:
            raise WrongAnswer("the node's sealed stream does not end where it should")
        try:
            statement = read_event(answer, self._answered, self._number, bounds.tokens)
        except Untrusted as error:
            raise WrongAnswer(f"the node's statement does not fit ({error})", check=Check.SIGNATURE) from None
        _check_believable(statement, bounds)
        self._number += 1
        self.is_over = statement.final
        return CheckedEvent(answer, statement)


def _check_believable(statement: GenerationStatement, bounds: SealedBounds) -> None:
    if statement.input > bounds.input:
        raise WrongAnswer("the node counted more tokens than the sealed request can be", check=Check.TOKENS)
    if statement.images and statement.size not in bounds.sizes:
        raise WrongAnswer("the node made an image of a size that the model has not", check=Check.TOKENS)


def _answered(terms: LockTerms, call: SealedCall, modality: Generating, *, stream: bool) -> AnsweredRequest:
    return AnsweredRequest(terms.identity, terms.lock_id, request_digest(call), modality, stream)
