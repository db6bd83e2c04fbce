"""Lines of a file or pipe, and batches of them, without ever holding the whole input.

Every batch carries the SHA-256 of all input up to its end. By it a later run knows that it continues with the same
input: the beginning is read and hashed again, which costs a second per gigabyte, and nothing needs to be stored.
"""

import asyncio
import hashlib
import os
import stat
from collections.abc import AsyncIterator, Iterator
from typing import Any

import msgspec
import orjson

from embedmesh.bulk.usage import WrongUsage
from embedmesh.rules.limits import REQUEST_BODY_BYTES_MAX

READ_BYTES = 256 * 1024  # a few thousand short lines a read
LINE_BYTES_MAX = REQUEST_BODY_BYTES_MAX - 64 * 1024  # what a request body can hold beside its other fields
BATCH_BYTES_MAX = 1024 * 1024  # a quarter of what a body may have; a larger one waits longer for its last byte
OVERWRITE = " Give the same input to continue, or --overwrite to start again."
BOM = b"\xef\xbb\xbf"
MADE = ("embedding", "error")  # columns of the output itself


class Refusal(msgspec.Struct, frozen=True):
    """Why a line has no vector. Never holds the line's text."""

    code: str
    message: str


class LineBatch(msgspec.Struct, frozen=True):
    """Lines of one request. `lines` holds each text as JSON, or why it cannot be sent.

    `first` is the index (from 0) of the first line; `digest` and `end_bytes` are of the input up to the last one.
    In a table a line is a row. `columns` are the names of those beside the text and `kept` their values, row by row;
    of Parquet, where values have types, `kept` is an Arrow table.
    """

    first: int
    lines: list[bytes | Refusal]
    digest: str
    end_bytes: int
    columns: tuple[str, ...] = ()
    kept: Any = ()


Batches = AsyncIterator[LineBatch]


