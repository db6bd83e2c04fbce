"""Nonces that a gateway gives to anyone, and recognises without having remembered them.

A nonce is the second it was made, sixteen random bytes, and a MAC over both under a key of the gateway's. Only used
ones are remembered, until they are too old, so that requests for nonces cannot fill memory; take one only from a node
that may join.
"""

import hmac
import secrets
from collections import OrderedDict

from embedmesh.rules.membership import NONCE_S

NONCE_TIME_BYTES, NONCE_RANDOM_BYTES, NONCE_MAC_BYTES = 6, 16, 16
USED_NONCES_MAX = 10_000  # in two minutes; each is a whole registration of a node that may join


class Nonces:
    """Made, recognised, and taken once. `key` is the gateway's secret."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._used: OrderedDict[bytes, int] = OrderedDict()  # nonce -> the second it was made, oldest use first

    def make(self, now_s: int) -> bytes:
        """38 bytes, good for NONCE_S seconds."""
        start = now_s.to_bytes(NONCE_TIME_BYTES, "big") + secrets.token_bytes(NONCE_RANDOM_BYTES)
        return start + self._mac(start)

    def fresh(self, nonce: bytes, now_s: int) -> bool:
        """Whether it is one of ours, recent, and not taken. Changes nothing."""
        start = nonce[:-NONCE_MAC_BYTES]
        in_time = 0 <= now_s - _made_s(nonce) <= NONCE_S
        return in_time and nonce not in self._used and hmac.compare_digest(self._mac(start), nonce[-NONCE_MAC_BYTES:])

    def take(self, nonce: bytes, now_s: int) -> bool:
        """Whether it is fresh; it is taken from now on."""
        if not self.fresh(nonce, now_s):
            return False
        while self._used and next(iter(self._used.values())) < now_s - 2 * NONCE_S:
            self._used.popitem(last=False)
        if len(self._used) >= USED_NONCES_MAX:
            return False
        self._used[nonce] = _made_s(nonce)
        return True

    def _mac(self, start: bytes) -> bytes:
        return hmac.digest(self._key, start, "sha256")[:NONCE_MAC_BYTES]


def _made_s(nonce: bytes) -> int:
    return int.from_bytes(nonce[:NONCE_TIME_BYTES], "big")
