"""Bodies of `multipart/form-data` (RFC 7578), read part by part as they come: nothing is kept of them here.

aiohttp's reader finds the parts. What is strict is here: a size and a pace for the whole body, one kind of body, and
nothing behind its last boundary.
"""

import asyncio
import warnings
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, NamedTuple, NoReturn

from aiohttp import (
    BadContentDispositionHeader,
    BadContentDispositionParam,
    BodyPartReader,
    MultipartReader,
    web,
)

from embedmesh.http.aiohttp_connection import BAD_HEAD
from embedmesh.rules import errors
from embedmesh.rules.limits import REQUEST_BODY_S, UPLOAD_BYTES_A_SECOND_MIN

FORM_TYPE = "multipart/form-data"
PIECE_BYTES = 64 * 1024  # of a part, as they are read
FRAME_BYTES_MAX = 64 * 1024  # of a body besides its largest part: boundaries, heads, small fields
PART_HEAD_BYTES_MAX = 8_190  # of one header of a part, as of a request
PART_HEADERS_MAX = 16  # a client sends two or three
UNREADABLE = (ValueError, RuntimeError, AssertionError, LookupError, BAD_HEAD)  # what the reader raises

for _told in (BadContentDispositionHeader, BadContentDispositionParam):  # on standard error, with what the caller sent
    warnings.filterwarnings("ignore", category=_told)


class FormPart(NamedTuple):
    """One part of a form. `filename` is None for a field that is no file. Read `pieces` before the next part."""

    name: str
    filename: str | None
    pieces: AsyncGenerator[bytes, None]

    async def text(self, limit_bytes: int) -> str:
        """A small field, whole. Raises InvalidValue, which names it."""
        value = b""
        async for piece in self.pieces:
            value += piece
            if len(value) > limit_bytes:
                raise errors.InvalidValue(f"This field has more than {limit_bytes:,} bytes.", param=self.name)
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            raise errors.InvalidValue("This field is not UTF-8 text.", param=self.name) from None


async def form_parts(request: web.BaseRequest, limit_bytes: int) -> AsyncGenerator[FormPart, None]:
    """The parts of a request's form, in the order in which they were sent. Close it: that closes their pieces.

    Raises UnsupportedMediaType, BodyTooLarge, RequestTimeout or MalformedHttp. The body may have `limit_bytes`, and
    must come at no less than UPLOAD_BYTES_A_SECOND_MIN: a slow line is waited for, one that drips is not.
    """
    _check_head(request, limit_bytes)
    if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _PacedBody(request.content, limit_bytes)
    try:
        reader = MultipartReader(
            request.headers,
            body,  # type: ignore[arg-type]  # has what is used of a StreamReader
            max_field_size=PART_HEAD_BYTES_MAX,
            max_headers=PART_HEADERS_MAX,
        )
        while (part := await reader.next()) is not None:
            found = _form_part(part)
            async with aclosing(found.pieces):
                yield found
        if await body.read(1):
            raise ValueError("there is more behind the last boundary")
    except (*UNREADABLE, web.RequestPayloadError):
        _malformed()


def _check_head(request: web.BaseRequest, limit_bytes: int) -> None:
    if request.content_type != FORM_TYPE:
        raise errors.UnsupportedMediaType(f"Send the file as a form, with the header Content-Type: {FORM_TYPE}.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise errors.UnsupportedMediaType("Send the body uncompressed, without a Content-Encoding header.")
    if (request.content_length or 0) > limit_bytes:
        raise _too_large(limit_bytes)


def _form_part(part: Any) -> FormPart:
    if not isinstance(part, BodyPartReader):
        raise ValueError("a form within a form")
    name = part.name
    encoded = part.headers.get("Content-Transfer-Encoding", "binary").lower() not in ("binary", "8bit", "7bit")
    if not name or encoded:
        raise ValueError("a part without a name, or in an encoding that forms do not have")
    return FormPart(name, part.filename, _pieces(part))


async def _pieces(part: BodyPartReader) -> AsyncGenerator[bytes, None]:
    try:
        while not part.at_eof():
            if piece := await part.read_chunk(PIECE_BYTES):
                yield piece
    except (*UNREADABLE, web.RequestPayloadError):
        _malformed()


def _malformed() -> NoReturn:
    raise errors.MalformedHttp(
        "The form could not be read: it broke off, or has wrong boundaries or a part without a name. Let a client "
        "library write it."
    ) from None


def _too_large(limit_bytes: int) -> errors.BodyTooLarge:
    return errors.BodyTooLarge(f"The body is larger than {limit_bytes:,} bytes. Split the file.")


class _PacedBody:
    """The body as aiohttp's reader takes it, counted and timed."""

    def __init__(self, content: Any, limit_bytes: int) -> None:
        self._content = content
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._time = asyncio.get_running_loop().time
        self._began = self._time()

    async def read(self, size: int) -> bytes:
        return await self._taken(self._content.read(size))

    async def readline(self, *, max_line_length: int | None = None) -> bytes:
        return await self._taken(self._content.readline(max_line_length=max_line_length or PART_HEAD_BYTES_MAX))

    def at_eof(self) -> bool:
        return bool(self._content.at_eof())

    def unread_data(self, data: bytes) -> None:
        self._bytes -= len(data)
        self._content.unread_data(data)

    async def _taken(self, reading: Any) -> bytes:
        until = self._began + REQUEST_BODY_S + self._bytes / UPLOAD_BYTES_A_SECOND_MIN
        try:
            async with asyncio.timeout(until - self._time()):
                data: bytes = await reading
        except TimeoutError:
            raise errors.RequestTimeout(
                f"The request's body came at less than {UPLOAD_BYTES_A_SECOND_MIN:,} bytes a second."
            ) from None
        self._bytes += len(data)
        if self._bytes > self._limit_bytes:
            raise _too_large(self._limit_bytes)
        return data
