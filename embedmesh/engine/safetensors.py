"""Weights from a safetensors file, by memory map. The file is input: every number in it is checked before it is used.

Layout: 8 bytes of little-endian header length, a JSON header of name -> {dtype, shape, data_offsets}, then the data.
"""

import math
import mmap
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from embedmesh.rules.errors import SetupError

HEADER_BYTES_MAX = 16 * 1024 * 1024  # some 100 bytes a tensor; the format's own bound is 100 MB
LENGTH_BYTES = 8

Weights = dict[str, npt.NDArray[np.float32]]


class Entry(msgspec.Struct):
    """One tensor of the header; offsets count from the end of the header."""

    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class WeightsFile:
    """The tensors of one file. Arrays are views into the map: pages are read when touched and belong to the file.

    The map is private and copy-on-write, since graphs take no read-only arrays; nothing here ever writes to it.
    """

    def __init__(self, path: Path) -> None:
        """Raises SetupError in one line when the file is missing, cut short or not safetensors."""
        self._name = path.name
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError):
            raise SetupError(f"Cannot read the weights {path.name}. Run `embedmesh setup`.") from None
        self._data_start, self._entries = self._read_header()

    def get(self, name: str, *shape: int) -> npt.NDArray[np.float32]:
        """The float32 tensor `name`, which must have just this shape. Raises SetupError otherwise."""
        entry = self._entries.get(name)
        if entry is None:
            raise self._broken(f"has no tensor {name}")
        if entry.dtype != "F32":
            raise self._broken(f"holds {name} as {entry.dtype}, and only F32 is supported")
        if tuple(entry.shape) != shape:
            raise self._broken(f"holds {name} with shape {entry.shape}, and the config asks for {list(shape)}")
        start, end = entry.data_offsets
        count = math.prod(shape)
        if not 0 <= start <= end <= len(self._map) - self._data_start or end - start != count * 4:
            raise self._broken(f"gives {name} a place that is not its size")
        return np.frombuffer(self._map, np.float32, count, self._data_start + start).reshape(shape)

    def release_pages(self) -> None:
        """Give the pages back; they are read again from the file if they are touched. Arrays stay valid."""
        self._map.madvise(mmap.MADV_DONTNEED)

    def _read_header(self) -> tuple[int, dict[str, Entry]]:
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        start = LENGTH_BYTES + length
        if len(self._map) < LENGTH_BYTES or length > HEADER_BYTES_MAX or start > len(self._map):
            raise self._broken("is cut short or not safetensors")
        try:
            header = msgspec.json.decode(self._map[LENGTH_BYTES:start], type=dict[str, msgspec.Raw])
            header.pop("__metadata__", None)
            return start, {name: msgspec.json.decode(raw, type=Entry) for name, raw in header.items()}
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            raise self._broken("has a header that is not safetensors") from None

    def _broken(self, what: str) -> SetupError:
        return SetupError(f"The weights {self._name} cannot be used: the file {what}. Fetch the model again.")
