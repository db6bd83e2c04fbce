"""Where vectors are written, so that a run that was stopped anywhere can be resumed.

After each batch the rows are made durable, then a checkpoint beside the output records how far they go. The next run
cuts off what was written after the checkpoint (a torn row, a batch without one) and continues from there. Until there
is a row to write, nothing of an earlier run is touched and nothing new stays behind.

A line without a vector keeps its row: `"embedding":null` and why in JSON, NaN in .npy. Rows and lines stay in step.
Of a table the columns beside the text are in the row, too, but for .npy. The kinds that are tables: `table_output.py`.
"""

import contextlib
import fcntl
import os
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson
from numpy.lib import format as npy_format

from embedmesh.bulk.lines import OVERWRITE, LineBatch, Refusal
from embedmesh.commands.bulk.checkpoint import Checkpoint, Settings, read_checkpoint, save_checkpoint
from embedmesh.commands.bulk.client import Stopped, Vector
from embedmesh.commands.output import WrongUsage

OWN_COLUMNS = ("index", "embedding", "error")  # an input's own "index" stands in the place of the line's number
NPY_HEADER_BYTES = 128  # numpy leaves room for the row count to grow, so the length does not depend on it


class Stdout:
    """JSON lines. A run cannot be resumed."""

    def __init__(self, settings: Settings) -> None:
        self.done = Checkpoint(settings)

    def write(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> None:
        """Write a row a line of the batch. Raises OSError."""
        sys.stdout.buffer.write(_json_rows(batch, outcomes))
        sys.stdout.buffer.flush()
        self.done.lines += len(outcomes)
        self.done.refused += _refused(outcomes)

    def finish(self) -> None:
        """There is no file to complete."""

    def close(self) -> None:
        """There is no file to close."""


class FileOutput:
    """What all kinds of file share: the lock, the checkpoint, and cutting back to it."""

    def __init__(self, target: Path, settings: Settings, overwrite: bool) -> None:
        self._target = target
        self._written = self._written_at(target)
        self._is_new = not self._written.exists()
        self._is_begun = False
        before = None if overwrite or self._is_new else read_checkpoint(target, settings)
        if not overwrite and before is None and _size(target):
            raise WrongUsage(
                f"{target} exists, and it is not known which run made it and whether it is complete."
                " Choose another --output, or --overwrite it."
            )
        self._rows: BinaryIO = os.fdopen(os.open(self._written, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            self._lock()
            self.done = self._resumed(settings) if before else Checkpoint(settings)
        except BaseException:
            self._rows.close()
            raise

    def _written_at(self, target: Path) -> Path:
        return target

    def _head(self, batch: LineBatch | None) -> bytes:
        return b""

    def _encode(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
        raise NotImplementedError

    def write(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> None:
        """Append a row a line of the batch, durably. Raises Stopped, OSError."""
        self._begin(batch)
        rows = self._encode(batch, outcomes)
        self._rows.write(rows)
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self.done.lines += len(outcomes)
        self.done.refused += _refused(outcomes)
        self.done.size_bytes += len(rows)
        self.done.digest = batch.digest
        save_checkpoint(self._target, self.done)

    def finish(self) -> None:
        """All is written: give the output its name, and record that it is complete."""
        self._begin(None)
        os.fsync(self._rows.fileno())
        self._complete()

    def close(self) -> None:
        """Close the file. Rows after the checkpoint are lost; a new file without rows is removed."""
        if self._is_new and not self._is_begun:
            self._written.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk was reported already, and the checkpoint is before it
            self._rows.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._rows, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._is_taken() from None
        opened = os.fstat(self._rows.fileno())
        if not (self._written.exists() and os.path.samestat(opened, self._written.stat())):
            raise self._is_taken()  # it ended just now, and has removed or renamed the file that we opened

    def _is_taken(self) -> WrongUsage:
        return WrongUsage(f"Another `embedmesh embed` is writing {self._target}. Wait for it to end.")

    def _resumed(self, settings: Settings) -> Checkpoint:
        """The checkpoint, read again: now that the lock is ours nobody changes it."""
        done = read_checkpoint(self._target, settings) or Checkpoint(settings)
        if _size(self._written) < done.size_bytes:
            raise WrongUsage(f"{self._written} is shorter than its checkpoint says.{OVERWRITE}")
        return done

    def _begin(self, batch: LineBatch | None) -> None:
        """Before the first row: cut back to the checkpoint, or make one of an output with no rows."""
        if self._is_begun:
            return
        self._is_begun = True
        self._rows.truncate(self.done.size_bytes)
        self._rows.seek(self.done.size_bytes)
        if self.done.size_bytes == 0:
            head = self._head(batch)
            self._rows.write(head)
            self.done.size_bytes = len(head)
            save_checkpoint(self._target, self.done)

    def _complete(self) -> None:
        self.done.finished = True
        save_checkpoint(self._target, self.done)


class JsonlFile(FileOutput):
    """`{"index":0,"embedding":[...]}` a line."""

    def _encode(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
        return _json_rows(batch, outcomes)


class NpyFile(FileOutput):
    """A float32 array (lines, width), written as OUT.npy.part; the header gets its row count at the end."""

    def _written_at(self, target: Path) -> Path:
        return target.with_name(target.name + ".part")

    def _head(self, batch: LineBatch | None) -> bytes:
        return _npy_header(0, 0)

    def _encode(self, batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
        width = self.done.width or next((len(row) for row in outcomes if not isinstance(row, Refusal)), None)
        if width is None:
            return b""  # rows of NaN wait until the first vector gives their width
        unwritten = 0 if self.done.width else self.done.lines
        self.done.width = width
        rows = np.full((unwritten + len(outcomes), width), np.nan, "<f4")
        for number, outcome in enumerate(outcomes, unwritten):
            if not isinstance(outcome, Refusal):
                if len(outcome) != width:
                    raise Stopped(f"The endpoint's vectors changed from {width} to {len(outcome)} components.")
                rows[number] = outcome
        return rows.tobytes()

    def finish(self) -> None:
        self._begin(None)
        self._rows.seek(0)
        self._rows.write(_npy_header(self.done.lines, self.done.width or 0))
        self._rows.flush()
        os.fsync(self._rows.fileno())
        self._written.replace(self._target)
        self._complete()


def _npy_header(rows: int, width: int) -> bytes:
    buffer = BytesIO()
    npy_format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (rows, width)})
    assert buffer.tell() == NPY_HEADER_BYTES
    return buffer.getvalue()


def kept_values(batch: LineBatch) -> list[tuple[Any, ...]]:
    """The values of a batch's other columns, row by row."""
    if not batch.columns:
        return [()] * len(batch.lines)
    if isinstance(batch.kept, list):
        return batch.kept
    return list(zip(*map(_python_values, batch.kept.columns), strict=True))


def _python_values(column: Any) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except ValueError:  # nanoseconds, which Python's own times do not have
        values = column.cast("string").to_pylist()
    return values


def _json_rows(batch: LineBatch, outcomes: list[Vector | Refusal]) -> bytes:
    rows: list[bytes] = []
    for index, (outcome, kept) in enumerate(zip(outcomes, kept_values(batch), strict=True), batch.first):
        row: dict[str, object] = {"index": index, **dict(zip(batch.columns, kept, strict=True)), "embedding": outcome}
        if isinstance(outcome, Refusal):
            row |= {"embedding": None, "error": {"code": outcome.code, "message": outcome.message}}
        rows.append(orjson.dumps(row, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return b"".join(rows)


def _refused(outcomes: list[Vector | Refusal]) -> int:
    return sum(isinstance(outcome, Refusal) for outcome in outcomes)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
