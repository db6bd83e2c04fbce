"""A node's keys for confidential requests: X25519 private keys (RFC 7748) that live in memory only.

A reply's nonce is four random bytes of the key and a counter of it, so that no two replies under one key can share one.
"""

import itertools
import secrets
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import Suite

DH_KEY_BYTES = 32
NONCE_BYTES = 12
PREFIX_BYTES = 4  # of a reply's nonce, random; the counter has the other eight


class DhKey:
    """One private key, and the nonces of what it seals. It cannot be copied, pickled or printed."""

    __slots__ = ("_counter", "_key", "_prefix", "public")

    def __init__(self, private: bytes, prefix: bytes) -> None:
        """From its 32 bytes, and the four that its replies' nonces begin with; `new` is for all but tests."""
        assert len(prefix) == PREFIX_BYTES
        self._key = X25519PrivateKey.from_private_bytes(private)
        self._prefix = prefix
        self._counter = itertools.count(1)
        self.public = self._key.public_key().public_bytes_raw()  # 32 bytes

    @classmethod
    def new(cls) -> "DhKey":
        """A random one."""
        return cls(secrets.token_bytes(DH_KEY_BYTES), secrets.token_bytes(PREFIX_BYTES))

    def exchange(self, their_public: bytes) -> bytes:
        """The shared secret, 32 bytes. Raises ValueError for a wrong length and a point of low order."""
        return self._key.exchange(X25519PublicKey.from_public_bytes(their_public))  # refuses a result of zeros

    def decrypt(self, suite: Suite, ciphertext: bytes, info: bytes) -> bytes:
        """The plaintext of an HPKE ciphertext. Raises InvalidTag, whatever is wrong."""
        return suite.decrypt(ciphertext, self._key, info)

    def reply_nonce(self) -> bytes:
        """12 bytes that this key has never given before."""
        return self._prefix + next(self._counter).to_bytes(NONCE_BYTES - PREFIX_BYTES, "big")

    def is_reply_nonce(self, nonce: bytes) -> bool:
        """Whether the nonce looks like one of this key's replies: of a caller's random ones, one in 2**32 does."""
        return nonce.startswith(self._prefix)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a private key is not copied")
