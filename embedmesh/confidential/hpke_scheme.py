"""Our scheme: HPKE in base mode (RFC 9180) with X25519, HKDF-SHA256 and AES-128-GCM; all is bound to the Terms.

The request carries a random reply secret, from which client and node make the reply's key: another key in each
direction, and none that outlives the call. Requests and replies are padded, so that their lengths say little.
"""

import secrets

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from embedmesh.confidential.failures import SealBroken
from embedmesh.confidential.node_keys import NONCE_BYTES, PREFIX_BYTES, DhKey, read_public
from embedmesh.confidential.statements import digest_of
from embedmesh.rules.confidential import HPKE_SCHEME, SealedCall

SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_128_GCM)
REQUEST_INFO = b"embedmesh hpke-1 request"
REPLY_INFO = b"embedmesh hpke-1 reply"
EVENTS_INFO = b"embedmesh hpke-1 events"
FINAL, NOT_FINAL = b"\1", b"\0"  # additional data of an event
REPLY_SECRET_BYTES = 32
REPLY_SALT_BYTES = 16
REPLY_KEY_BYTES = 16  # of AES-128
SIZE_BYTES = 4  # of a body's length, before the body
PADDED_BYTES_MIN = 256  # most requests have one short text: all of them look alike


class Terms(msgspec.Struct, frozen=True, omit_defaults=True):
    """What request and reply are bound to: changed by anybody on the way, neither can be opened.

    `operation` is what is asked for, if that is not embeddings: see `rules.sealed_generation.operation_of`.
    """

    node_id: str
    model_name: str
    request_id: str
    lock: int
    expires_ms: int
    operation: str = ""

    @classmethod
    def of(cls, call: SealedCall, node_id: str, operation: str = "") -> "Terms":
        """The terms of a call, as the node of that id reads them."""
        return cls(node_id, call.model_name, call.request_id, call.lock, call.expires_ms, operation)


class HpkeReplies:
    """What the client keeps of a request: it opens the reply."""

    def __init__(self, secret: bytes, digest: bytes, terms: Terms) -> None:
        self._secret = secret
        self._digest = digest
        self._terms = terms

    def open(self, sealed: bytes) -> bytes:
        """The body of the reply. Raises SealBroken."""
        salt, ciphertext = sealed[:REPLY_SALT_BYTES], sealed[REPLY_SALT_BYTES:]
        cipher, nonce = _reply_cipher(self._secret, salt, self._digest, self._terms)
        try:
            return unpad(cipher.decrypt(nonce, ciphertext, None))
        except InvalidTag:
            raise SealBroken from None

    def events(self) -> "EventOpener":
        """Opens the events of a reply that is a stream."""
        return EventOpener(self._secret, self._digest, self._terms)


class HpkeOpened:
    """A request that the node has opened."""

    def __init__(self, secret: bytes, digest: bytes, terms: Terms, body: bytes) -> None:
        self._secret = secret
        self._digest = digest
        self._terms = terms
        self.body = body

    def seal_reply(self, body: bytes) -> bytes:
        """A reply for who sealed the request; under a key of its own, however often it is called."""
        salt = secrets.token_bytes(REPLY_SALT_BYTES)
        cipher, nonce = _reply_cipher(self._secret, salt, self._digest, self._terms)
        return salt + cipher.encrypt(nonce, pad(body), None)

    def events(self) -> "EventSealer":
        """Seals the events of a reply that is a stream, under a key of its own."""
        return EventSealer(self._secret, self._digest, self._terms)


class EventSealer:
    """One stream's key. Each event has its place in its nonce, and whether it is the last one beside its ciphertext:
    dropped, repeated, reordered or cut, the rest cannot be opened.
    """

    def __init__(self, secret: bytes, digest: bytes, terms: Terms) -> None:
        self._salt = secrets.token_bytes(REPLY_SALT_BYTES)
        self._key = _EventKey(secret, self._salt, digest, terms)

    def seal(self, body: bytes, *, final: bool) -> bytes:
        """The next event; the first one brings the salt along."""
        first = not self._key.number
        cipher, nonce, mark = self._key.next(final=final)
        sealed = cipher.encrypt(nonce, pad(body), mark)
        return self._salt + sealed if first else sealed


