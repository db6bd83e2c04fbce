"""A sidecar's sealed events as callers get them, and what is read of the statements beside them."""

from typing import Protocol

from embedmesh.flow.confidential import REFUSED
from embedmesh.rules.confidential import SealedAnswer, SealedCall
from embedmesh.rules.errors import Failure
from embedmesh.rules.exchange import Reply
from embedmesh.rules.generation import Piece
from embedmesh.rules.lock_failures import ConfidentialRefused
from embedmesh.rules.sealed_generation import CheckedEvent, GenerationStatement, SealedStream, SignedCounts


class GenerationEnvelopes(Protocol):
    """How envelopes are written. Knows the rules only."""

    def parse(self, body: bytes) -> tuple[SealedCall, bool]:
        """What a node gets once the lock is known, and whether it is to be a stream. Raises a CallerFailure."""
        ...

    def plaintext_bytes_max(self, call: SealedCall) -> int:
        """What the ciphertext can hold."""
        ...

    def render(self, scheme: str, answer: SealedAnswer, counts: SignedCounts, headers: dict[str, str]) -> Reply:
        """A whole reply."""
        ...

    def event(self, scheme: str, answer: SealedAnswer, counts: SignedCounts, *, known: bool) -> bytes:
        """One event of a stream: JSON. `known`: its counts are what will be charged, as far as it is for the node."""
        ...

    def refusal(self, failure: Failure) -> bytes:
        """The envelope of a failure."""
        ...


class SealedPieces:
    """A node's sealed events as the caller gets them. Implements `PieceStream`."""

    def __init__(self, stream: SealedStream, dialect: GenerationEnvelopes, scheme: str) -> None:
        self.statement: GenerationStatement | None = None  # of the last event
        self._stream = stream
        self._dialect = dialect
        self._scheme = scheme

    @property
    def is_whole(self) -> bool:
        return self.statement is not None and self.statement.final

    async def next(self) -> Piece | None:
        event = await self._stream.next()
        if event is None:
            return None
        check_not_refused(event, self._scheme)
        self.statement = said = event.statement
        known = said.final or not said.estimated
        data = self._dialect.event(self._scheme, event.answer, counts_of(said), known=known)
        return Piece(data, finished=said.final)

    def close(self) -> None:
        self._stream.close()


def check_not_refused(event: CheckedEvent, scheme: str) -> None:
    """Raise ConfidentialRefused where the node has refused: why is sealed."""
    if event.statement.status != 200:
        refused = ConfidentialRefused(REFUSED)
        refused.answer = scheme, event.answer  # type: ignore[assignment]  # of a call: one of the two
        raise refused


def counts_of(said: GenerationStatement) -> SignedCounts:
    """What a statement says of what was used."""
    return SignedCounts(said.input, said.output, said.cached, said.images, said.size, said.estimated)
