"""Files in a folder on a disk, of mode 0600. `….part` is a draft of what will be `…`."""

import errno
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from embedmesh.files import DRAFT_SUFFIX, sync
from embedmesh.jobs.backend import store_key
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.rules.errors import SetupError
from embedmesh.rules.file_failures import StorageFull

DISK_THREADS = 4  # to wait for the disk; encryption lets go of the interpreter's lock
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logger = logging.getLogger(__name__)


class DiskDraft:
    """A draft that is renamed."""

    def __init__(self, disk: "Disk", path: Path) -> None:
        self._disk = disk
        self._path = path
        self._draft = _draft_of(path)
        self._file: IO[bytes] | None = None

    def write(self, data: bytes) -> None:
        with told_as_full():
            if self._file is None:
                self._disk.make_parent(self._path)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                self._file = os.fdopen(os.open(self._draft, flags, 0o600), "wb")
            self._disk.check_free(len(data))
            self._file.write(data)

    def end(self) -> None:
        with told_as_full():
            assert self._file is not None, "nothing was written"
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._draft.rename(self._path)
            sync(self._path.parent)

    def abort(self) -> None:
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            for each in (self._draft, self._path):  # the name is of this try alone
                with suppress(OSError):
                    each.unlink()


class DiskFile:
    """An open file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._file = path.open("rb")
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, start: int, size: int, until: int) -> bytes:
        self._file.seek(start)
        return self._file.read(size)

    def close(self) -> None:
        self._file.close()


class Disk:
    """A folder, which all gateways of a store share. `free_min` bytes stay free whatever files want."""

    threads_max = DISK_THREADS

    def __init__(self, folder: Path, store_id: str, free_min: int) -> None:
        self._folder = folder
        self._mark = folder / store_key(store_id)
        self._free_min = free_min

    def make(self) -> None:
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(self._folder, os.R_OK | os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise SetupError(f"Cannot use the folder of files {self._folder}: {error.strerror}.") from None

    def mark(self) -> None:
        with told_as_full():
            self.make_parent(self._mark)
            self._mark.touch(0o600)

    check = mark  # it can be written to

    def total_bytes(self) -> int:
        with told_as_full():
            disk = os.statvfs(self._folder)
            return max(0, disk.f_blocks * disk.f_frsize - self._free_min)

    def free_bytes(self) -> int:
        with told_as_full():
            disk = os.statvfs(self._folder)
            return max(0, disk.f_bavail * disk.f_frsize - self._free_min)

    def check_free(self, size: int) -> None:
        """Raise StorageFull where so much does not fit."""
        if size > self.free_bytes():
            raise StorageFull("The disk that files are kept on has no room now. Try again later.")

    def make_parent(self, path: Path) -> None:
        """Make the folder of a path, durably. Raises OSError."""
        parent = path.parent
        if not parent.is_dir():
            if parent != self._folder:
                self.make_parent(parent)
            parent.mkdir(mode=0o700, exist_ok=True)
            sync(parent.parent)

    def begin(self, key: str) -> DiskDraft:
        return DiskDraft(self, self._folder / key)

    def open(self, key: str) -> DiskFile:
        try:
            return DiskFile(self._folder / key)
        except OSError:
            raise ContentsLost("the file is not on the disk") from None

    def drop(self, key: str) -> None:
        path = self._folder / key
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        for each in (path, _draft_of(path)):
            with suppress(OSError):
                each.unlink()

    def names(self, key: str) -> list[str]:
        with suppress(OSError):
            return sorted({path.name.removesuffix(DRAFT_SUFFIX) for path in (self._folder / key).iterdir()})
        return []

    def is_old(self, key: str, age_s: float) -> bool:
        path = self._folder / key
        written_s = []
        for each in (path, _draft_of(path)):
            with suppress(OSError):
                written_s.append(each.stat().st_mtime)
        return bool(written_s) and time.time() - max(written_s) > age_s

    def cut(self) -> None:
        """A disk is waited for."""


@contextmanager
def told_as_full() -> Iterator[None]:
    """Raise StorageFull for errors of the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise StorageFull("The disk that files are kept on is full. Try again later.") from None
        logger.error("the folder of files cannot be used: %s", error.strerror)
        raise StorageFull("Files cannot be kept now. Try again later.") from None


def _draft_of(path: Path) -> Path:
    return path.with_name(path.name + DRAFT_SUFFIX)
