"""Join tokens: an operator hands one to a new node, so that gateway and node can recognise each other.

The token's secret proves the node to the gateway, its fingerprint the gateway to the node. The token itself is never
sent: the node sends the invite's id and a proof. The gateway keeps a hash of the secret. That hash is enough to make
proofs, so a thief of the store can use the invites that are still open in it, and no others.
"""

import base64
import hashlib
import hmac
import re
import secrets
import string
import zlib
from dataclasses import dataclass, field
from typing import Self

from embedmesh.signing.identity import fingerprint

TOKEN_PREFIX = "emj_"
TOKEN_ALPHABET = string.digits + string.ascii_letters
INVITE_ID_CHARS = 12
INVITE_SECRET_CHARS = 32  # 190 bits
TOKEN_FORM = re.compile(
    rf"{TOKEN_PREFIX}([0-9A-Za-z]{{{INVITE_ID_CHARS}}})([0-9A-Za-z]{{{INVITE_SECRET_CHARS}}})([0-9A-Za-z_-]{{43}})[0-9A-Za-z_-]{{6}}"
)


@dataclass(frozen=True, slots=True)
class Invite:
    """A join token in its parts. Only `invite_id` may be shown again."""

    invite_id: str
    secret: str = field(repr=False)
    fingerprint: str  # of the gateway's public key

    @property
    def text(self) -> str:
        """The token: 97 characters, by fixed lengths, the last six a CRC-32 in base64url."""
        start = TOKEN_PREFIX + self.invite_id + self.secret + self.fingerprint
        return start + _checksum(start)

    @classmethod
    def parse(cls, text: str) -> Self:
        """A token's parts. Raises ValueError for an invalid or mistyped one; the message does not repeat it."""
        parts = TOKEN_FORM.fullmatch(text)
        if parts is None or (invite := cls(*parts.groups())).text != text:
            raise ValueError("This is not a whole join token: copy all 97 characters, from `emj_` on.")
        return invite


def make_invite(gateway_public_key: bytes) -> Invite:
    """A new token for the nodes of one gateway."""
    return Invite(_random(INVITE_ID_CHARS), _random(INVITE_SECRET_CHARS), fingerprint(gateway_public_key))


def verifier(secret: str) -> bytes:
    """The SHA-256 of a token's secret, which the gateway keeps."""
    return hashlib.sha256(secret.encode("ascii")).digest()


def proof(secret: str, statement: bytes) -> bytes:
    """Proof that the maker of this statement holds the token: HMAC-SHA256 under the verifier, 32 bytes."""
    return hmac.digest(verifier(secret), statement, "sha256")


def check_proof(verifier: bytes, statement: bytes, proof: bytes) -> bool:
    """Whether the statement's maker holds the token. Takes the same time whatever is wrong."""
    return hmac.compare_digest(hmac.digest(verifier, statement, "sha256"), proof)


def _random(chars: int) -> str:
    return "".join(secrets.choice(TOKEN_ALPHABET) for _ in range(chars))


def _checksum(start: str) -> str:
    return base64.urlsafe_b64encode(zlib.crc32(start.encode("ascii")).to_bytes(4)).rstrip(b"=").decode("ascii")