class EventOpener:
    """The same for who reads it."""

    def __init__(self, secret: bytes, digest: bytes, terms: Terms) -> None:
        self._of = secret, digest, terms
        self._key: _EventKey | None = None

    def open(self, sealed: bytes, *, final: bool) -> bytes:
        """The body of the next event. Raises SealBroken."""
        if self._key is None:
            secret, digest, terms = self._of
            self._key = _EventKey(secret, sealed[:REPLY_SALT_BYTES], digest, terms)
            sealed = sealed[REPLY_SALT_BYTES:]
        cipher, nonce, mark = self._key.next(final=final)
        try:
            return unpad(cipher.decrypt(nonce, sealed, mark))
        except (InvalidTag, ValueError):
            raise SealBroken from None


class _EventKey:
    """A stream's cipher, and the nonces of its events: four bytes of its own, then their number as 64 bits."""

    def __init__(self, secret: bytes, salt: bytes, digest: bytes, terms: Terms) -> None:
        size = REPLY_KEY_BYTES + PREFIX_BYTES
        derived = HKDF(SHA256(), size, salt=salt + digest, info=_info(EVENTS_INFO, terms)).derive(secret)
        self._cipher = AESGCM(derived[:REPLY_KEY_BYTES])
        self._prefix = derived[REPLY_KEY_BYTES:]
        self.number = 0  # of the next event

    def next(self, *, final: bool) -> tuple[AESGCM, bytes, bytes]:
        """Cipher, nonce and additional data of the next event."""
        nonce = self._prefix + self.number.to_bytes(NONCE_BYTES - PREFIX_BYTES, "big")
        self.number += 1
        return self._cipher, nonce, FINAL if final else NOT_FINAL


def seal(body: bytes, node_key: bytes, terms: Terms) -> tuple[bytes, HpkeReplies]:
    """Seal a request: the encapsulated key and the ciphertext. Raises ValueError where the node's key is none."""
    secret = secrets.token_bytes(REPLY_SECRET_BYTES)
    plaintext = secret + pad(body, REPLY_SECRET_BYTES)
    ciphertext = SUITE.encrypt(plaintext, read_public(node_key), _info(REQUEST_INFO, terms))
    return ciphertext, HpkeReplies(secret, digest_of(HPKE_SCHEME, ciphertext), terms)


def open_sealed(key: DhKey, ciphertext: bytes, terms: Terms) -> HpkeOpened:
    """Open a request for this key. Raises SealBroken, whatever is wrong."""
    try:
        plaintext = key.decrypt(SUITE, ciphertext, _info(REQUEST_INFO, terms))
    except (InvalidTag, ValueError):
        raise SealBroken from None
    body = unpad(plaintext, REPLY_SECRET_BYTES)
    return HpkeOpened(plaintext[:REPLY_SECRET_BYTES], digest_of(HPKE_SCHEME, ciphertext), terms, body)


def padded_size(size: int) -> int:
    """The bucket of a plaintext of that many bytes: at least 256, at most a sixteenth longer.

    Padmé (Nikitin and others, "Reducing Metadata Leakage from Encrypted Files and Communication with PURBs", 2019): of
    a size of e + 1 bits, the lowest e - len(e) bits are rounded up to zeros, where len(e) is the number of bits of e.
    """
    if size <= PADDED_BYTES_MIN:
        return PADDED_BYTES_MIN
    exponent = size.bit_length() - 1
    low = (1 << exponent - exponent.bit_length()) - 1
    return (size + low) & ~low


def pad(body: bytes, before: int = 0) -> bytes:
    """Its length, the body, and zeros: `before` bytes stand before them in the same bucket."""
    size = SIZE_BYTES + len(body)
    return len(body).to_bytes(SIZE_BYTES, "big") + body + bytes(padded_size(before + size) - before - size)


def unpad(plaintext: bytes, before: int = 0) -> bytes:
    """The body behind the first `before` bytes. Raises SealBroken where it was padded in another way."""
    start = before + SIZE_BYTES
    end = start + int.from_bytes(plaintext[before:start], "big")
    if len(plaintext) != padded_size(end) or plaintext.count(0, end) != len(plaintext) - end:
        raise SealBroken
    return plaintext[start:end]


def _reply_cipher(secret: bytes, salt: bytes, digest: bytes, terms: Terms) -> tuple[AESGCM, bytes]:
    """The cipher of one reply, and its nonce: neither is used a second time, for the salt is random."""
    info = _info(REPLY_INFO, terms)
    derived = HKDF(SHA256(), REPLY_KEY_BYTES + NONCE_BYTES, salt=salt + digest, info=info).derive(secret)
    return AESGCM(derived[:REPLY_KEY_BYTES]), derived[REPLY_KEY_BYTES:]


def _info(purpose: bytes, terms: Terms) -> bytes:
    return purpose + msgspec.json.encode(terms)
