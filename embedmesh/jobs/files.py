"""What is in files and segments: on the disk, in chunks, encrypted under the store's key secret.

A file is written to a draft, synced and renamed; its row in the store comes last. So a row always has its contents, and
contents without a row are of no use: `sweep` deletes them.
"""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec

from embedmesh.rules.batches import FilePurpose, FileRow, Segment
from embedmesh.rules.ports import Clock
from embedmesh.storage.batches import Batches
from embedmesh.storage.files import FileRows

CHUNK_BYTES = 64 * 1024  # of plain contents under one tag: what is held to read one byte


class FileBounds(msgspec.Struct, frozen=True):
    """How much may be kept, in bytes. `disk_free_min` stays free whatever files want."""

    of_account: int = 20 * 1024**3
    disk_free_min: int = 1024**3


class ContentsLost(Exception):
    """A file's contents are not there, or were changed on the disk."""


class FileWriter:
    """A file that is being written: `commit` or `abort` ends it. As a context manager it aborts what was not ended."""

    file_id: str

    async def write(self, data: bytes) -> None:
        """Append. Raises BodyTooLarge (over the bound that `create` was given), StorageFull; then it was aborted."""
        raise NotImplementedError

    async def seal(self) -> FileRow:
        """The contents are durable; the row, which somebody else has to keep, or the contents are swept."""
        raise NotImplementedError

    async def commit(self) -> FileRow:
        """Keep the file. Raises TooMuchKept, StorageFull, StoreUnavailable; then it was aborted."""
        raise NotImplementedError

    async def abort(self) -> None:
        """Leave nothing. Harmless after `commit`."""
        raise NotImplementedError

    async def __aenter__(self) -> "FileWriter":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort()


class FileStore:
    """Contents of files and of segments in one folder, which gateways of one store share."""

    def __init__(
        self,
        folder: Path,
        rows: FileRows,
        batches: Batches,
        key_secret: bytes,
        clock: Clock,
        bounds: FileBounds | None = None,
    ) -> None:
        raise NotImplementedError

    async def open(self) -> None:
        """Make the folder where it is not there. Raises SetupError."""
        raise NotImplementedError

    async def close(self) -> None:
        """Wait for what is being written."""
        raise NotImplementedError

    async def bytes_allowed(self, account_id: str, can_pay_bytes: int | None = None) -> int:
        """How much an account may keep in all now: for `create` and `Batches.begin`.

        The least of its bound, of its share of the disk, and of `can_pay_bytes` (`rules.batches.bytes_paid_for`), which
        is what it could have worked off with the money that it has. Raises StoreUnavailable.
        """
        raise NotImplementedError

    async def create(
        self,
        account_id: str,
        *,
        filename: str,
        purpose: FilePurpose,
        expires_s: int,
        file_bytes_max: int,
        kept_bytes_max: int,
    ) -> FileWriter:
        """Begin a file. Raises TooMuchKept, Overloaded (too many are being written), StorageFull, StoreUnavailable.

        `file_bytes_max` bounds this file, `kept_bytes_max` all of the account (`bytes_allowed`).
        """
        raise NotImplementedError

    def read(self, file_id: str, start: int = 0, stop: int | None = None) -> AsyncIterator[bytes]:
        """The contents from `start` until before `stop`, at most a MiB at a time. Raises ContentsLost.

        Look for the row first (`FileRows.find`): this one does not ask whose it is.
        """
        raise NotImplementedError

    async def delete(self, account_id: str, file_id: str) -> bool:
        """Nobody sees the file any more; the contents go at once, or when no batch reads them any more.

        False: the account has no such file. Raises StoreUnavailable.
        """
        raise NotImplementedError

    async def write_segment(self, batch_id: str, output: Sequence[bytes], errors: Sequence[bytes]) -> Segment:
        """Durably write a unit's results under a new name. Raises StorageFull."""
        raise NotImplementedError

    def read_segment(self, batch_id: str, segment: Segment, *, errors: bool) -> AsyncIterator[bytes]:
        """The output lines or the error lines of a segment. Raises ContentsLost."""
        raise NotImplementedError

    async def drop_segments(self, batch_id: str) -> None:
        """A batch has ended: delete its segments."""
        raise NotImplementedError

    async def sweep(self) -> int:
        """Delete what is of no use: expired files, contents without a row, segments of batches that ended; how many."""
        raise NotImplementedError

    async def watch(self) -> None:
        """Sweep now and then, for ever; cancel it."""
        raise NotImplementedError
