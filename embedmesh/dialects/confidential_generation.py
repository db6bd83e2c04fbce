"""The envelopes of confidential chat, completions and images: whole replies, and events. Nothing is opened."""

from typing import Any

import orjson

from embedmesh.dialects.confidential import plaintext_bytes_max, read_envelope, sealed_members
from embedmesh.rules.confidential import SealedAnswer, SealedCall
from embedmesh.rules.exchange import Reply
from embedmesh.rules.sealed_generation import SignedCounts

__all__ = ["event", "parse", "plaintext_bytes_max", "render"]


def parse(body: bytes) -> tuple[SealedCall, bool]:
    """What a node gets once the lock is known, and whether it is to be a stream. Raises a CallerFailure."""
    envelope, call = read_envelope(body)
    return call, bool(envelope.stream)


def render(scheme: str, answer: SealedAnswer, counts: SignedCounts, headers: dict[str, str]) -> Reply:
    """A whole reply. Images have no `usage`."""
    return Reply(headers, event(scheme, answer, counts, known=True))


def event(scheme: str, answer: SealedAnswer, counts: SignedCounts, *, known: bool) -> bytes:
    """One event of a stream: JSON, with `usage` once it is known."""
    members: dict[str, Any] = sealed_members(scheme, answer)
    if known and not counts.images:
        members["usage"] = {
            "prompt_tokens": counts.input,
            "completion_tokens": counts.output,
            "total_tokens": counts.input + counts.output,
            "prompt_tokens_details": {"cached_tokens": counts.cached},
        }
    return orjson.dumps(members)
