"""One file, or one Lance table, that is made of a folder of parts when all of them are there."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedmesh.bulk.folder import PartFolder
from embedmesh.bulk.sinks import UnitTable
from embedmesh.bulk.stops import Stopped
from embedmesh.bulk.tables import pyarrow_here
from embedmesh.bulk.units import JobUnit
from embedmesh.bulk.usage import WrongUsage
from embedmesh.files import sync

JOINED_ROWS = 8_192  # of a row group: 50 MB of 1,536 components
LANCE_MISSING = "Lance needs pylance, which is not installed: pip install 'embedmesh[lance]'."


class JoinedFile:
    """`file:OUT.parquet`, `.jsonl`, `.npy` or `.lance`. Parts lie in `OUT.parts` meanwhile."""

    def __init__(self, output: str) -> None:
        """Raises WrongUsage where what it needs is not installed, or the file is at an address."""
        self._target = Path(output.partition(":")[2])
        kind, self._join = JOINS[self._target.suffix]
        if "://" in output:
            raise WrongUsage(f"An address takes a folder of parts, not one file: give it as -o {kind}:SCHEME://FOLDER.")
        if self._target.suffix == ".lance":
            _lance()
        self._parts = PartFolder(f"{kind}:{self._target}.parts")

    def begin(self, *, resumed: bool, overwrite: bool, width: int | None) -> None:
        """Make the folder of parts."""
        if not resumed and not overwrite and self._target.exists():
            raise WrongUsage(f"{self._target} exists. Choose another --output, or --overwrite it.")
        self._parts.begin(resumed=resumed, overwrite=overwrite, width=width)

    def write(self, unit: JobUnit, table: UnitTable) -> str:
        """As a folder's."""
        return self._parts.write(unit, table)

    def finish(self, parts: Iterable[str]) -> None:
        """Join them, unless that was done. Then the folder goes."""
        folder = Path(self._parts.folder)
        old = folder.with_name(f".{folder.name}.old")  # what is being removed is no longer taken for parts
        if any(folder.iterdir()) or not self._target.exists():
            named = list(parts)
            if not named:
                raise WrongUsage("The inputs have no rows: there is nothing to write.")
            self._parts.finish(named)
            self._write([folder / name.split()[0] for name in named])
        _remove(old)
        folder.replace(old)
        _remove(old)

    def _write(self, parts: Sequence[Path]) -> None:
        draft = self._target.with_name(f".{self._target.name}.draft")
        _remove(draft)
        self._join(parts, draft)
        if draft.is_dir():
            _remove(self._target)  # a folder does not replace another
        else:
            sync(draft)
        draft.replace(self._target)
        sync(self._target.parent)


def _join_lines(parts: Sequence[Path], into: Path) -> None:
    with into.open("wb") as whole:
        for part in parts:
            with part.open("rb") as lines:
                shutil.copyfileobj(lines, whole)


def _join_arrays(parts: Sequence[Path], into: Path) -> None:
    shapes = [np.load(part, mmap_mode="r").shape for part in parts]
    width = max((shape[1] for shape in shapes), default=0)
    whole = np.lib.format.open_memmap(into, "w+", np.dtype("<f4"), (sum(shape[0] for shape in shapes), width))
    first = 0
    for part, (rows, part_width) in zip(parts, shapes, strict=True):
        whole[first : first + rows] = np.load(part) if part_width == width else np.nan
        first += rows
    whole.flush()


def _tables(parts: Sequence[Path]) -> tuple[Any, Iterator[Any]]:
    """The columns of all parts, and Arrow tables of these, of about JOINED_ROWS rows each."""
    arrow, parquet = pyarrow_here()
    try:
        schema = arrow.unify_schemas([parquet.read_schema(part) for part in parts])
    except arrow.ArrowException as error:
        raise Stopped(f"The inputs have columns of one name and different types: {error}") from None

    def whole(some: Sequence[Any]) -> Any:
        return arrow.concat_tables([schema.empty_table(), *some], promote_options="default")

    def tables() -> Iterator[Any]:
        some: list[Any] = []
        for part in parts:
            some.append(parquet.read_table(part))
            if sum(map(len, some)) >= JOINED_ROWS:
                yield whole(some)
                some = []
        yield whole(some)

    return schema, tables()


def _join_parquet(parts: Sequence[Path], into: Path) -> None:
    _, parquet = pyarrow_here()
    schema, tables = _tables(parts)
    with parquet.ParquetWriter(into, schema) as writer:
        for table in tables:
            writer.write_table(table)


def _join_lance(parts: Sequence[Path], into: Path) -> None:
    """Vectors of a fixed width, as its index wants them."""
    arrow, _ = pyarrow_here()
    schema, tables = _tables(parts)
    widths = (len(one) for table in _tables(parts)[1] for one in table["embedding"] if one.is_valid)
    at = schema.get_field_index("embedding")
    vector = arrow.list_(arrow.float32(), next(widths, 0))
    fixed = schema.set(at, arrow.field("embedding", vector))
    batches = (
        batch
        for table in tables
        for batch in table.set_column(at, fixed.field(at), table["embedding"].cast(vector)).to_batches()
    )
    _lance().write_dataset(arrow.RecordBatchReader.from_batches(fixed, batches), str(into))


JOINS: dict[str, tuple[str, Callable[[Sequence[Path], Path], None]]] = {
    ".parquet": ("parquet", _join_parquet),
    ".jsonl": ("jsonl", _join_lines),
    ".npy": ("npy", _join_arrays),
    ".lance": ("parquet", _join_lance),
}


def _lance() -> Any:
    try:
        import lance
    except ImportError:
        raise WrongUsage(LANCE_MISSING) from None
    return lance


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
