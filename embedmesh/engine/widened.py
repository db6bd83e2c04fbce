"""Where float16 and bfloat16 weights are widened to float32: a file without a name, whose pages can be given back.

OpenVINO wants float32 constants, makes its own packed copy of them, and may read them again for a new shape. In
ordinary memory they would stay for good, as large as the packed copy. In a file on a disk the system may write them
out, and they are read again where they are needed. Where no disk has room, they are ordinary memory after all.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Array = npt.NDArray[np.float32]

MOUNTS = Path("/proc/self/mountinfo")
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")  # files there take memory
SEGMENT_BYTES = 64 * 1024 * 1024  # mapped at once: some twenty maps for a large model
DISK_LEFT_BYTES_MIN = 256 * 1024 * 1024  # others write to that disk as well
IN_FILE_BYTES_MIN = 64 * 1024  # smaller tensors, norms and biases, are ordinary memory


class Widened:
    """Room for float32 arrays. All stay valid as long as one of them, or this, is there."""

    def __init__(self, folders: Iterable[Path]) -> None:
        """The first of `folders` that is on a disk and may be written gets the file; it never has a name there."""
        self._folders = folders
        self._file: IO[bytes] | None = None
        self._looked = False
        self._maps: list[mmap.mmap] = []
        self._left = 0  # bytes of the last map that nobody has

    @property
    def bytes_in_file(self) -> int:
        """How large the file is."""
        return sum(map(len, self._maps))

    def place(self, count: int) -> Array:
        """Room for `count` numbers; what stands there means nothing."""
        import numpy as np

        size = count * 4
        if size < IN_FILE_BYTES_MIN or (size > self._left and not self._grow(size)):
            return np.empty(count, np.float32)
        last = self._maps[-1]
        start = len(last) - self._left
        self._left -= -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        return np.frombuffer(last, np.float32, count, start)

    def release_pages(self) -> None:
        """Give the pages back to the system; the file keeps what they say."""
        for each in self._maps:
            each.madvise(mmap.MADV_DONTNEED)

    def _grow(self, size: int) -> bool:
        """One more map of that size at least; False where there is no room, or no file."""
        if not self._looked:
            self._looked = True
            self._file = _open_file(self._folders)
        if self._file is None:
            return False
        start = self.bytes_in_file
        length = max(SEGMENT_BYTES, -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY)
        try:
            _reserve(self._file, start, length)
            self._maps.append(mmap.mmap(self._file.fileno(), length, access=mmap.ACCESS_WRITE, offset=start))
        except (OSError, ValueError):
            self._file = None  # of what is mapped already, the maps hold the file
            return False
        self._left = length
        return True


def places(folder: Path) -> list[Path]:
    """Where to look for room: beside the weights, since there was room for them, then where temporary files go."""
    return [folder, Path(tempfile.gettempdir()), Path("/var/tmp")]  # noqa: S108 - a file without a name


def has_room(folders: Iterable[Path], size: int) -> bool:
    """Whether numbers of that many bytes will be in a file."""
    file = _open_file(folders)
    if file is None:
        return False
    with file:
        usage = os.statvfs(file.fileno())
        return usage.f_bavail * usage.f_frsize >= size + DISK_LEFT_BYTES_MIN


def _open_file(folders: Iterable[Path]) -> IO[bytes] | None:
    for folder in folders:
        try:
            file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it lasts as long as its maps
        except OSError:  # read-only, or not ours
            continue
        if not takes_memory(file.fileno()):
            return file
        file.close()
    return None


def takes_memory(fd: int, mounts: Path = MOUNTS) -> bool:
    """Whether a file is on no disk but in memory. False where the system does not say."""
    device = os.fstat(fd).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        mount, _, kind = line.partition(" - ")
        if mount.split()[2:3] == [name]:
            return kind.split()[0] in MEMORY_FILE_SYSTEMS
    return False


def _reserve(file: IO[bytes], start: int, length: int) -> None:
    """Blocks of the disk, now: without room, a write to the map would end the process. Raises OSError."""
    usage = os.statvfs(file.fileno())
    if usage.f_bavail * usage.f_frsize < length + DISK_LEFT_BYTES_MIN:
        raise OSError("the disk is full")
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), start, length)
    else:
        os.ftruncate(file.fileno(), start + length)
