"""A folder of parts, one a unit: Parquet, JSON lines or arrays. Local, or at any address that fsspec knows."""

import hashlib
import os
import secrets
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from embedmesh.bulk.remote import file_system, told_as_os_error
from embedmesh.bulk.sinks import UnitTable
from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.tables import pyarrow_here
from embedmesh.bulk.units import JobUnit
from embedmesh.bulk.usage import WrongUsage
from embedmesh.files import sync

PART = "part-"
DRAFT = ".draft-"  # readers of folders pass over names that begin with a dot


class PartFolder:
    """`parquet:FOLDER`, `jsonl:FOLDER` or `npy:FOLDER`. A part is named after its unit, and is whole or not there.

    Rows have what `embedmesh embed` writes to one file: their number, the other columns, the vector, and why there is
    none; those of `npy` are the vector alone. Parts in the order of their names are in the order of the input.
    """

    def __init__(self, output: str) -> None:
        """Raises WrongUsage where what it needs is not installed."""
        self._kind, _, folder = output.partition(":")
        self._encode = ENCODERS[self._kind]
        self._remote: Any
        self.folder: str
        self._remote, self.folder = file_system(folder.rstrip("/")) if "://" in folder else (None, folder)
        if self._kind == "parquet":
            pyarrow_here()

    def begin(self, *, resumed: bool, overwrite: bool, width: int | None) -> None:
        """Make the folder, and empty it of the parts of other jobs. Raises WrongUsage."""
        try:
            if self._remote is None:
                Path(self.folder).mkdir(parents=True, exist_ok=True)
            found = {} if resumed else self._sizes()
        except OSError as error:
            raise WrongUsage(f"{self.folder} cannot be used ({error.strerror or type(error).__name__}).") from None
        if found and not overwrite:
            raise WrongUsage(
                f"{self.folder} holds parts already, and it is not known which job made them."
                " Choose another --output, or --overwrite them."
            )
        self._remove(found)

    def write(self, unit: JobUnit, table: UnitTable) -> str:
        """The part's name, its size in bytes, and its SHA-256."""
        name = f"{PART}{unit.number:06}-{unit.key[:8]}.{self._kind}"
        content = self._encode(table)
        if self._remote is None:
            self._write(Path(self.folder), name, content)
        else:
            with told_as_os_error():
                self._remote.pipe_file(f"{self.folder}/{name}", content)  # storage has it whole or not at all
        return f"{name} {len(content)} {hashlib.sha256(content).hexdigest()}"

    def finish(self, parts: Iterable[str]) -> None:
        """Every part is there and has its size; what a worker that was killed has left is removed."""
        sizes = {name: int(size) for name, size, _ in map(str.split, parts)}
        found = self._sizes()
        wrong = [name for name, size in sizes.items() if found.get(name) != size]
        if wrong:
            raise Stopped(f"{len(wrong):,} parts in {self.folder} are missing or were changed, the first is {wrong[0]}")
        self._remove(found.keys() - sizes.keys())

    def _write(self, folder: Path, name: str, content: bytes) -> None:
        draft = folder / f"{DRAFT}{secrets.token_hex(8)}"  # two workers may write one part
        try:
            with draft.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(folder / name)
        finally:
            draft.unlink(missing_ok=True)
        sync(folder)

    def _sizes(self) -> dict[str, int]:
        """Of parts and drafts, by name."""
        if self._remote is None:
            found = {path.name: path.stat().st_size for path in Path(self.folder).iterdir() if path.is_file()}
        else:
            found = self._sizes_there()
        return {name: size for name, size in found.items() if name.startswith((PART, DRAFT))}

    def _sizes_there(self) -> dict[str, int]:
        with told_as_os_error():
            self._remote.invalidate_cache()
            there = self._remote.ls(self.folder, detail=True) if self._remote.exists(self.folder) else []
        return {one["name"].rpartition("/")[2]: one["size"] for one in there}

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            if self._remote is None:
                (Path(self.folder) / name).unlink(missing_ok=True)
            else:
                with told_as_os_error():
                    self._remote.rm_file(f"{self.folder}/{name}")


def _parquet(table: UnitTable) -> bytes:
    arrow, parquet = pyarrow_here()
    columns: dict[str, Any] = {"index": arrow.array(_numbers(table), arrow.int64())}
    if table.arrow is not None:
        columns |= {name: table.arrow.column(name) for name in table.arrow.schema.names}
    else:  # of one type in every part, whatever its values are
        columns |= {name: arrow.array(map(_as_text, values), arrow.string()) for name, values in table.columns.items()}
    bad = np.array([error is not None for error in table.errors], bool)
    ends = np.concatenate([[0], np.cumsum(~bad * table.vectors.shape[1])]).astype(np.int32)
    values = arrow.array(table.vectors[~bad].reshape(-1), arrow.float32())
    columns["embedding"] = arrow.ListArray.from_arrays(ends, values, mask=arrow.array(bad))
    columns["error"] = arrow.array(table.errors, arrow.string())
    into = BytesIO()
    kept = [name for name in columns if name != "embedding"]
    parquet.write_table(arrow.table(columns), into, use_dictionary=kept)  # no two vectors are alike
    return into.getvalue()


def _jsonl(table: UnitTable) -> bytes:
    names = list(table.columns)
    lines: list[bytes] = []
    values = zip(*table.columns.values(), strict=True) if names else [()] * len(table.ids)
    rows = zip(_numbers(table), values, table.vectors, table.errors, strict=True)
    for number, kept, vector, error in rows:
        row: dict[str, Any] = {"index": number, **dict(zip(names, kept, strict=True)), "embedding": vector}
        if error is not None:
            code, _, message = error.partition(": ")
            row |= {"embedding": None, "error": {"code": code, "message": message}}
        lines.append(orjson.dumps(row, default=str, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE))
    return b"".join(lines)


def _npy(table: UnitTable) -> bytes:
    into = BytesIO()
    np.save(into, table.vectors)
    return into.getvalue()


ENCODERS: dict[str, Callable[[UnitTable], bytes]] = {"parquet": _parquet, "jsonl": _jsonl, "npy": _npy}


def _numbers(table: UnitTable) -> range:
    return range(table.first, table.first + len(table.ids))


def _as_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else orjson.dumps(value).decode()
