"""Lines of a batch's file: found in its bytes, and read. Each is one request, as JSON on a line of its own."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from embedmesh.rules.batches import LineError
from embedmesh.rules.limits import BATCH_LINE_BYTES_MAX, CUSTOM_ID_CHARS_MAX
from embedmesh.rules.utf8 import broken_bytes

MEMBERS = ("custom_id", "method", "url", "body")
BLANK = b" \t\r"
NO_BLANK = re.compile(rb"[^ \t\r\n]")
SHOWN_CHARS_MAX = 64  # of the name of an unknown member: a hundred of them are kept with a batch
UNKNOWN = re.compile(r"unknown field `(.*)`$", re.DOTALL)  # in the words of msgspec

DECODE_TEXT = msgspec.json.Decoder(str).decode


class FoundLine(NamedTuple):
    """A line that is not blank. `row` counts lines from 1, blank ones too; `start` is where it is in the file.

    `data` is None for a line that is longer than BATCH_LINE_BYTES_MAX: such a one is passed over, not kept.
    """

    row: int
    start: int
    data: bytes | None


class LineFinder:
    """Finds lines in pieces of a file, whatever their size. Keeps no more than one line."""

    def __init__(self, start: int = 0, row: int = 1) -> None:
        """The first piece begins at byte `start`, with line `row`."""
        self._start = start
        self._row = row
        self._parts: list[bytes] = []  # of a line whose end has not come yet
        self._size = 0

    def feed(self, piece: bytes) -> Iterator[FoundLine]:
        """The lines that end in this piece."""
        at = 0
        while True:
            if not self._size:
                at = self._pass_over(piece, at)
            if (end := piece.find(b"\n", at)) < 0:
                break
            self._keep(piece[at:end])
            yield from self._line(1)
            at = end + 1
        self._keep(piece[at:])

    def end(self) -> Iterator[FoundLine]:
        """The last line, if no line break follows it."""
        yield from self._line(0)

    def _pass_over(self, piece: bytes, at: int) -> int:
        """Where the first line that is not blank begins: a file may have two hundred million others."""
        first = NO_BLANK.search(piece, at)
        start = piece.rfind(b"\n", at, first.start() if first else len(piece)) + 1
        if start <= at:
            return at
        self._row += piece.count(b"\n", at, start)
        self._start += start - at
        return start

    def _keep(self, part: bytes) -> None:
        self._size += len(part)
        if self._size > BATCH_LINE_BYTES_MAX:
            self._parts.clear()
        elif part:
            self._parts.append(part)

    def _line(self, break_bytes: int) -> Iterator[FoundLine]:
        start, row, size, data = self._start, self._row, self._size, b"".join(self._parts)
        self._start, self._row, self._size = start + size + break_bytes, row + 1, 0
        self._parts.clear()
        if size > BATCH_LINE_BYTES_MAX:
            yield FoundLine(row, start, None)
        elif data.strip(BLANK):
            yield FoundLine(row, start, data)


class BatchLine(NamedTuple):
    """One request of a batch. `body` is JSON, as the endpoint takes it."""

    custom_id: str
    body: bytes


class BadLine(Exception):
    """A line that no batch can have: the whole file is refused."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param

    def at(self, row: int) -> LineError:
        """The same with the number of its line."""
        return LineError(self.code, self.message, row, self.param)


def read_line(data: bytes | None, endpoint: str) -> BatchLine:
    """The request of a line, for a batch of that endpoint. Raises BadLine."""
    if data is None:
        raise BadLine("line_too_long", f"The line is longer than {BATCH_LINE_BYTES_MAX:,} bytes. Split its inputs.")
    if (broken := broken_bytes(data)) is not None:
        raise BadLine("invalid_json_line", broken.replace("The body", "The line"))
    try:
        given = DECODE_LINE(data)
    except (msgspec.DecodeError, RecursionError) as error:
        if (unknown := UNKNOWN.search(str(error))) is None:
            raise BadLine("invalid_json_line", "The line is not one JSON object.") from None
        shown = unknown[1] if unknown[1].isprintable() and len(unknown[1]) <= SHOWN_CHARS_MAX else None
        raise BadLine("unknown_parameter", f"A line has {', '.join(MEMBERS)}, and nothing else.", shown) from None
    custom_id, method, url = _text(given.custom_id, "custom_id"), _text(given.method, "method"), _text(given.url, "url")
    if not 0 < len(custom_id) <= CUSTOM_ID_CHARS_MAX:
        raise BadLine("invalid_value", f"`custom_id` has 1 to {CUSTOM_ID_CHARS_MAX} characters.", "custom_id")
    if method != "POST":
        raise BadLine("invalid_method", "`method` must be POST.", "method")
    if url != endpoint:
        raise BadLine("invalid_url", f"`url` must be the batch's endpoint, {endpoint}.", "url")
    body = bytes(given.body)
    if body[:1] != b"{":
        raise BadLine("missing_required_parameter", "`body` must be an object: the request itself.", "body")
    return BatchLine(custom_id, body)


def _text(given: msgspec.Raw, name: str) -> str:
    if not bytes(given):
        raise BadLine("missing_required_parameter", f"The line has no `{name}`.", name)
    try:
        return DECODE_TEXT(given)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise BadLine("invalid_type", f"`{name}` must be a string.", name) from None


def model_named(body: bytes) -> str | None:
    """The model that a request names; None where it names none, or is not right in another way."""
    try:
        return msgspec.json.decode(body, type=_Named).model
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    """Only these are kept: one with a million members is refused at the first that is not one of them."""

    custom_id: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    method: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    url: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    body: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


DECODE_LINE = msgspec.json.Decoder(_Line).decode


class _Named(msgspec.Struct):
    model: str
