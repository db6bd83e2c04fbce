"""Identities: Ed25519 key pairs (RFC 8032). A node makes its own; a gateway's follows from its key secret.

Every signature covers its purpose, so that it is worth nothing under another.
"""

import base64
import hashlib
import secrets
from pathlib import Path
from typing import Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from embedmesh.rules.errors import SetupError
from embedmesh.signing.private import make_once, read_private

SEED_BYTES = 32
PUBLIC_KEY_BYTES = 32
SIGNATURE_BYTES = 64
NODE_ID_HEX_DIGITS = 32  # 128 bits: nobody finds another key with the same id
NODE_IDENTITY = "node identity"


class Identity:
    """A private key that signs."""

    def __init__(self, seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(seed)
        self.public_key = self._key.public_key().public_bytes_raw()  # 32 bytes

    @classmethod
    def new(cls) -> Self:
        """One that nobody knows, and that is gone when we end."""
        return cls(secrets.token_bytes(SEED_BYTES))

    @classmethod
    def load(cls, path: Path) -> Self:
        """A node's identity in the file: 32 bytes, mode 0600, made at first start. Raises SetupError."""
        try:
            if not path.exists():
                make_once(path, secrets.token_bytes(SEED_BYTES))
        except OSError as error:
            raise SetupError(f"Cannot use the {NODE_IDENTITY} {path}: {error.strerror}.") from None
        return cls.read(path, NODE_IDENTITY, "restore it from a backup, or remove it and join again")

    @classmethod
    def read(cls, path: Path, what: str, remedy: str) -> Self:
        """The identity in a file that is there; `what` names it. Raises SetupError."""
        try:
            seed = read_private(path, what)
        except OSError as error:
            raise SetupError(f"Cannot use the {what} {path}: {error.strerror}.") from None
        if len(seed) != SEED_BYTES:
            raise SetupError(f"The {what} {path} must have {SEED_BYTES} bytes: {remedy}.")
        return cls(seed)

    @classmethod
    def from_seed(cls, secret: bytes, info: bytes) -> Self:
        """The identity that follows from a secret, by HKDF-SHA256 (RFC 5869). `info` tells several of them apart."""
        return cls(HKDF(SHA256(), SEED_BYTES, salt=None, info=info).derive(secret))

    def sign(self, purpose: bytes, message: bytes) -> bytes:
        """64 bytes over the purpose and the message."""
        return self._key.sign(_for(purpose, message))

    def sign_raw(self, message: bytes) -> bytes:
        """64 bytes over the message alone, for a foreign protocol that has no purposes."""
        return self._key.sign(message)


def verify(public_key: bytes, purpose: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the key's owner signed this for this purpose. Junk is False."""
    return verify_raw(public_key, _for(purpose, message), signature)


def verify_raw(public_key: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the key's owner signed just the message. Junk is False."""
    if len(public_key) != PUBLIC_KEY_BYTES or len(signature) != SIGNATURE_BYTES:
        return False
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, message)
    except (InvalidSignature, ValueError):
        return False
    return True


def node_id(public_key: bytes) -> str:
    """`node_` and 32 hex digits, from the public key alone."""
    return "node_" + hashlib.sha256(public_key).hexdigest()[:NODE_ID_HEX_DIGITS]


def fingerprint(public_key: bytes) -> str:
    """A public key's SHA-256 as 43 characters of unpadded base64url (RFC 4648): what a join token pins."""
    return base64.urlsafe_b64encode(hashlib.sha256(public_key).digest()).rstrip(b"=").decode("ascii")


def _for(purpose: bytes, message: bytes) -> bytes:
    assert b"\0" not in purpose  # it ends the purpose
    return b"embedmesh " + purpose + b"\0" + message
