"""Tables as output: CSV, TSV and Parquet, with the input's other columns, `embedding`, and `error` where there is none.

Parquet cannot be appended to. Rows go to OUT.part as an Arrow stream, which can, and become Parquet at the end.
"""

import csv
import io
import os
from pathlib import Path
from typing import Any

import orjson

from embedmesh.bulk.lines import LineBatch, Refusal
from embedmesh.bulk.tables import pyarrow_here
from embedmesh.commands.bulk.checkpoint import Settings
from embedmesh.commands.bulk.client import Vector
from embedmesh.commands.bulk.output import OWN_COLUMNS, FileOutput, JsonlFile, NpyFile, Stdout, kept_values
from embedmesh.commands.output import WrongUsage

STREAM_END_BYTES = 8  # a mark and a length of nothing, which Arrow writes behind the last batch
ROW_GROUP_ROWS = 8_192  # 50 MB of 1,536 components; readers take a group at a time


class _CsvFile(FileOutput):
    """A row a line; the vector is a JSON list."""

    delimiter = ","

    def _head(self, batch: LineBatch | None) -> bytes:
        return self._text([_names(batch)])

    def _encode(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
        numbered = "index" not in batch.columns
        rows: list[list[Any]] = []
        for at, (outcome, kept) in enumerate(zip(outcomes, kept_values(batch), strict=True), batch.first):
            vector = "" if isinstance(outcome, Refusal) else _list(outcome)
            rows.append([*([at] if numbered else []), *kept, vector, _why(outcome)])
        return self._text(rows)

    def _text(self, rows: list[list[Any]]) -> bytes:
        text = io.StringIO(newline="")
        csv.writer(text, delimiter=self.delimiter, lineterminator="\n").writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")


class _TsvFile(_CsvFile):
    delimiter = "\t"


class _ParquetFile(FileOutput):
    """The types of a Parquet input's columns are kept; those of other tables are strings."""

    def __init__(self, target: Path, settings: Settings, overwrite: bool) -> None:
        self._arrow, self._parquet = pyarrow_here()
        super().__init__(target, settings, overwrite)

    def _written_at(self, target: Path) -> Path:
        return target.with_name(target.name + ".part")

    def _head(self, batch: LineBatch | None) -> bytes:
        return self._stream(self._schema(batch), None)

    def _encode(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
        arrow, schema = self._arrow, self._schema(batch)
        vectors = [None if isinstance(outcome, Refusal) else outcome for outcome in outcomes]
        columns: list[Any] = [vectors, [_why(outcome) or None for outcome in outcomes]]
        values = kept_values(batch)
        kept = batch.kept.columns if hasattr(batch.kept, "columns") else list(zip(*values, strict=True))
        columns = [*kept, *columns]
        if "index" not in batch.columns:
            columns.insert(0, range(batch.first, batch.first + len(outcomes)))
        arrays = [
            values if isinstance(values, arrow.Array) else arrow.array(values, field.type)
            for values, field in zip(columns, schema, strict=True)
        ]
        return self._stream(schema, arrow.RecordBatch.from_arrays(arrays, schema=schema))

    def finish(self) -> None:
        self._begin(None)
        self._rows.flush()
        os.fsync(self._rows.fileno())
        made = self._target.with_name(self._target.name + ".new")
        group: list[Any] = []
        with (
            self._arrow.OSFile(str(self._written), "rb") as file,
            self._arrow.ipc.open_stream(file) as stream,
            self._parquet.ParquetWriter(made, stream.schema) as writer,
        ):
            for batch in stream:
                group.append(batch)
                if sum(map(len, group)) >= ROW_GROUP_ROWS:
                    writer.write_table(self._arrow.Table.from_batches(group))
                    group = []
            writer.write_table(self._arrow.Table.from_batches(group, stream.schema))
        with made.open("rb") as written:
            os.fsync(written.fileno())
        made.replace(self._target)
        self.done.size_bytes = self._target.stat().st_size
        self._complete()
        self._written.unlink()

    def _schema(self, batch: LineBatch | None) -> Any:
        arrow = self._arrow
        own = {"index": arrow.int64(), "embedding": arrow.list_(arrow.float32()), "error": arrow.string()}
        kept = getattr(batch and batch.kept, "schema", None)
        types = kept.types if kept is not None else [arrow.string()] * len(batch.columns if batch else ())
        theirs = zip(batch.columns, types, strict=True) if batch else ()
        given = [arrow.field(name, kind) for name, kind in theirs]
        ours = [arrow.field(name, own[name]) for name in OWN_COLUMNS if batch is None or name not in batch.columns]
        return arrow.schema([*(ours[:1] if ours[0].name == "index" else []), *given, *ours[-2:]])

    def _stream(self, schema: Any, batch: Any) -> bytes:
        """The bytes that an Arrow stream has for a batch, or at its beginning."""
        sink = self._arrow.BufferOutputStream()
        with self._arrow.ipc.new_stream(sink, schema) as writer:
            start = 0
            if batch is not None:
                start = len(self._stream(schema, None))
                writer.write_batch(batch)
        return bytes(sink.getvalue())[start:-STREAM_END_BYTES]


OUTPUTS: dict[str, type[FileOutput]] = {
    ".jsonl": JsonlFile,
    ".ndjson": JsonlFile,
    ".npy": NpyFile,
    ".csv": _CsvFile,
    ".tsv": _TsvFile,
    ".parquet": _ParquetFile,
}
"""By what an output's name ends in."""


def open_output(target: Path | None, settings: Settings, *, overwrite: bool) -> Stdout | FileOutput:
    """Output for `target`, of the kind that its name says; None is stdout, which cannot be resumed. Raises WrongUsage.

    For a target that is finished already, call `finished_before` first.
    """
    if target is None:
        return Stdout(settings)
    try:
        return OUTPUTS[target.suffix](target, settings, overwrite)
    except OSError as error:
        raise WrongUsage(f"{target} cannot be written ({error.strerror}). Choose another --output.") from None


def _names(batch: LineBatch | None) -> list[str]:
    columns = batch.columns if batch is not None else ()
    return [name for name in OWN_COLUMNS[:1] if name not in columns] + [*columns, *OWN_COLUMNS[1:]]


def _list(vector: Vector) -> str:
    return orjson.dumps(vector, option=orjson.OPT_SERIALIZE_NUMPY).decode()


def _why(outcome: Vector | Refusal) -> str:
    return f"{outcome.code}: {outcome.message}" if isinstance(outcome, Refusal) else ""
