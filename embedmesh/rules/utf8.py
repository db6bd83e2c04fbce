"""Where bytes that should be UTF-8 are not."""

import codecs
from collections.abc import Iterator

MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF32_LE, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PIECE_BYTES = 64 * 1024  # decoded at once: text takes up to four times as many bytes


def broken_bytes(body: bytes) -> str | None:
    """What is wrong with the bytes themselves; None where they are UTF-8."""
    if body.startswith(MARKS):
        return "The body starts with a byte order mark. Send it as UTF-8 without one."
    try:
        for _ in pieces(body):
            pass
    except UnicodeDecodeError as error:
        return f"The body is not UTF-8 at byte {error.start} (the first is byte 0)."
    return None


def pieces(body: bytes) -> Iterator[tuple[int, str]]:
    """The body's text, and at which byte each piece of it begins. Raises UnicodeDecodeError, `start` in the body."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, len(body) + 1, PIECE_BYTES):
        begin = at - len(decoder.getstate()[0])  # with the bytes of a character that began in the last piece
        try:
            yield begin, decoder.decode(body[at : at + PIECE_BYTES], final=at + PIECE_BYTES > len(body))
        except UnicodeDecodeError as error:
            raise UnicodeDecodeError("utf-8", b"", begin + error.start, begin + error.end, error.reason) from None
