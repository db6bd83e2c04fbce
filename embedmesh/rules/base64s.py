"""Strict base64 (RFC 4648): one text for one value, so that no two parsers read a message in two ways."""

import base64


def decode64(text: str, size: int | None = None) -> bytes:
    """The bytes of a text in the standard alphabet, padded. Raises ValueError for any other, or another `size`."""
    data = base64.b64decode(text, validate=True)
    if base64.b64encode(data).decode("ascii") != text:
        raise ValueError("not the base64 that these bytes have")
    if size is not None and len(data) != size:
        raise ValueError(f"not {size} bytes")
    return data


def encode64(data: bytes) -> str:
    """Standard alphabet, padded."""
    return base64.b64encode(data).decode("ascii")
