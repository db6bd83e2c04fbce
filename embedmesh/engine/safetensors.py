"""Weights from safetensors files, by memory map. The files are untrusted: every number is checked before use.

Layout: 8 bytes of little-endian header length, a JSON header of name -> {dtype, shape, data_offsets}, then the data.
A large model is cut into shards; `model.safetensors.index.json` then says which tensor is in which file.
"""

from __future__ import annotations

import math
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from embedmesh.engine.widened import Widened, places
from embedmesh.rules.errors import SetupError
from embedmesh.rules.limits import MODEL_SHARDS_MAX

if TYPE_CHECKING:  # a node reads headers only, and has 15 MB less without numpy
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]
    Table = Array | npt.NDArray[np.float16]

WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX_FILE = "model.safetensors.index.json"

WEIGHTS_HEADER_BYTES_MAX = 16 * 1024 * 1024  # some 100 bytes a tensor; the format's own bound is 100 MB
SHARD_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors")  # a file of the folder, and not hidden
HEADER_LENGTH_BYTES = 8
FLOAT_DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # each is a float32 without a loss
INTEGER_DTYPES = {"I64": "<i8", "I32": "<i4", "I8": "<i1"}


class TensorEntry(msgspec.Struct):
    """One tensor of the header; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class WeightsIndex(msgspec.Struct):
    """`model.safetensors.index.json`: the file of each tensor."""

    weight_map: dict[str, str]


class Weights:
    """The tensors of a folder. F32 arrays are views into a map: pages are read when touched and belong to the file.

    The map is private and copy-on-write, since graphs take no read-only arrays; nothing here ever writes to it. F16 and
    BF16 become float32 in another map (see `widened`), but for tables in F16, which stay as they are.
    """

    def __init__(self, folder: Path) -> None:
        """`folder` holds `model.safetensors`, or the index and its shards; with neither, every `get` is refused.

        Raises SetupError in one line when a file is missing, cut short or not safetensors.
        """
        self._root = ""
        self._folder = folder.name
        self._files = [WeightsFile(folder / name) for name in weight_files(folder)]
        self._widened = Widened(places(folder))
        self._tensors: dict[str, tuple[WeightsFile, TensorEntry]] = {}
        for file in self._files:
            for name, entry in file.read_header().items():
                if name in self._tensors:
                    raise SetupError(f"The weights of {folder.name} cannot be used: two files hold {name}.")
                self._tensors[name] = file, entry

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return self._root + name in self._tensors

    def entry(self, name: str) -> TensorEntry:
        """The header's entry of the tensor `name`. Raises SetupError when there is none."""
        return self._find(name)[1]

    def entries(self) -> Iterator[tuple[str, TensorEntry]]:
        """Every tensor's whole name and entry of the header, which is not checked."""
        for name, (_, entry) in self._tensors.items():
            yield name, entry

    def get(self, name: str, *shape: int) -> Array:
        """The tensor `name` in float32, which must have just this shape. Raises SetupError otherwise."""
        import numpy as np

        file, entry = self._find(name)
        raw = file.read(self._root + name, entry, shape, FLOAT_DTYPES)
        if entry.dtype == "F32":
            return np.require(raw, np.float32, ["ALIGNED"])
        wide = self._widened.place(raw.size).reshape(shape)
        if entry.dtype == "BF16":  # the upper half of a float32
            bits = wide.view(np.uint32)
            np.copyto(bits, raw)
            np.left_shift(bits, 16, out=bits)
        else:
            np.copyto(wide, raw)
        return wide

    def table(self, name: str, *shape: int) -> Table:
        """As `get`, for rows that are looked up: F16 stays what it is, and is as little in memory as the file."""
        import numpy as np

        file, entry = self._find(name)
        if entry.dtype != "F16":
            return self.get(name, *shape)
        return np.require(file.read(self._root + name, entry, shape, FLOAT_DTYPES), np.float16, ["ALIGNED"])

    def stored(self, name: str, *shape: int) -> npt.NDArray[Any]:
        """The tensor as the file has it, a view: F32, F16, or BF16 as uint16. Raises SetupError as `get` does."""
        file, entry = self._find(name)
        return file.read(self._root + name, entry, shape, FLOAT_DTYPES)

    def integers(self, name: str, *shape: int) -> npt.NDArray[np.int64]:
        """A tensor of integers, of just this shape. Raises SetupError otherwise."""
        file, entry = self._find(name)
        return file.read(self._root + name, entry, shape, INTEGER_DTYPES).astype("<i8")

    def rooted(self, anchor: str) -> Weights:
        """The same weights without the prefix of their names: what stands before `anchor` ("", "bert.", "model.").

        Raises SetupError unless exactly one tensor's name ends in `anchor`.
        """
        roots = [name.removesuffix(anchor) for name in self._tensors if ("." + name).endswith("." + anchor)]
        if len(roots) != 1:
            found = "there are several tensors" if roots else "there is no tensor"
            raise SetupError(f"The weights of {self._folder} cannot be used: {found} {anchor}.")
        view = object.__new__(Weights)
        view.__dict__.update(self.__dict__, _root=roots[0])
        return view

    def _find(self, name: str) -> tuple[WeightsFile, TensorEntry]:
        found = self._tensors.get(self._root + name)
        if found is None:
            missing = f"there is no tensor {self._root}{name}" if self._files else f"there is no {WEIGHTS_FILE}"
            raise SetupError(f"The weights of {self._folder} cannot be used: {missing}. Fetch the model again.")
        return found

    def release_pages(self) -> None:
        """Give the pages back to the system; touched again, they are read from the files. Arrays stay valid."""
        for file in self._files:
            file.release_pages()
        self._widened.release_pages()


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the folder's weights; none when there are no safetensors. Raises SetupError."""
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    try:
        with (folder / WEIGHTS_INDEX_FILE).open("rb") as file:
            text = file.read(WEIGHTS_HEADER_BYTES_MAX)  # cut short it is no JSON
    except OSError:
        return []
    try:
        names = sorted(set(msgspec.json.decode(text, type=WeightsIndex).weight_map.values()))
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        raise SetupError(
            f"Model file {WEIGHTS_INDEX_FILE} is not an index of tensors: fetch the model again."
        ) from None
    if len(names) > MODEL_SHARDS_MAX:
        raise SetupError(
            f"Model file {WEIGHTS_INDEX_FILE} names {len(names)} shards; at most {MODEL_SHARDS_MAX} are read."
        )
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise SetupError(
                f"Model file {WEIGHTS_INDEX_FILE} names a shard that is no safetensors file beside it: {name[:80]!r}."
            )
    return names


class WeightsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):
            raise SetupError(f"Cannot read the weights {path.name}. Fetch the model again.") from None
        self._data_start = HEADER_LENGTH_BYTES + int.from_bytes(self._map[:HEADER_LENGTH_BYTES], "little")

    def read(self, name: str, entry: TensorEntry, shape: tuple[int, ...], dtypes: dict[str, str]) -> npt.NDArray[Any]:
        """The tensor as it is in the file. Raises SetupError unless it has this shape and one of these types."""
        import numpy as np

        if entry.dtype not in dtypes:
            raise self._broken(f"holds {name} as {entry.dtype}, and only {', '.join(dtypes)} are supported")
        if tuple(entry.shape) != shape:
            raise self._broken(f"holds {name} with shape {entry.shape}, and the config asks for {list(shape)}")
        start, end = entry.data_offsets
        count = math.prod(shape)
        item = np.dtype(dtypes[entry.dtype])
        if not 0 <= start <= end <= len(self._map) - self._data_start or end - start != count * item.itemsize:
            raise self._broken(f"gives {name} a range that is not its size")
        return np.frombuffer(self._map, item, count, self._data_start + start).reshape(shape)

    def release_pages(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)

    def read_header(self) -> dict[str, TensorEntry]:
        """The entry of each tensor. Raises SetupError."""
        start = self._data_start
        if len(self._map) < HEADER_LENGTH_BYTES or start > min(len(self._map), WEIGHTS_HEADER_BYTES_MAX):
            raise self._broken("is cut short or not safetensors")
        try:
            header = msgspec.json.decode(self._map[HEADER_LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            return {name: msgspec.json.decode(raw, type=TensorEntry) for name, raw in header.items()}
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise self._broken("has a header that is not safetensors") from None

    def _broken(self, what: str) -> SetupError:
        return SetupError(f"The weights {self._name} cannot be used: the file {what}. Fetch the model again.")
