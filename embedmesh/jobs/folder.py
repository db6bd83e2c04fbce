"""The folder that files and segments lie in. Everything here blocks: it runs in the folder's own threads.

    contents/3f/file-…         a file; the last two characters of its id are its folder
    segments/batch_…/seg_…     the results of a unit
    ….part                     a draft of either

All is of mode 0600. Names are ours alone: a caller's file name is in the store only.
"""

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from embedmesh.files import DRAFT_SUFFIX, sync
from embedmesh.jobs.chunks import ContentsLost, SealedReader, SealedWriter
from embedmesh.rules.errors import SetupError
from embedmesh.rules.file_failures import StorageFull

FILE_THREADS = 4  # to wait for the disk; encryption lets go of the interpreter's lock
STRAY_S = 3_600.0  # since the last write: what has no row by then never gets one
NAMES_AT_ONCE = 500  # that the store is asked about together
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
OWN_NAME = re.compile(r"[A-Za-z0-9_-]{4,80}")

logger = logging.getLogger(__name__)


class Written:
    """A draft that becomes a file under its own name, or nothing."""

    def __init__(self, folder: "FileFolder", path: Path, name: str) -> None:
        self._folder = folder
        self._path = path
        self._name = name
        self._draft = path.with_name(path.name + DRAFT_SUFFIX)
        self._file: IO[bytes] | None = None
        self._chunks: SealedWriter | None = None

    def write(self, parts: Iterable[bytes]) -> None:
        """Append. Raises StorageFull; then call `abort`."""
        with told_as_full():
            chunks = self._begun()
            for part in parts:
                self._folder.check_free(len(part))
                chunks.write(part)

    def end(self) -> None:
        """It is durable, under its name. Raises StorageFull; then call `abort`."""
        with told_as_full():
            self._begun().end()
            assert self._file is not None
            self._file.close()
            self._draft.rename(self._path)
            sync(self._path.parent)

    def abort(self) -> None:
        """Leave nothing, also where `end` has just succeeded and nobody heard of it."""
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
            for each in (self._draft, self._path):  # the name is of this try alone
                with suppress(OSError):
                    each.unlink()

    def _begun(self) -> SealedWriter:
        if self._chunks is None:
            self._folder.make_parent(self._path)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            self._file = os.fdopen(os.open(self._draft, flags, 0o600), "wb")
            self._chunks = SealedWriter(self._file, self._folder.key_secret, self._name)
        return self._chunks


class OpenFile:
    """A file that is being read."""

    def __init__(self, path: Path, key_secret: bytes, name: str) -> None:
        """Raises ContentsLost, OSError."""
        self._file = path.open("rb")
        try:
            self._chunks = SealedReader(self._file, key_secret, name)
        except BaseException:
            self._file.close()
            raise

    def parts(self, start: int, stop: int | None) -> Iterator[bytes]:
        """See SealedReader."""
        return self._chunks.parts(start, stop)

    def close(self) -> None:
        """Harmless twice."""
        self._file.close()


class FileFolder:
    """Paths and drafts. Methods raise StorageFull where the disk has no room, or cannot be written."""

    def __init__(self, folder: Path, key_secret: bytes, free_min: int) -> None:
        self._contents = folder / "contents"
        self._segments = folder / "segments"
        self._free_min = free_min
        self.key_secret = key_secret
        self.threads = ThreadPoolExecutor(FILE_THREADS, thread_name_prefix="files")

    def make(self) -> None:
        """Raises SetupError."""
        try:
            for path in (self._contents, self._segments):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)
                if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
                    raise PermissionError(errno.EACCES, "Permission denied")
        except OSError as error:
            raise SetupError(f"Cannot use the folder of files {self._contents.parent}: {error.strerror}.") from None

    def free_bytes(self) -> int:
        """How many bytes files may take yet."""
        with told_as_full():
            disk = os.statvfs(self._contents)
            return max(0, disk.f_bavail * disk.f_frsize - self._free_min)

    def check_free(self, size: int) -> None:
        """Raise StorageFull where so much does not fit."""
        if size > self.free_bytes():
            raise StorageFull("The disk that files are kept on has no room now. Try again later.")

    def path_of(self, file_id: str) -> Path:
        """Where the contents of a file are."""
        return self._contents / _own(file_id)[-2:] / file_id

    def segment_path(self, batch_id: str, name: str) -> Path:
        """Where a segment is."""
        return self._segments / _own(batch_id) / _own(name)

    def begin(self, file_id: str) -> Written:
        """A file."""
        return Written(self, self.path_of(file_id), file_id)

    def begin_segment(self, batch_id: str, name: str) -> Written:
        """A segment."""
        return Written(self, self.segment_path(batch_id, name), name)

    def make_parent(self, path: Path) -> None:
        """Make the folder of a path, durably. Raises OSError."""
        if not path.parent.is_dir():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            sync(path.parent.parent)

    def open(self, path: Path, name: str) -> OpenFile:
        """Raises ContentsLost."""
        try:
            return OpenFile(path, self.key_secret, name)
        except OSError:
            raise ContentsLost("the file is not on the disk") from None

    def drop(self, file_id: str) -> None:
        """Delete the contents of a file, and its draft. What cannot be deleted now is a stray."""
        path = self.path_of(file_id)
        for each in (path, path.with_name(path.name + DRAFT_SUFFIX)):
            with suppress(OSError):
                each.unlink()

    def drop_segments(self, batch_id: str) -> None:
        """Delete all segments of a batch. What cannot be deleted now is a stray."""
        shutil.rmtree(self._segments / _own(batch_id), ignore_errors=True)

    def old_files(self) -> list[list[str]]:
        """Ids of files, and of drafts, that were last written long enough ago; some at a time."""
        return _some_at_a_time(
            path.name.removesuffix(DRAFT_SUFFIX)
            for shelf in _list(self._contents)
            for path in _list(shelf)
            if _is_old(path)
        )

    def old_segments(self) -> list[list[str]]:
        """Ids of batches whose segments were last written long enough ago; some at a time."""
        return _some_at_a_time(path.name for path in _list(self._segments) if _is_old(path))


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


def _own(name: str) -> str:
    """A name that we have made. Raises ContentsLost: no path comes from anywhere else."""
    if OWN_NAME.fullmatch(name) is None:
        raise ContentsLost("this is no name of ours")
    return name


def _list(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _is_old(path: Path) -> bool:
    try:
        return OWN_NAME.fullmatch(path.name.removesuffix(DRAFT_SUFFIX)) is not None and (
            time.time() - path.stat().st_mtime > STRAY_S
        )
    except OSError:
        return False


def _some_at_a_time(names: Iterable[str]) -> list[list[str]]:
    every = sorted(set(names))
    return [every[at : at + NAMES_AT_ONCE] for at in range(0, len(every), NAMES_AT_ONCE)]
