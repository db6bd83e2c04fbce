"""A sealed request for chat, completions or an image that a sidecar has looked at, and how its answer is sealed."""

from collections.abc import Callable

import msgspec

from embedmesh.confidential.generation_statements import AnsweredRequest, sign_event
from embedmesh.confidential.sdk_scheme import SealedParts
from embedmesh.confidential.statements import digest_of
from embedmesh.rules.confidential import SealedAnswer, SealedCall
from embedmesh.rules.sealed_generation import SignedCounts
from embedmesh.signing.identity import Identity

NOTHING = SealedParts(b"", b"", b"", b"")
NO_COUNTS = SignedCounts()
ENCODE = msgspec.msgpack.Encoder().encode
SealEvent = Callable[[bytes, bool], SealedParts]
"""Seals the next event, which may be the final one."""


def replay_digest(call: SealedCall) -> bytes:
    """What tells two sealed requests apart: what the cipher has checked, as an X25519 key is written in two ways."""
    return digest_of(call.scheme, call.ciphertext, salt=call.salt, nonce=call.nonce)


class SeenGeneration:
    """`replay` tells whether the same was sealed before; `body` is None if it cannot be opened, whatever was wrong."""

    def __init__(
        self, identity: Identity, answered: AnsweredRequest, replay: bytes, opened: tuple[bytes, SealEvent] | None
    ) -> None:
        self._identity = identity
        self._answered = answered
        self._number = 0  # of the next event
        self.replay = replay
        self.body: bytes | None = None if opened is None else opened[0]
        self._seal: SealEvent | None = None if opened is None else opened[1]

    def seal(self, body: bytes, counts: SignedCounts, time_ms: int, *, final: bool = True) -> bytes:
        """The message with the next event: the body for its caller alone, and the node's word on it."""
        assert self._seal is not None
        return self._message(self._seal(body, final), counts, 200, time_ms, final=final)

    def refuse(self, time_ms: int, body: bytes | None = None) -> bytes:
        """The message that refuses; `body` says why, where the request was opened. It is the only event."""
        parts = NOTHING
        if body is not None:
            assert self._seal is not None
            parts = self._seal(body, True)
        return self._message(parts, NO_COUNTS, 400, time_ms, final=True)

    def _message(self, parts: SealedParts, counts: SignedCounts, status: int, time_ms: int, *, final: bool) -> bytes:
        statement, signature = sign_event(
            self._identity,
            self._answered,
            parts.sealed,
            counts,
            number=self._number,
            final=final,
            status=status,
            time_ms=time_ms,
            nonce=parts.nonce,
        )
        self._number += 1
        return ENCODE(SealedAnswer(statement, signature, *parts))
