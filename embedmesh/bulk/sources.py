"""The inputs of a job, read one after the other: lines, JSON lines, CSV, TSV, Parquet; local or at an address."""

import gzip
import hashlib
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

from embedmesh.bulk.lines import READ_BYTES, Batches, ChunkReader, JsonRecords, LineBatch, LineRecords
from embedmesh.bulk.remote import file_system, told_as_os_error
from embedmesh.bulk.tables import TEXT_COLUMN, CsvRecords, ParquetReader, pyarrow_here
from embedmesh.bulk.units import UNIT_TEXTS_MAX
from embedmesh.bulk.usage import WrongUsage

FORMATS = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl"}
ZIPPED = ".gz"  # of any but Parquet, which is compressed in itself


class Source(NamedTuple):
    """An input. `size` is in bytes, if it is known; `mark`, of one at an address, changes where its content does."""

    file: BinaryIO
    size: int | None
    mark: str | None


def open_source(name: str) -> Source:
    """An input by its path or address. Raises WrongUsage."""
    try:
        if "://" not in name:
            path = Path(name)
            return Source(path.open("rb"), path.stat().st_size, None)
        system, path_there = file_system(name)
        with told_as_os_error():
            info = system.info(path_there)
            mark = hashlib.sha256(str(system.ukey(path_there)).encode()).hexdigest()
            return Source(cast(BinaryIO, system.open(path_there, "rb")), info.get("size"), mark)
    except OSError as error:
        raise WrongUsage(f"{name} cannot be read ({error.strerror or type(error).__name__}).") from None


def kind_of(name: str, kind: str | None) -> str:
    """What an input is: `kind`, or by its name."""
    return kind or FORMATS.get(Path(name.removesuffix(ZIPPED)).suffix, "lines")


def batches_of(names: Sequence[str], kind: str | None, column: str | None) -> Iterator[LineBatch]:
    """The rows of all inputs. `first`, `digest` and `end_bytes` are within an input. Raises WrongUsage."""
    for name in names:
        opened = open_source(name)
        with opened.file as file:
            this = kind_of(name, kind)
            if this == "parquet":
                yield from _stepped(ParquetReader(file, column, opened.mark).batches(inputs_max=UNIT_TEXTS_MAX))
                continue
            plain = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if name.endswith(ZIPPED) else file
            reader = ChunkReader(_chunks(plain, name), _records(this, column))
            yield from _stepped(reader.batches(inputs_max=UNIT_TEXTS_MAX))


def _records(kind: str, column: str | None) -> LineRecords:
    if kind == "jsonl":
        return JsonRecords(column or TEXT_COLUMN)
    if kind != "lines":
        return CsvRecords("\t" if kind == "tsv" else ",", column)
    if column is not None:
        raise WrongUsage("Lines have no --column. Give --format jsonl, csv, tsv or parquet.")
    return LineRecords()


async def _chunks(file: BinaryIO, name: str) -> AsyncIterator[bytes]:
    while True:
        try:
            with told_as_os_error():
                chunk = file.read(READ_BYTES)
        except (OSError, EOFError) as error:
            raise WrongUsage(f"{name} cannot be read ({error}).") from None
        if not chunk:
            return
        yield chunk


def _stepped(batches: Batches) -> Iterator[LineBatch]:
    """The same without an event loop: what reads a file never waits for one."""
    while (batch := _step(batches)) is not None:
        yield batch


def _step(batches: Batches) -> LineBatch | None:
    try:
        anext(batches).__await__().send(None)
    except StopIteration as found:
        batch: LineBatch = found.value
        return batch
    except StopAsyncIteration:
        return None
    raise AssertionError("unreachable: it would have to wait for something")


def count_rows(names: Sequence[str], kind: str | None) -> int | None:
    """About how many rows there are, found without reading them one by one; None where that takes long."""
    rows = 0
    for name in names:
        this = kind_of(name, kind)
        if "://" in name or name.endswith(ZIPPED):
            return None
        with open_source(name).file as file:
            if this == "parquet":
                _, parquet = pyarrow_here()
                rows += parquet.ParquetFile(file).metadata.num_rows
            else:
                rows += sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(READ_BYTES), b""))
    return rows or None
