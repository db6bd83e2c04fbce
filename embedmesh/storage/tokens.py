"""What a bearer key looks like: `em_` (or `em_admin_`), 32 random letters and digits, 6 of checksum.

The checksum is no secret. It lets junk die before the store is asked, and lets scanners recognise a leaked key.
"""

import hashlib
import secrets
import string
import zlib

ALPHABET = string.digits + string.ascii_letters
RANDOM_CHARS = 32  # 190 bits
CHECKSUM_CHARS = 6  # 62**6 is more than CRC-32's 2**32
PREFIXES = ("em", "em_admin")
TOKEN_CHARS_MAX = len(max(PREFIXES, key=len)) + 1 + RANDOM_CHARS + CHECKSUM_CHARS


def make_token(prefix: str) -> str:
    """A new key, shown to its owner once."""
    assert prefix in PREFIXES
    start = f"{prefix}_" + "".join(secrets.choice(ALPHABET) for _ in range(RANDOM_CHARS))
    return start + checksum(start)


def well_formed(token: str) -> bool:
    """Whether this may be a key of ours. The same small work whatever is wrong."""
    if len(token) > TOKEN_CHARS_MAX or not token.isascii():
        return False
    prefix, _, body = token.rpartition("_")
    right_shape = prefix in PREFIXES and len(body) == RANDOM_CHARS + CHECKSUM_CHARS and body.isalnum()
    return right_shape and token[-CHECKSUM_CHARS:] == checksum(token[:-CHECKSUM_CHARS])


def checksum(start: str) -> str:
    """CRC-32 in base 62, six characters."""
    rest = zlib.crc32(start.encode("ascii"))
    digits = ""
    for _ in range(CHECKSUM_CHARS):
        rest, digit = divmod(rest, len(ALPHABET))
        digits = ALPHABET[digit] + digits
    return digits


def hash_token(token: str, secret: bytes) -> bytes:
    """The only form of a key that is stored: 32 bytes, useless without the secret."""
    return hashlib.blake2b(token.encode("ascii"), key=secret, digest_size=32, person=b"key").digest()
