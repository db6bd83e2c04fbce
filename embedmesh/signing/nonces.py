"""Nonces that a gateway hands to whoever asks, and recognises without having remembered them.

A nonce is the second it was made, sixteen random bytes, and a MAC over both under a key of the gateway's. So that
nobody can fill our memory by asking, only those that were used are remembered, until they are too old anyway.
"""

import hmac
import secrets
from collections import OrderedDict

from embedmesh.rules.membership import NONCE_S

TIME_BYTES, RANDOM_BYTES, MAC_BYTES = 6, 16, 16
USED_MAX = 10_000  # in a minute; each is a whole registration, so that is a flood


class Nonces:
    """Made, recognised, and taken once. `key` is the gateway's secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._used: OrderedDict[bytes, int] = OrderedDict()  # nonce -> the second it was made, oldest use first

    def make(self, now_s: int) -> bytes:
        """38 bytes, good for NONCE_S seconds."""
        start = now_s.to_bytes(TIME_BYTES, "big") + secrets.token_bytes(RANDOM_BYTES)
        return start + self._mac(start)

    def take(self, nonce: bytes, now_s: int) -> bool:
        """Whether it is one of ours, fresh, and was not taken before."""
        start = nonce[:-MAC_BYTES]
        made_s = int.from_bytes(start[:TIME_BYTES], "big")
        if not hmac.compare_digest(self._mac(start), nonce[-MAC_BYTES:]) or not 0 <= now_s - made_s <= NONCE_S:
            return False
        while self._used and next(iter(self._used.values())) < now_s - 2 * NONCE_S:
            self._used.popitem(last=False)
        if nonce in self._used or len(self._used) >= USED_MAX:
            return False
        self._used[nonce] = made_s
        return True

    def _mac(self, start: bytes) -> bytes:
        return hmac.digest(self._key, start, "sha256")[:MAC_BYTES]
