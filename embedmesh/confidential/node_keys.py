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
FIELD = 2**255 - 19  # a key is the little-endian number of a point below it
LOW_ORDER = {  # all points whose order divides eight: with them, anybody's shared secret is zeros
    0,
    1,
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
    FIELD - 1,
}


def read_public(raw: bytes) -> X25519PublicKey:
    """A public key in its one form. Raises ValueError for a wrong length, low order, and another form of a point.

    RFC 7748 has readers ignore the highest bit and take numbers modulo FIELD: then two keys would be one.
    """
    number = int.from_bytes(raw, "little")
    if len(raw) != DH_KEY_BYTES or number >= FIELD or number in LOW_ORDER:
        raise ValueError("not an X25519 public key in its one form")
    return X25519PublicKey.from_public_bytes(raw)


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
        """The shared secret, 32 bytes. Raises ValueError for what `read_public` refuses."""
        return self._key.exchange(read_public(their_public))  # refuses zeros, too

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
