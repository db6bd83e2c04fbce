"""One file while it is being written."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from embedmesh.jobs.folder import Written
from embedmesh.rules.batches import FileRow
from embedmesh.rules.errors import BodyTooLarge
from embedmesh.storage.files import KeptFiles, too_much

if TYPE_CHECKING:
    from embedmesh.jobs.files import FileStore

WRITE_AT_ONCE_BYTES = 256 * 1024  # of one file, in memory until it goes to a thread: a millisecond of encryption


class FileWriter:
    """A file that is being written: `commit` or `abort` ends it. As a context manager it aborts what was not ended."""

    def __init__(
        self, store: "FileStore", row: FileRow, file_bytes_max: int, kept_bytes_max: int, kept: KeptFiles | None
    ) -> None:
        """Made by `FileStore.create`. `kept` is what its account keeps, if that is to bound it."""
        self._store = store
        self._row = row
        self._file_bytes_max = file_bytes_max
        self._kept_bytes_max = kept_bytes_max
        self._kept = kept
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._bytes = 0
        self._written: Written | None = None
        self._running: asyncio.Future[object] | None = None
        self._over = False

    @property
    def file_id(self) -> str:
        """The id of the file."""
        return self._row.file_id

    async def write(self, data: bytes) -> None:
        """Append. Raises BodyTooLarge, TooMuchKept (over the bounds that `create` was given), StorageFull.

        Then it was aborted, and nothing more may be written.
        """
        assert not self._over, "the file was ended"
        self._bytes += len(data)
        if self._kept is not None:
            self._store.sending[self._row.account_id] += len(data)
        if self._bytes > self._file_bytes_max:
            await self.abort()
            raise BodyTooLarge(f"A file may have at most {self._file_bytes_max:,} bytes. Cut it into several.")
        kept = self._kept
        if kept is not None:
            sent = self._store.sending[self._row.account_id]  # with its other uploads: these fill the disk, too
            if kept.bytes + kept.reserved + sent > self._kept_bytes_max:
                await self.abort()
                raise too_much(kept, sent, self._kept_bytes_max)
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes >= WRITE_AT_ONCE_BYTES:
            await self._flush()

    async def seal(self) -> FileRow:
        """The contents are durable; the row is to be kept by somebody else, or the contents are swept.

        Raises StorageFull; then it was aborted.
        """
        await self._flush()
        assert self._written is not None
        await self._do(self._written.end)
        self._end()
        return msgspec.structs.replace(self._row, bytes=self._bytes)

    async def commit(self, *, expires_s: int | None = None) -> FileRow:
        """Keep the file. Raises TooMuchKept, StorageFull, StoreUnavailable; then it was aborted.

        `expires_s` takes the place of what `create` was given: a form may say it after the file.
        """
        row = await self.seal()
        if expires_s is not None:
            row = msgspec.structs.replace(row, expires_ms=row.created_ms + expires_s * 1000)
        try:
            await self._store.rows.add(row, bytes_max=self._kept_bytes_max)
        except BaseException:
            await self._store.drop(row.file_id)
            raise
        return row

    async def abort(self) -> None:
        """Leave nothing. Harmless after the end."""
        if self._over:
            return
        self._end()
        if self._running is not None and not self._running.done():
            await asyncio.wait([self._running])
        if self._written is not None:
            await self._store.in_thread(self._written.abort)

    async def __aenter__(self) -> "FileWriter":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.abort()

    async def _flush(self) -> None:
        data, self._waiting, self._waiting_bytes = self._waiting, [], 0
        if self._written is None:
            self._written = self._store.folder.begin(self.file_id)
        await self._do(partial(self._written.write, data))

    async def _do(self, call: Callable[[], object]) -> None:
        """In a thread; a caller that leaves does not stop it half-way. Aborts if it fails."""
        self._running = asyncio.ensure_future(self._store.in_thread(call))
        try:
            await asyncio.shield(self._running)
        except BaseException:
            await self.abort()
            raise

    def _end(self) -> None:
        self._over = True
        self._store.ended(self._row, self._bytes)
