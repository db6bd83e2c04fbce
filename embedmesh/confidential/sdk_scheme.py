"""The scheme of the published SDKs: X25519, HKDF-SHA256 over a salt, AES-256-GCM, BLAKE2b of the plaintext.

Request and reply are under one key, each under its own nonce, and nothing is bound to the request but the key: so what
came as a request is refused as a reply, and the other way around.
"""

import hashlib
import secrets
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.node_keys import DH_KEY_BYTES, NONCE_BYTES, PREFIX_BYTES, DhKey
from embedmesh.rules.confidential import SDK_SCHEME, SealedCall
from embedmesh.signing.identity import PUBLIC_KEY_BYTES, SIGNATURE_BYTES, Identity, verify_raw

SALT_BYTES = 16
HASH_BYTES = 32
TAG_BYTES = 16
SDK_KEY_BYTES = 32  # of AES-256
ED25519_FLAG = b"\0"  # of a response signature: which kind it is


class SdkSealed(NamedTuple):
    """What a client sends, besides the model and the lock: six members of the envelope."""

    client_key: bytes
    node_key: bytes
    salt: bytes
    nonce: bytes
    ciphertext: bytes
    body_hash: bytes


class SealedParts(NamedTuple):
    """A sealed reply, with what the SDK's scheme says beside it. All four go into a SealedAnswer."""

    sealed: bytes
    nonce: bytes
    response_hash: bytes
    response_signature: bytes


class SdkReplies:
    """What the client keeps of a request: it opens the replies."""

    def __init__(self, cipher: AESGCM, request_nonce: bytes) -> None:
        self._cipher = cipher
        self._request_nonce = request_nonce

    def open(self, nonce: bytes, ciphertext: bytes, response_hash: bytes) -> bytes:
        """The plaintext. Raises SealBroken, also for what the client itself has sealed."""
        if nonce == self._request_nonce:
            raise SealBroken
        return _open(self._cipher, nonce, ciphertext, response_hash)


class SdkOpened:
    """A request that the node has opened."""

    def __init__(self, key: DhKey, cipher: AESGCM, plaintext: bytes) -> None:
        self._key = key
        self._cipher = cipher
        self.plaintext = plaintext

    def seal_reply(self, plaintext: bytes, identity: Identity) -> SealedParts:
        """A reply for who sealed the request, under a nonce of its own, signed by the node's identity."""
        nonce = self._key.reply_nonce()  # never the request's: `open_sealed` refuses what begins like one of these
        digest = plaintext_hash(plaintext)
        signature = ED25519_FLAG + identity.sign_raw(digest) + identity.public_key
        return SealedParts(self._cipher.encrypt(nonce, plaintext, None), nonce, digest, signature)


def plaintext_hash(plaintext: bytes) -> bytes:
    """BLAKE2b with a digest of 32 bytes. It is sent in the clear: a short plaintext can be guessed by it."""
    return hashlib.blake2b(plaintext, digest_size=HASH_BYTES).digest()


def seal(
    plaintext: bytes,
    node_key: bytes,
    *,
    private: bytes | None = None,
    salt: bytes | None = None,
    nonce: bytes | None = None,
) -> tuple[SdkSealed, SdkReplies]:
    """Seal a request for the node of that key. Raises ValueError where it is no key.

    `private`, `salt` and `nonce` are random; only tests give them.
    """
    own = DhKey(private or secrets.token_bytes(DH_KEY_BYTES), bytes(PREFIX_BYTES))
    salt = salt or secrets.token_bytes(SALT_BYTES)
    nonce = nonce or secrets.token_bytes(NONCE_BYTES)
    cipher = _cipher(own.exchange(node_key), salt)
    ciphertext = cipher.encrypt(nonce, plaintext, None)
    sealed = SdkSealed(own.public, node_key, salt, nonce, ciphertext, plaintext_hash(plaintext))
    return sealed, SdkReplies(cipher, nonce)


def open_sealed(key: DhKey, call: SealedCall) -> SdkOpened:
    """Open a request for this key. Raises SealBroken, whatever is wrong."""
    lengths = len(call.salt), len(call.nonce), len(call.body_hash)
    if call.scheme != SDK_SCHEME or call.node_key != key.public or lengths != (SALT_BYTES, NONCE_BYTES, HASH_BYTES):
        raise SealBroken
    if key.is_reply_nonce(call.nonce):  # a reply of ours that comes back as a request
        raise SealBroken
    try:
        cipher = _cipher(key.exchange(call.client_key), call.salt)
    except ValueError:
        raise SealBroken from None
    return SdkOpened(key, cipher, _open(cipher, call.nonce, call.ciphertext, call.body_hash))


def check_response(public_key: bytes, response_hash: bytes, response_signature: bytes) -> None:
    """Check the node's signature over the hash of its reply. Raises SealBroken."""
    end = len(ED25519_FLAG) + SIGNATURE_BYTES
    if (
        len(response_signature) != end + PUBLIC_KEY_BYTES
        or not response_signature.startswith(ED25519_FLAG)
        or response_signature[end:] != public_key
        or not verify_raw(public_key, response_hash, response_signature[len(ED25519_FLAG) : end])
    ):
        raise SealBroken


def _cipher(shared: bytes, salt: bytes) -> AESGCM:
    return AESGCM(HKDF(SHA256(), SDK_KEY_BYTES, salt=salt, info=b"").derive(shared))


def _open(cipher: AESGCM, nonce: bytes, ciphertext: bytes, digest: bytes) -> bytes:
    if len(nonce) != NONCE_BYTES or len(ciphertext) < TAG_BYTES:
        raise SealBroken
    try:
        plaintext = cipher.decrypt(nonce, ciphertext, None)
    except InvalidTag:
        raise SealBroken from None
    if not secrets.compare_digest(plaintext_hash(plaintext), digest):
        raise SealBroken
    return plaintext
