"""The same request again, with an `Idempotency-Key`: the ledger remembers who came first and keeps the reply."""

from typing import Any

import msgspec

from embedmesh.rules.errors import InvalidValue, RateLimited
from embedmesh.rules.limits import (
    IDEMPOTENCY_KEY_CHARS_MAX,
    KEPT_REPLIES_BYTES_MAX,
    KEPT_REPLY_BYTES_MAX,
)

FULL_AGAIN_S = 3_600.0  # replies are forgotten after a day


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a reply that was delivered: enough to make the same bytes again. `cost` is in nano-USD."""

    result: Any
    cost: int


def check_key(key: str) -> None:
    """Raise InvalidValue if this cannot be an `Idempotency-Key`."""
    if not 0 < len(key) <= IDEMPOTENCY_KEY_CHARS_MAX:
        raise InvalidValue(f"An Idempotency-Key has 1 to {IDEMPOTENCY_KEY_CHARS_MAX} characters.")


def check_room(reply_bytes: int, kept_bytes: int) -> None:
    """Raise InvalidValue or RateLimited if a reply of this size cannot be kept beside those of the account."""
    if reply_bytes > KEPT_REPLY_BYTES_MAX:
        raise InvalidValue(
            f"This reply may be too large to be kept for an Idempotency-Key: at most {KEPT_REPLY_BYTES_MAX:,} bytes "
            "are. Ask for less at once, or leave the key out."
        )
    if kept_bytes + reply_bytes > KEPT_REPLIES_BYTES_MAX:
        raise RateLimited(
            "This account has as many replies kept for Idempotency-Keys as it may. They are kept for a day: wait, or "
            "leave the key out.",
            retry_after_s=FULL_AGAIN_S,
        )


def pack(kept: Kept) -> bytes:
    """For the ledger."""
    return msgspec.msgpack.encode(kept)


def unpack(data: bytes, result: type[msgspec.Struct]) -> Kept:
    """From the ledger."""
    loaded = msgspec.msgpack.decode(data, type=Kept)
    return Kept(msgspec.convert(loaded.result, result), loaded.cost)
