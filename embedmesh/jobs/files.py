"""Files: their rows in the store, and what is in them, written and read as streams of bounded memory.

The contents are durable under their own name before their row comes. So a row always has its contents, and contents
without a row are of no use: `sweep` deletes them. The same goes for segments, the results of a batch's units.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from embedmesh.jobs.backend import FREE_BYTES
from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.file_writer import WRITE_AT_ONCE_BYTES, FileWriter
from embedmesh.jobs.folder import FileFolder, file_key, segment_key, segments_key
from embedmesh.rules.batches import FilePurpose, FileRow, Segment, output_bytes_paid_for
from embedmesh.rules.errors import InvalidValue, StoreUnavailable
from embedmesh.rules.file_failures import StorageFull
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import FILENAME_CHARS_MAX, FILES_OF_ACCOUNT_MAX, UPLOADS_MAX
from embedmesh.rules.ports import Clock
from embedmesh.rules.shares import ACCOUNT_SHARE, Room
from embedmesh.storage.batches import Batches
from embedmesh.storage.files import FORGOTTEN_AT_ONCE, FileRows, too_much

FILES_SWEEP_EVERY_S = 60.0
STRAYS_EVERY_S = 3_600.0  # contents without a row are rare: a process died between two steps
READ_AT_ONCE_BYTES = 1024 * 1024  # by ourselves: object storage takes as long for a quarter of it
CLOSE_S = 5.0  # for object storage, once the gateway ends: an upload that is aborted leaves nothing
OTHER_STORES = (
    "%s has files of other stores, so nothing that this store does not know is deleted there. Give each store a place "
    "of its own, or, where no other store keeps files there any more, delete what is under stores/: %s"
)

T = TypeVar("T")

log = logging.getLogger("embedmesh.jobs")


class FileBounds(msgspec.Struct, frozen=True):
    """How much may be kept, in bytes. `disk_free_min` stays free whatever files want."""

    of_account: int = 20 * 1024**3  # some ten batches of 50,000 long vectors as decimals
    disk_free_min: int = 1024**3  # for the store beside it, and its log


class FileStore:
    """Files and segments of one store, in one folder or prefix of object storage, which all its gateways share."""

    def __init__(
        self,
        place: Path | str,
        rows: FileRows,
        batches: Batches,
        key_secret: bytes,
        clock: Clock,
        bounds: FileBounds | None = None,
    ) -> None:
        self.place = place
        self.rows = rows
        self._batches = batches
        self._clock = clock
        self._bounds = bounds or FileBounds()
        self.folder = FileFolder(place, key_secret, self._bounds.disk_free_min)
        self._uploads = Room(
            UPLOADS_MAX,
            f"At most {UPLOADS_MAX} files may be uploaded at one time, each account up to a share. Try again shortly.",
        )
        self.sending: Counter[str] = Counter()  # by account: bytes of files that are being uploaded here
        self.free_bytes: int | None = None  # what files may take yet, at the last look; None: there is no such bound
        self.unavailable = False  # the place, at the last look
        self._strays_s = clock.monotonic() - STRAYS_EVERY_S  # the first time at once

    def bound(self, of_account: int) -> None:
        """How many bytes one account may keep from now on. What it has stays."""
        self._bounds = msgspec.structs.replace(self._bounds, of_account=of_account)

    async def open(self) -> None:
        """Make the folder where it is not there. Raises SetupError."""
        await self.in_thread(self.folder.backend.make)

    def end_soon(self) -> None:
        """The gateway ends: what waits for object storage gives up in CLOSE_S."""
        asyncio.get_running_loop().call_later(CLOSE_S, self.folder.backend.cut)

    async def close(self) -> None:
        """Wait for what is being written, if not for long: see `end_soon`."""
        self.end_soon()
        await asyncio.get_running_loop().run_in_executor(None, self.folder.threads.shutdown)

    async def bytes_allowed(self, account_id: str, can_pay_bytes: int | None = None) -> int:
        """How much an account may keep in all now: for `create` and `Batches.begin`. Raises StoreUnavailable.

        The least of its bound, of its share of the disk, and of `can_pay_bytes`: what it could have worked off with the
        money that it has (`FileRows.means_nanousd`, `rules.batches.bytes_paid_for`). That bounds what it sends; output
        files are of work that was paid. What it keeps already counts.
        """
        kept = await self.rows.kept(account_id)
        free = await self.in_thread(self.folder.backend.free_bytes)
        allowed = min(self._bounds.of_account, ACCOUNT_SHARE * (kept.bytes + free) // (ACCOUNT_SHARE + 1))
        if can_pay_bytes is None:
            return allowed
        return min(allowed, can_pay_bytes + kept.bytes - kept.sent_bytes + kept.reserved)

    async def bytes_for_output(self, account_id: str, price: int) -> int:
        """How much an account may keep in all, the output of one more batch of that price included.

        Bounded by money, too: lines that are refused or cancelled are free, and their errors are kept.
        """
        paid_for = output_bytes_paid_for(await self.rows.means_nanousd(account_id), price)
        allowed = await self.bytes_allowed(account_id)
        return allowed if paid_for is None else min(allowed, paid_for)

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
        """Begin a file. Raises TooMuchKept, Overloaded (too many are being uploaded), InvalidValue, StoreUnavailable.

        `file_bytes_max` bounds this file, `kept_bytes_max` all of the account (`bytes_allowed`); an account that has as
        much already is refused at once.
        """
        if len(filename) > FILENAME_CHARS_MAX:
            raise InvalidValue(f"A file's name may have at most {FILENAME_CHARS_MAX} characters.", param="file")
        now_ms = self._clock.unix_ms()
        row = FileRow(
            file_id=f"file-{new_id('file', self._clock).removeprefix('file_')}",
            account_id=account_id,
            filename=filename,
            purpose=purpose,
            bytes=0,
            created_ms=now_ms,
            expires_ms=now_ms + expires_s * 1000,
        )
        kept = None
        if purpose is FilePurpose.BATCH:
            kept = await self.rows.kept(account_id)
            if kept.bytes + kept.reserved >= kept_bytes_max or kept.files >= FILES_OF_ACCOUNT_MAX:
                raise too_much(kept, 1, kept_bytes_max)
            self._uploads.take(account_id)
        return FileWriter(self, row, file_bytes_max, kept_bytes_max, kept)

    def read(
        self, file_id: str, start: int = 0, stop: int | None = None, at_once: int = WRITE_AT_ONCE_BYTES
    ) -> AsyncGenerator[bytes, None]:
        """The contents from `start` until before `stop`, `at_once` or a chunk less. Raises ContentsLost, StorageFull.

        Look for the row first (`FileRows.find`): this does not ask whose it is. Close it: a file is open.
        """
        return self._parts(file_key(file_id), start, stop, at_once)

    async def delete(self, account_id: str, file_id: str) -> bool:
        """Nobody sees the file any more; the contents go at once, or when no batch reads them any more.

        False: the account has no such file. Raises StoreUnavailable.
        """
        if not await self.rows.delete(account_id, file_id):
            return False
        for forgotten in await self.rows.forget([file_id]):
            await self.drop(forgotten)
        return True

    async def write_segment(self, batch_id: str, output: Sequence[bytes], errors: Sequence[bytes]) -> Segment:
        """Durably write a unit's results under a new name. Raises StorageFull."""
        name = new_id("seg", self._clock)
        parts = [*output, *errors]

        def write() -> None:
            written = self.folder.begin_segment(batch_id, name)
            try:
                written.write(parts)
                written.end()
            except BaseException:
                written.abort()
                raise

        await self.in_thread(write)
        return Segment(name, sum(map(len, output)), sum(map(len, errors)))

    def read_segment(self, batch_id: str, segment: Segment, *, errors: bool) -> AsyncGenerator[bytes, None]:
        """The output lines or the error lines of a segment. Raises ContentsLost, StorageFull. Close it, too."""
        middle = segment.output_bytes
        span = (middle, middle + segment.error_bytes) if errors else (0, middle)
        return self._parts(segment_key(batch_id, segment.name), *span, READ_AT_ONCE_BYTES)

    async def drop_segments(self, batch_id: str) -> None:
        """A batch has ended: delete its segments."""
        await self.in_thread(lambda: self.folder.drop_segments(batch_id))

    async def sweep(self) -> int:
        """Delete what is of no use: expired files, contents without a row, what batches have left; how many.

        Raises StoreUnavailable, StorageFull.
        """
        swept = 0
        while forgotten := await self.rows.forget():
            for file_id in forgotten:
                await self.drop(file_id)
            swept += len(forgotten)
            if len(forgotten) < FORGOTTEN_AT_ONCE:
                break
        for batch_id in await self._batches.unswept():
            await self.drop_segments(batch_id)
            await self._batches.sweep(batch_id)
            swept += 1
        swept += await self._batches.forget()
        if self._clock.monotonic() - self._strays_s >= STRAYS_EVERY_S:
            others = await self.in_thread(self.folder.other_stores)
            self._strays_s = self._clock.monotonic()
            if others:
                log.error(OTHER_STORES, self.place, ", ".join(others[:5]))
            else:
                swept += await self._sweep_strays()
        return swept

    async def watch(self) -> None:
        """Sweep now and then, for ever; cancel it."""
        while True:
            await self.look()
            try:
                await self.sweep()
            except (StoreUnavailable, StorageFull):
                log.info("files cannot be swept now: they wait")
            await asyncio.sleep(FILES_SWEEP_EVERY_S)

    async def look(self) -> None:
        """How the place is, for /metrics."""
        try:
            self.free_bytes = await self.in_thread(self._free_bytes)
            self.unavailable = False
        except StorageFull:
            self.unavailable = True

    # -- within

    def _free_bytes(self) -> int | None:
        backend = self.folder.backend
        backend.check()
        return backend.free_bytes() if 0 < backend.total_bytes() < FREE_BYTES else None

    async def drop(self, file_id: str) -> None:
        """Delete the contents of a file without a row; if that fails, they are swept later."""
        await self.in_thread(lambda: self.folder.drop(file_id))

    def ended(self, row: FileRow, size: int) -> None:
        """A file of which `size` bytes have come is not being written any more."""
        if row.purpose is FilePurpose.BATCH:
            self._uploads.give_back(row.account_id)
            self.sending[row.account_id] -= size
            self.sending += Counter()  # without those that send nothing

    async def in_thread(self, call: Callable[[], T]) -> T:
        """Run what waits for the disk or the network, in threads that nothing else waits for."""
        return await asyncio.get_running_loop().run_in_executor(self.folder.threads, call)

    async def _parts(self, key: str, start: int, stop: int | None, at_once: int) -> AsyncGenerator[bytes, None]:
        if start == stop:
            return
        reader = await self.in_thread(lambda: self.folder.open(key))
        try:
            parts = reader.parts(start, stop, at_once)
            while part := await self.in_thread(lambda: _some(parts, at_once)):
                yield part
        finally:
            reader.close()

    async def _sweep_strays(self) -> int:
        swept = 0
        file_pages, batch_pages = self.folder.file_ids(), self.folder.batch_ids()
        while file_ids := await self._next(file_pages):
            for file_id in await self.rows.unknown(file_ids):
                if await self._is_stray(file_key(file_id)):
                    await self.drop(file_id)
                    swept += 1
        while batch_ids := await self._next(batch_pages):
            for batch_id in await self._batches.ended(batch_ids):
                if await self._is_stray(segments_key(batch_id)):
                    await self.drop_segments(batch_id)
                    swept += 1
        return swept

    async def _is_stray(self, key: str) -> bool:
        return await self.in_thread(lambda: self.folder.is_stray(key))

    async def _next(self, pages: Iterator[list[str]]) -> list[str]:
        return await self.in_thread(lambda: next(pages, []))


def _some(parts: Iterable[bytes], at_once: int) -> bytes:
    """The next parts, `at_once` together; empty after the last."""
    some: list[bytes] = []
    size = 0
    for part in parts:
        some.append(part)
        size += len(part)
        if size >= at_once:
            break
    return b"".join(some)


__all__ = ["ContentsLost", "FileBounds", "FileStore", "FileWriter"]
