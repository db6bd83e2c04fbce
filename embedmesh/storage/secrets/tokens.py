"""What a bearer key looks like: `em_` (or `em_admin_`), 22 random letters and digits, 10 of stamp, 6 of checksum.

The checksum is no secret. It tells junk without a query, and lets scanners recognise a leaked key. The stamp is a MAC
over what stands before it: a key with the right one was made here, whether or not it is still good.
"""

import hashlib
import hmac
import secrets
import string
import zlib

TOKEN_ALPHABET = string.digits + string.ascii_letters
RANDOM_CHARS = 22  # 130 bits
STAMP_CHARS = 10  # 59 bits, of no use without the rest
CHECKSUM_CHARS = 6  # 62**6 is more than CRC-32's 2**32
BODY_CHARS = RANDOM_CHARS + STAMP_CHARS + CHECKSUM_CHARS
PREFIXES = ("em", "em_admin")
TOKEN_CHARS_MAX = len(max(PREFIXES, key=len)) + 1 + BODY_CHARS


def make_token(prefix: str, secret: bytes) -> str:
    """A new key, shown to its owner once, with the secret's stamp."""
    assert prefix in PREFIXES
    start = f"{prefix}_" + "".join(secrets.choice(TOKEN_ALPHABET) for _ in range(RANDOM_CHARS))
    start += _stamp(start, secret)
    return start + checksum(start)


def stamped(token: str, secret: bytes) -> bool:
    """Whether a well-formed key was made with the secret."""
    start = token[: -STAMP_CHARS - CHECKSUM_CHARS]
    return hmac.compare_digest(_stamp(start, secret), token[len(start) : -CHECKSUM_CHARS])


def well_formed(token: str) -> bool:
    """Whether this has the form of a key. The same small work for everything that has not."""
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        return False
    prefix, _, body = token.rpartition("_")
    right_shape = prefix in PREFIXES and len(body) == BODY_CHARS and body.isalnum()
    return right_shape and token[-CHECKSUM_CHARS:] == checksum(token[:-CHECKSUM_CHARS])


def checksum(start: str) -> str:
    """CRC-32 in base 62, six characters."""
    return _base62(zlib.crc32(start.encode("ascii")), CHECKSUM_CHARS)


def hash_token(token: str, secret: bytes) -> bytes:
    """The only form of a key that is stored: 32 bytes, useless without the secret."""
    return hashlib.blake2b(token.encode("ascii"), key=secret, digest_size=32, person=b"key").digest()


def _stamp(start: str, secret: bytes) -> str:
    mac = hashlib.blake2b(start.encode("ascii"), key=secret, digest_size=16, person=b"key stamp").digest()
    return _base62(int.from_bytes(mac, "big"), STAMP_CHARS)


def _base62(number: int, chars: int) -> str:
    digits = ""
    for _ in range(chars):
        number, digit = divmod(number, len(TOKEN_ALPHABET))
        digits = TOKEN_ALPHABET[digit] + digits
    return digits
