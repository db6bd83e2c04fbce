"""The folder that files and segments lie in: their keys, and their encryption. Everything here blocks: it runs in the
folder's own threads.

    contents/3f/file-…         a file; the last two characters of its id are its shelf
    segments/batch_…/seg_…     the results of a unit
    stores/…                   a mark of each store that keeps files here

Names are ours alone: a caller's file name is in the store only.
"""

import hmac
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from embedmesh.jobs.backend import Draft, FileBackend, Stored
from embedmesh.jobs.chunks import CHUNK_BYTES, ContentsLost, SealedReader, SealedWriter
from embedmesh.jobs.disk import Disk
from embedmesh.jobs.objects import ObjectStorage
from embedmesh.rules.file_failures import StorageFull

STORE_INFO = b"embedmesh store of files v1"
STRAY_S = 3_600.0  # since the last write: what has no row by then never gets one
NAMES_AT_ONCE = 500  # that the store is asked about together
OWN_NAME = re.compile(r"[A-Za-z0-9_-]{4,80}")


class Written:
    """A draft that becomes a file under its own name, or nothing."""

    def __init__(self, draft: Draft, key_secret: bytes, name: str) -> None:
        self._draft = draft
        self._key_secret = key_secret
        self._name = name
        self._chunks: SealedWriter | None = None

    def write(self, parts: Iterable[bytes]) -> None:
        """Append. Raises StorageFull; then call `abort`."""
        chunks = self._begun()
        for part in parts:
            chunks.write(part)

    def end(self) -> None:
        """It is durable, under its name. Raises StorageFull; then call `abort`."""
        self._begun().end()
        self._draft.end()

    def abort(self) -> None:
        """Leave nothing, also where `end` has just succeeded and nobody heard of it."""
        self._draft.abort()

    def _begun(self) -> SealedWriter:
        if self._chunks is None:
            self._chunks = SealedWriter(self._draft, self._key_secret, self._name)
        return self._chunks


class OpenFile:
    """A file that is being read."""

    def __init__(self, stored: Stored, key_secret: bytes, name: str) -> None:
        """Raises ContentsLost, StorageFull, OSError."""
        self._stored = stored
        try:
            self._chunks = SealedReader(stored, key_secret, name)
        except BaseException:
            stored.close()
            raise

    def parts(self, start: int, stop: int | None, at_once: int = CHUNK_BYTES) -> Iterator[bytes]:
        """See SealedReader."""
        return self._chunks.parts(start, stop, at_once)

    def close(self) -> None:
        """Harmless twice."""
        self._stored.close()


class FileFolder:
    """What lies where, on a disk or in object storage. Methods raise StorageFull where that has no room, or is away."""

    def __init__(self, place: Path | str, key_secret: bytes, free_min: int) -> None:
        """`place` is a folder, or the address of object storage. `free_min` bytes of a disk stay free."""
        self._store_id = hmac.digest(key_secret, STORE_INFO, "sha256")[:8].hex()
        self.backend: FileBackend = (
            ObjectStorage(place, self._store_id) if isinstance(place, str) else Disk(place, self._store_id, free_min)
        )
        self._key_secret = key_secret
        self.threads = ThreadPoolExecutor(self.backend.threads_max, thread_name_prefix="files")

    def begin(self, file_id: str) -> Written:
        """A file."""
        return Written(self.backend.begin(file_key(file_id)), self._key_secret, file_id)

    def begin_segment(self, batch_id: str, name: str) -> Written:
        """A segment."""
        return Written(self.backend.begin(segment_key(batch_id, name)), self._key_secret, name)

    def open(self, key: str) -> OpenFile:
        """A file or a segment. Raises ContentsLost, OSError."""
        return OpenFile(self.backend.open(key), self._key_secret, key.rpartition("/")[2])

    def drop(self, file_id: str) -> None:
        """Delete the contents of a file, and its draft. What cannot be deleted now is a stray."""
        self.backend.drop(file_key(file_id))

    def drop_segments(self, batch_id: str) -> None:
        """Delete all segments of a batch. What cannot be deleted now is a stray."""
        self.backend.drop(segments_key(batch_id))

    def other_stores(self) -> list[str]:
        """Ids of other stores that keep files here: what nobody knows may be theirs."""
        self.backend.mark()
        found = self.backend.names("stores")
        if self._store_id not in found:
            raise StorageFull("Files cannot be listed now. Try again later.")
        return [each for each in found if each != self._store_id]

    def file_ids(self) -> Iterator[list[str]]:
        """Ids of all files, and of drafts; some at a time."""
        shelves = self.backend.names("contents")
        yield from _some_at_a_time(name for shelf in shelves for name in self.backend.names(f"contents/{shelf}"))

    def batch_ids(self) -> Iterator[list[str]]:
        """Ids of all batches that have segments; some at a time."""
        yield from _some_at_a_time(self.backend.names("segments"))

    def is_stray(self, key: str) -> bool:
        """Whether what nobody knows was last written long enough ago that nobody will."""
        return self.backend.is_old(key, STRAY_S)


def file_key(file_id: str) -> str:
    """Where the contents of a file are. Raises ContentsLost."""
    return f"contents/{_own(file_id)[-2:]}/{file_id}"


def segments_key(batch_id: str) -> str:
    """Where the segments of a batch are. Raises ContentsLost."""
    return f"segments/{_own(batch_id)}"


def segment_key(batch_id: str, name: str) -> str:
    """Where a segment is. Raises ContentsLost."""
    return f"{segments_key(batch_id)}/{_own(name)}"


def _own(name: str) -> str:
    """A name that we have made. Raises ContentsLost: no key comes from anywhere else."""
    if OWN_NAME.fullmatch(name) is None:
        raise ContentsLost("this is no name of ours")
    return name


def _some_at_a_time(names: Iterable[str]) -> Iterator[list[str]]:
    ours = (name for name in names if OWN_NAME.fullmatch(name))
    while some := list(islice(ours, NAMES_AT_ONCE)):
        yield some
