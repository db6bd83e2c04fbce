"""Session keys: a gateway and a node agree them at registration, and sign every request and reply with them.

Both halves are ephemeral X25519 keys (RFC 7748), so that a stolen identity does not reveal earlier keys. Each side's
half is signed by its identity: the node's inside its registration, the gateway's by signing the transcript.

Each side has a session of its own for its requests. Otherwise a request of the gateway could be sent back to it as if
it were the node's.
"""

import hashlib
from dataclasses import dataclass, field
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from embedmesh.signing.identity import PUBLIC_KEY_BYTES

NODE_ID_CHARS = 37
NONCE_BYTES_MAX = 64
SESSION_KEY_BYTES = 32
KEY_ID_BYTES = 8  # tells apart a handful of keys, no more
SESSION_INFO = b"embedmesh session v1"


@dataclass(frozen=True, slots=True)
class Session:
    """A shared key, and its public name of 16 hex digits."""

    key_id: str
    key: bytes = field(repr=False)


class Sessions(NamedTuple):
    """The two sessions of a gateway and a node: one for the requests, and their replies, of each side."""

    of_gateway: Session
    of_node: Session


class Ephemeral:
    """One side's half. Made for one registration, then dropped."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()  # 32 bytes

    def agree(self, their_public: bytes, transcript: bytes) -> Sessions:
        """The sessions that follow from both halves and the transcript, by HKDF-SHA256 (RFC 5869).

        Raises ValueError where the other half is of low order (RFC 7748 section 6.1), or the transcript has other keys.
        """
        if {transcript[:PUBLIC_KEY_BYTES], transcript[PUBLIC_KEY_BYTES : 2 * PUBLIC_KEY_BYTES]} != {
            self.public,
            their_public,
        }:
            raise ValueError("the transcript does not have these two keys")
        shared = self._key.exchange(X25519PublicKey.from_public_bytes(their_public))  # refuses a result of zeros
        salt = hashlib.sha256(transcript).digest()
        derived = HKDF(SHA256(), 2 * (SESSION_KEY_BYTES + KEY_ID_BYTES), salt=salt, info=SESSION_INFO).derive(shared)
        keys, ids = derived[: 2 * SESSION_KEY_BYTES], derived[2 * SESSION_KEY_BYTES :]
        return Sessions(
            Session(ids[:KEY_ID_BYTES].hex(), keys[:SESSION_KEY_BYTES]),
            Session(ids[KEY_ID_BYTES:].hex(), keys[SESSION_KEY_BYTES:]),
        )


def transcript(
    *, node_public: bytes, gateway_public: bytes, node_id: str, gateway_public_key: bytes, nonce: bytes
) -> bytes:
    """Both halves and both identities: the gateway signs it, so that the node knows the half is its gateway's.

    `node_public` and `gateway_public` are the ephemeral halves, `gateway_public_key` is the identity's, `nonce` the
    gateway's of this registration. One after the other; all but the nonce have a fixed length. Raises ValueError.
    """
    node = node_id.encode("ascii")
    if not len(node_public) == len(gateway_public) == len(gateway_public_key) == PUBLIC_KEY_BYTES:
        raise ValueError("a public key has 32 bytes")
    if len(node) != NODE_ID_CHARS or len(nonce) > NONCE_BYTES_MAX:
        raise ValueError("the node id or the nonce has the wrong length")
    return node_public + gateway_public + node + gateway_public_key + nonce
