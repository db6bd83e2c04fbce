"""HPKE in base mode once more, from the text of RFC 9180, on HMAC alone: for the secrets that no library lets out."""

import hashlib
import hmac

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEM_SUITE = b"KEM" + bytes.fromhex("0020")  # DHKEM(X25519, HKDF-SHA256)
SUITE = b"HPKE" + bytes.fromhex("002000010001")  # with HKDF-SHA256 and AES-128-GCM


def extract(suite: bytes, salt: bytes, label: bytes, ikm: bytes) -> bytes:
    """LabeledExtract, section 4."""
    return hmac.digest(salt, b"HPKE-v1" + suite + label + ikm, "sha256")


def expand(suite: bytes, secret: bytes, label: bytes, info: bytes, size: int) -> bytes:
    """LabeledExpand, section 4; up to the 32 bytes of one block."""
    assert size <= hashlib.sha256().digest_size
    return hmac.digest(secret, size.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info + b"\x01", "sha256")[:size]


def shared_secret(exchanged: bytes, encapsulated: bytes, receiver: bytes) -> bytes:
    """Of Encap and Decap, section 4.1."""
    secret = extract(KEM_SUITE, b"", b"eae_prk", exchanged)
    return expand(KEM_SUITE, secret, b"shared_secret", encapsulated + receiver, 32)


def key_and_nonce(shared: bytes, info: bytes) -> tuple[bytes, bytes]:
    """Of KeySchedule in mode_base, section 5.1; the nonce is that of the first message."""
    context = b"\0" + extract(SUITE, b"", b"psk_id_hash", b"") + extract(SUITE, b"", b"info_hash", info)
    secret = extract(SUITE, shared, b"secret", b"")
    return expand(SUITE, secret, b"key", context, 16), expand(SUITE, secret, b"base_nonce", context, 12)


def encrypt(exchanged: bytes, encapsulated: bytes, receiver: bytes, info: bytes, plaintext: bytes) -> bytes:
    """What a sender sends whose private key has led to `exchanged`."""
    key, nonce = key_and_nonce(shared_secret(exchanged, encapsulated, receiver), info)
    return encapsulated + AESGCM(key).encrypt(nonce, plaintext, b"")
