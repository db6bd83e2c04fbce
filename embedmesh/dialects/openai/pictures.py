"""Images in JSON: base64, or `data:` URLs. An address is never followed or passed on.

A node that is given one would call it from inside the operator's network, and a caller that is given one would call a
stranger.
"""

import re

from embedmesh.rules.base64s import decode64

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
HEAD_CHARS = 16  # twelve bytes: as many as tell a WebP file
MAGIC = {"image/png": b"\x89PNG\r\n\x1a\n", "image/jpeg": b"\xff\xd8\xff"}
DATA_URL = re.compile(r"data:image/[a-z+.-]{1,20};base64,", re.IGNORECASE)
WEBP_HEAD = re.compile(rb"RIFF.{4}WEBP", re.DOTALL)


def media_type(data: bytes) -> str | None:
    """`image/png`, `image/jpeg` or `image/webp` by its first bytes; None for anything else."""
    for name, magic in MAGIC.items():
        if data.startswith(magic):
            return name
    return "image/webp" if WEBP_HEAD.match(data) else None


def base64_of(url: str) -> str | None:
    """What a `data:` URL of an image holds, as base64; None for any other URL."""
    head = DATA_URL.match(url)
    return url[head.end() :] if head else None


def kind_of_base64(encoded: str) -> str | None:
    """The media type of an image in strict base64; None if it is none, or is not strict. Only its ends are decoded."""
    try:
        letters = encoded.encode("ascii")
        padding = letters.translate(None, ALPHABET)
        if len(letters) % 4 or padding not in (b"", b"=", b"==") or not letters.endswith(padding):
            return None
        decode64(encoded[-4:])
        return media_type(decode64(encoded[:HEAD_CHARS]))
    except ValueError:
        return None


def data_url(kind: str, encoded: str) -> str:
    """The image as a URL that holds it."""
    return f"data:{kind};base64,{encoded}"