class Splitter:
    """Cuts chunks into lines. `digest` and `end_bytes` are always those of the input up to the last line."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._kept: list[bytes] = []
        self._line_bytes = 0
        self.end_bytes = 0

    @property
    def digest(self) -> str:
        """SHA-256 in hex."""
        return self._hash.hexdigest()

    def feed(self, chunk: bytes) -> Iterator[bytes | None]:
        """Each line that ends in `chunk`, its end included; None for one longer than LINE_BYTES_MAX. Take them all."""
        start = 0
        while (newline := chunk.find(b"\n", start)) != -1:
            self._keep(chunk[start : newline + 1])
            yield self._cut()
            start = newline + 1
        self._keep(chunk[start:])

    def end(self) -> Iterator[bytes | None]:
        """The last line, where it has no end of line."""
        if self._line_bytes:
            yield self._cut()

    def _keep(self, piece: bytes) -> None:
        self._hash.update(piece)
        self.end_bytes += len(piece)
        self._line_bytes += len(piece)
        if self._line_bytes <= LINE_BYTES_MAX:
            self._kept.append(piece)
        else:
            self._kept.clear()

    def _cut(self) -> bytes | None:
        line = b"".join(self._kept) if self._line_bytes <= LINE_BYTES_MAX else None
        self._kept.clear()
        self._line_bytes = 0
        return line


def encode_text(text: str) -> bytes | Refusal:
    """A text as JSON, if a request can hold it."""
    if not text:
        return Refusal("empty_input", "there is no text to embed")
    encoded = orjson.dumps(text)
    if len(encoded) > LINE_BYTES_MAX:  # control characters take six bytes in JSON
        return Refusal("line_too_long", f"the text takes more than {LINE_BYTES_MAX:,} bytes in JSON")
    return encoded


class LineRecords:
    """How lines make rows: here a row a line, its text, or JSON with the text in the field `field`."""

    columns: tuple[str, ...] = ()  # beside the text; none of lines

    def __init__(self, field: str | None = None) -> None:
        self._field = field

    def join(self, lines: AsyncIterator[bytes | None]) -> AsyncIterator[bytes | None]:
        """Each row as it stands in the input; None for one that is too long."""
        return lines

    def row(self, record: bytes | None, *, first: bool) -> tuple[bytes | Refusal, tuple[Any, ...]]:
        """Its text as a JSON string, and its values of `columns`."""
        return self._text(record, first), ()

    def _text(self, line: bytes | None, first: bool) -> bytes | Refusal:
        text = read_line(line, first)
        if isinstance(text, Refusal):
            return text
        if self._field is not None and text:
            members = read_members(text)
            return members if isinstance(members, Refusal) else text_of(members, self._field)
        return encode_text(text)


class JsonRecords(LineRecords):
    """JSON objects, one a line, with the text in `field`. The other members of the first good one are the columns."""

    def __init__(self, field: str) -> None:
        super().__init__()
        self._member = field
        self._named = False

    def row(self, record: bytes | None, *, first: bool) -> tuple[bytes | Refusal, tuple[Any, ...]]:
        """Values are as they stand in the JSON; None for a member that is missing."""
        line = read_line(record, first)
        members = line if isinstance(line, Refusal) else read_members(line)
        if isinstance(members, Refusal):
            return members, (None,) * len(self.columns)
        text = text_of(members, self._member)
        if not self._named and not isinstance(text, Refusal):
            self.columns = tuple(name for name in members if name not in (self._member, *MADE))
            self._named = True
        return text, tuple(map(members.get, self.columns))


def read_line(line: bytes | None, first: bool) -> str | Refusal:
    """A line without its end, and the first one without a byte order mark."""
    if line is None:
        return Refusal("line_too_long", f"the line is longer than {LINE_BYTES_MAX:,} bytes")
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if first:
        line = line.removeprefix(BOM)
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return Refusal("not_utf8", "the line is not UTF-8")


def read_members(line: str) -> dict[str, Any] | Refusal:
    """The members of a JSON object; of other JSON none."""
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError:
        return Refusal("invalid_json", "the line is not JSON")
    return value if isinstance(value, dict) else {}


def text_of(members: dict[str, Any], field: str) -> bytes | Refusal:
    """The text of a member, as JSON."""
    text = members.get(field)
    if not isinstance(text, str):
        return Refusal("missing_field", f"the line has no text in the member {field!r}")
    return encode_text(text)


class ChunkReader:
    """Rows of a file or pipe that is read once, chunk by chunk."""

    def __init__(self, chunks: AsyncIterator[bytes], records: LineRecords) -> None:
        self._chunks = chunks
        self._records = records

    async def batches(self, *, inputs_max: int, skip: int = 0, skip_digest: str = "") -> Batches:
        """Batches of at most `inputs_max` rows and about BATCH_BYTES_MAX bytes, in input order.

        The first `skip` rows are passed over. Raises WrongUsage where they have another digest than `skip_digest`, or
        the input is not what it should be.
        """
        splitter, records = Splitter(), self._records
        index = size_bytes = 0
        lines: list[bytes | Refusal] = []
        kept: list[tuple[Any, ...]] = []

        def batch() -> LineBatch:
            return LineBatch(index - len(lines), lines, splitter.digest, splitter.end_bytes, records.columns, kept)

        async for line in records.join(_each_line(self._chunks, splitter)):
            index += 1
            if index <= skip:
                if index == skip and splitter.digest != skip_digest:
                    raise WrongUsage(
                        f"The first {skip:,} lines of the input are not those of the run before.{OVERWRITE}"
                    )
                continue
            text, others = records.row(line, first=index == 1)
            lines.append(text)
            kept.append(others)
            size_bytes += len(line or b"")
            if len(lines) >= inputs_max or size_bytes >= BATCH_BYTES_MAX:
                yield batch()
                lines, kept, size_bytes = [], [], 0
        if index < skip:
            raise WrongUsage(f"The input has {index:,} lines; the run before had read {skip:,}.{OVERWRITE}")
        if lines:
            yield batch()


async def read_chunks(fd: int) -> AsyncIterator[bytes]:
    """What a file, pipe or terminal gives, chunk by chunk. Waiting for a pipe does not block the event loop."""
    regular = stat.S_ISREG(os.fstat(fd).st_mode)
    while True:
        if not regular:
            await _readable(fd)
        chunk = os.read(fd, READ_BYTES)
        if not chunk:
            return
        yield chunk


async def _each_line(chunks: AsyncIterator[bytes], splitter: Splitter) -> AsyncIterator[bytes | None]:
    async for chunk in chunks:
        for line in splitter.feed(chunk):
            yield line
    for line in splitter.end():
        yield line


async def _readable(fd: int) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    try:
        loop.add_reader(fd, ready.set)
    except PermissionError:  # /dev/null and its like are always readable, and cannot be waited for
        return
    try:
        await ready.wait()
    finally:
        loop.remove_reader(fd)
