"""Base64 as the SDKs write it, and in no second form: two texts never stand for the same bytes."""

import base64


def decode64(text: str, size: int | None = None) -> bytes:
    """The bytes, `size` of them where that is given. Raises ValueError, without the text.

    RFC 4648 section 4: the standard alphabet, padded, the unused bits zero, nothing between the characters.
    """
    try:
        raw = base64.b64decode(text, validate=True)
    except ValueError:
        raw = None
    if raw is None or base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("not base64 in its one form")
    if size is not None and len(raw) != size:
        raise ValueError(f"{len(raw)} bytes of base64 instead of {size}")
    return raw
