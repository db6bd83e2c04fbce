"""Encrypted columns, for what must be read again: session keys, invites, other servers' tokens, kept replies.

AES-256-GCM (NIST SP 800-38D) under a key that follows from the key secret, with a random nonce before each ciphertext.
Purpose and owner are authenticated with it, so that one row's secret is worth nothing in another.
"""

import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE_BYTES = 12
SEAL_INFO = b"embedmesh sealed v1"


class Seal:
    """Encrypts and decrypts under one key secret."""

    def __init__(self, key_secret: bytes) -> None:
        self._aead = AESGCM(HKDF(SHA256(), 32, salt=None, info=SEAL_INFO).derive(key_secret))

    def close(self, plain: bytes, *, what: str, whose: str) -> bytes:
        """The ciphertext; empty for an empty text."""
        if not plain:
            return b""
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, plain, _context(what, whose))

    def open(self, sealed: bytes, *, what: str, whose: str) -> bytes:
        """What was sealed. Raises ValueError where it is not what `close` made, for the same purpose and owner."""
        if not sealed:
            return b""
        try:
            return self._aead.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _context(what, whose))
        except (InvalidTag, ValueError):  # too short to be one
            raise ValueError("this was sealed for something else, or was changed") from None


def _context(what: str, whose: str) -> bytes:
    return f"{what}\0{whose}".encode()
