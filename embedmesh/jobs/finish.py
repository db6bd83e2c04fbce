"""The end of a batch: segments become its output file and its error file, which are streamed from disk to disk."""

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import TypeVar

from embedmesh.jobs.chunks import ContentsLost
from embedmesh.jobs.file_writer import FileWriter
from embedmesh.jobs.files import FileStore
from embedmesh.jobs.unit import LineResult, undone_lines
from embedmesh.rules.batches import Batch, BatchLease, BatchUnit, FilePurpose, FileRow
from embedmesh.storage.batch_rows import DoneUnit
from embedmesh.storage.batches import Batches

UNITS_A_LOOK = 256
KEPT_BYTES_MAX = 2**62  # the room for outputs was kept when the batch began

T = TypeVar("T", DoneUnit, BatchUnit)
DoAgain = Callable[[BatchUnit], Awaitable[Sequence[LineResult]]]
"""Works off a unit that was paid and whose results are lost. Raises ContentsLost."""

log = logging.getLogger("embedmesh.jobs")


async def write_outputs(
    batches: Batches, files: FileStore, lease: BatchLease, batch: Batch, code: str, do_again: DoAgain
) -> tuple[FileRow | None, FileRow | None, int]:
    """Write both files, durably; their rows, and how many lines the error file has. None for a file without a line.

    Lines that were not done are in the error file with that `code`; units whose results are lost are done again.
    Raises LeaseLost, StorageFull, StoreUnavailable.
    """
    if batch.in_progress_ms is None:
        return None, None, 0  # nothing was begun
    output, errors = OutputFile(files, batch, "output"), OutputFile(files, batch, "error")
    try:
        async with aclosing(_all(lambda after: batches.done_units(lease, after=after, limit=UNITS_A_LOOK))) as ended:
            async for done in ended:
                await _write_done(files, batch, done, output, errors, do_again)
        async with aclosing(_all(lambda after: batches.open_units(lease, after=after, limit=UNITS_A_LOOK))) as left:
            async for unit in left:
                try:
                    await _write_undone(files, batch, unit, errors, code)
                except ContentsLost:
                    continue  # nobody knows any more what was asked; what was done is in the output
        return await output.seal(), await errors.seal(), errors.lines
    except BaseException:
        await output.abort()
        await errors.abort()
        raise


async def _write_done(
    files: FileStore, batch: Batch, done: DoneUnit, output: "OutputFile", errors: "OutputFile", do_again: DoAgain
) -> None:
    """Nothing of a segment is written before all of it was read: it is as large as the results of one unit."""
    unit, lost = done.unit, (batch.batch_id, done.unit.unit)
    try:
        wholes = []
        for wrong in (False, True):
            async with aclosing(files.read_segment(batch.batch_id, done.segment, errors=wrong)) as pieces:
                wholes.append([piece async for piece in pieces])
    except ContentsLost:
        log.error("batch %s: the results of unit %s are lost; its lines are done again", *lost)
        try:
            results = await do_again(unit)
        except ContentsLost:
            log.critical("batch %s: unit %s was charged, its results and its lines are lost", *lost)
            return
        wholes = [[each.output or b"" for each in results], [each.error or b"" for each in results]]
    for to, whole in zip((output, errors), wholes, strict=True):
        for piece in whole:
            await to.write(piece)


async def _write_undone(files: FileStore, batch: Batch, unit: BatchUnit, errors: "OutputFile", code: str) -> None:
    async with aclosing(files.read(batch.input_file_id, unit.first_byte, unit.first_byte + unit.bytes)) as pieces:
        await errors.write(b"".join(await undone_lines(batch, unit, pieces, code)))


async def _all(page: Callable[[int], Awaitable[list[T]]]) -> AsyncGenerator[T, None]:
    """All units, page by page."""
    after = -1
    while found := await page(after):
        for each in found:
            yield each
        last = found[-1]
        after = last.unit.unit if isinstance(last, DoneUnit) else last.unit


class OutputFile:
    """A file that is begun with its first line."""

    def __init__(self, files: FileStore, batch: Batch, kind: str) -> None:
        self._files = files
        self._batch = batch
        self._kind = kind
        self._writer: FileWriter | None = None
        self.lines = 0

    async def write(self, piece: bytes) -> None:
        """Append some whole lines, or a part of them. Raises StorageFull."""
        if not piece:
            return
        if self._writer is None:
            self._writer = await self._files.create(
                self._batch.account_id,
                filename=f"{self._batch.batch_id}_{self._kind}.jsonl",
                purpose=FilePurpose.BATCH_OUTPUT,
                expires_s=self._batch.output_expires_s,
                file_bytes_max=KEPT_BYTES_MAX,
                kept_bytes_max=KEPT_BYTES_MAX,
            )
        self.lines += piece.count(b"\n")
        await self._writer.write(piece)

    async def seal(self) -> FileRow | None:
        """Its contents are durable."""
        return None if self._writer is None else await self._writer.seal()

    async def abort(self) -> None:
        """Leave nothing."""
        if self._writer is not None:
            await self._writer.abort()
            await self._files.drop(self._writer.file_id)  # it may be whole already
