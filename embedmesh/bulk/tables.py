"""Tables as input: CSV and TSV, read as lines are, and Parquet. One column is embedded; the others are kept.

CSV is streamed. A record may hold line ends in quotes; where it ends is found by the rules that Python's `csv` has, so
that both always mean the same, and nothing but one record is ever held.
"""

import csv
import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, BinaryIO

from embedmesh.bulk.lines import (
    BOM,
    LINE_BYTES_MAX,
    MADE,
    OVERWRITE,
    Batches,
    LineBatch,
    LineRecords,
    Refusal,
    encode_text,
)
from embedmesh.bulk.usage import WrongUsage

TEXT_COLUMN = "text"
COLUMNS_SHOWN_MAX = 12  # of the names in a message
PARQUET_MISSING = "Parquet needs pyarrow, which is not installed: pip install 'embedmesh[parquet]'."


def find_column(columns: Sequence[str], column: str | None) -> int:
    """Which column to embed: the one of that name, else of that number from 0; without one `text`, or the only one."""
    if column is None and len(columns) == 1:
        return 0
    name = TEXT_COLUMN if column is None else column
    if name in columns:
        return list(columns).index(name)
    if name.isdecimal() and int(name) < len(columns):
        return int(name)
    shown = ", ".join(columns[:COLUMNS_SHOWN_MAX]) + (", ..." if len(columns) > COLUMNS_SHOWN_MAX else "")
    raise WrongUsage(f"The input has no column {name!r}. Name one with --column: {shown or 'it has none'}.")


def kept_columns(columns: Sequence[str], text: int) -> list[int]:
    """All but the column that is embedded, and those that an earlier run added."""
    return [at for at, name in enumerate(columns) if at != text and name not in MADE]


class CsvRecords(LineRecords):
    """Rows of CSV or TSV. The first record names the columns."""

    def __init__(self, delimiter: str, column: str | None) -> None:
        super().__init__()
        csv.field_size_limit(LINE_BYTES_MAX)
        self._delimiter = delimiter
        self._column = column
        self._text_at = 0
        self._kept: list[int] = []

    async def join(self, lines: AsyncIterator[bytes | None]) -> AsyncIterator[bytes | None]:
        """Each record but the empty ones; None for one that is too long. Raises WrongUsage."""
        parts: list[bytes] = []
        size = 0
        quoted = named = False
        async for line in lines:
            # A line that is too long is dropped, and with it how it ends: so it ends its record.
            quoted = line is not None and ends_quoted(line, self._delimiter.encode(), quoted)
            size += LINE_BYTES_MAX + 1 if line is None else len(line)
            if size <= LINE_BYTES_MAX:
                parts.append(line or b"")
            else:
                parts.clear()
            if quoted:
                continue
            record = b"".join(parts) if size <= LINE_BYTES_MAX else None
            parts.clear()
            size = 0
            if record is not None and not record.strip(b"\r\n"):
                continue
            if named:
                yield record
            else:
                self._name(record)
                named = True
        if size:  # a quote that is never closed
            yield b"".join(parts) if parts else None

    def row(self, record: bytes | None, *, first: bool) -> tuple[bytes | Refusal, tuple[str, ...]]:
        """The text, and the other values; a row that is too short ends in empty ones."""
        fields = self._fields(record)
        if isinstance(fields, Refusal):
            return fields, ("",) * len(self.columns)
        if len(fields) <= self._text_at:
            text: bytes | Refusal = Refusal("missing_field", f"the row has only {len(fields)} columns")
        else:
            text = encode_text(fields[self._text_at])
        return text, tuple(fields[at] if at < len(fields) else "" for at in self._kept)

    def _name(self, record: bytes | None) -> None:
        names = self._fields(None if record is None else record.removeprefix(BOM))
        if isinstance(names, Refusal):
            raise WrongUsage(f"The input's first row, which names the columns, cannot be read: {names.message}.")
        self._text_at = find_column(names, self._column)
        self._kept = kept_columns(names, self._text_at)
        self.columns = tuple(names[at] for at in self._kept)

    def _fields(self, record: bytes | None) -> list[str] | Refusal:
        if record is None:
            return Refusal("line_too_long", f"the row is longer than {LINE_BYTES_MAX:,} bytes; is a quote left open?")
        try:
            rows = list(csv.reader([record.decode("utf-8")], delimiter=self._delimiter))
        except UnicodeDecodeError:
            return Refusal("not_utf8", "the row is not UTF-8")
        except csv.Error as error:
            return Refusal("invalid_csv", f"the row is no CSV ({error})")
        return rows[0] if len(rows) == 1 else Refusal("invalid_csv", "the row is no CSV (it holds several rows)")


def ends_quoted(line: bytes, delimiter: bytes, quoted: bool) -> bool:
    """Whether a record that was `quoted` when the line began still is when it ends."""
    at = 0
    while True:
        if quoted:
            at = line.find(b'"', at)
            if at < 0:
                return True
            if line[at + 1 : at + 2] == b'"':
                at += 2
                continue
            quoted = False
        elif line[at : at + 1] == b'"':
            quoted = True
            at += 1
            continue
        at = line.find(delimiter, at)
        if at < 0:
            return False
        at += 1


class ParquetReader:
    """Rows of a Parquet file. Without a digest it is read for one: that of the whole file."""

    def __init__(self, source: BinaryIO, column: str | None, digest: str | None = None) -> None:
        """Raises WrongUsage where it is no such file, has no such column, or pyarrow is missing."""
        pyarrow, parquet = pyarrow_here()
        types = pyarrow.types
        try:
            self._digest = digest or hashlib.file_digest(source, "sha256").hexdigest()  # type: ignore[arg-type]
            self._size = source.seek(0, 2)
            self._file = parquet.ParquetFile(source)
        except (pyarrow.ArrowException, OSError):
            raise WrongUsage("The input is no Parquet file; one cannot come through a pipe.") from None
        schema = self._file.schema_arrow
        self._text = find_column(schema.names, column)
        kind = schema.field(self._text).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not (types.is_string(kind) or types.is_large_string(kind)):
            raise WrongUsage(f"The column {schema.names[self._text]!r} holds {kind}, not texts. Name another --column.")
        self._kept = kept_columns(schema.names, self._text)
        self._columns = tuple(schema.names[at] for at in self._kept)

    async def batches(self, *, inputs_max: int, skip: int = 0, skip_digest: str = "") -> Batches:
        """As ChunkReader's; batches are bounded by their rows alone."""
        if skip and skip_digest != self._digest:
            raise WrongUsage(f"The input is not that of the run before.{OVERWRITE}")
        first, rows = 0, self._file.metadata.num_rows
        for read in self._file.iter_batches(batch_size=inputs_max):
            start = min(max(skip - first, 0), len(read))
            part = read.slice(start)
            first += len(read)
            if len(part):
                texts = [encode_text(text or "") for text in part.column(self._text).to_pylist()]
                at = first - len(part)
                end = self._size * first // max(rows, 1)
                yield LineBatch(at, texts, self._digest, end, self._columns, part.select(self._kept))


def pyarrow_here() -> tuple[Any, Any]:
    """pyarrow, and its part for Parquet. Raises WrongUsage."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise WrongUsage(PARQUET_MISSING) from None
    return pyarrow, parquet
