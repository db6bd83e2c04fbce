"""Files in the store: their rows. What is in them lies on the disk (`embedmesh.jobs.files`)."""

import asyncio
from collections.abc import Sequence
from typing import Any

import msgspec

from embedmesh.rules.batches import FilePurpose, FileRow
from embedmesh.rules.errors import StoreUnavailable
from embedmesh.rules.file_failures import TooMuchKept
from embedmesh.rules.limits import FILE_EXPIRES_S, FILES_OF_ACCOUNT_MAX, PAGE_ROWS_MAX
from embedmesh.rules.ports import Clock
from embedmesh.storage.db import Db, Row
from embedmesh.storage.ledger.writes import KeptChange, SubmitWrite, WriteDurably, as_rows
from embedmesh.storage.reads import Reads
from embedmesh.storage.sql import FILES_SQL
from embedmesh.storage.times import MS_PER_DAY

FORGOTTEN_AT_ONCE = 256  # rows: about two milliseconds
EXPIRED_MS = 60_000  # after its expiry a file is forgotten: a batch that is made just before is seen by then
LAST = "\x7f"  # sorts after every id


class FilesPage(msgspec.Struct, frozen=True):
    """A page of an account's files; `more`: there are others after it."""

    files: list[FileRow]
    more: bool


class KeptFiles(msgspec.Struct, frozen=True):
    """How much an account keeps: files, their `bytes`, and of these the `sent_bytes` of files that it has sent itself.

    `reserved` are bytes for the output files of its batches that are not over.
    """

    files: int
    bytes: int
    sent_bytes: int
    reserved: int


class FileRows:
    """The rows of files. An account sees its own only. Methods raise StoreUnavailable, too."""

    def __init__(self, reads: Reads, write: WriteDurably, submit: SubmitWrite, clock: Clock) -> None:
        self._reads = reads
        self._write = write
        self._submit = submit
        self._clock = clock

    async def add(self, file: FileRow, *, bytes_max: int) -> None:
        """Keep a file whose contents are durable already. Raises TooMuchKept.

        `bytes_max` is how much its account may keep in all, this file included. If it cannot be known whether the file
        was kept, it is deleted.
        """
        values = values_of(file) | {"bytes_max": bytes_max, "files_max": FILES_OF_ACCOUNT_MAX}
        account = frozenset({file.account_id})
        try:
            kept = await self._write(lambda db, _: bool(db.execute(FILES_SQL["add_file"], values).fetchall()), account)
        except (StoreUnavailable, asyncio.CancelledError):
            self._submit(KeptChange(lambda db, _: _drop(db, file.file_id), account))
            raise
        if not kept:
            has = await self.kept(file.account_id)
            raise too_much(has, file.bytes, bytes_max)

    async def find(self, account_id: str, file_id: str) -> FileRow | None:
        """A file of the account that is neither deleted nor expired."""
        return await self._one("find_file", account_id, file_id)

    async def find_input(self, account_id: str, file_id: str) -> FileRow | None:
        """The same for a batch that is not over: its file is there though it was deleted, or has expired."""
        return await self._one("find_input", account_id, file_id)

    async def page(
        self,
        account_id: str,
        *,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
        purpose: FilePurpose | None = None,
    ) -> FilesPage:
        """A page of at most `limit`, and PAGE_ROWS_MAX, of an account's files by their time, after the file `after`."""
        limit = min(limit, PAGE_ROWS_MAX)
        values = self._of(account_id) | {
            "after": after or (LAST if newest_first else ""),
            "purpose": purpose.value if purpose else None,
            "rows_max": limit + 1,
        }
        rows = await self._reads.ask(FILES_SQL["files_before" if newest_first else "files_after"], values)
        return FilesPage([file_of(row) for row in rows[:limit]], len(rows) > limit)

    async def kept(self, account_id: str) -> KeptFiles:
        """How much an account keeps."""
        rows = await self._reads.ask(FILES_SQL["kept_of_account"], {"account_id": account_id})
        return KeptFiles(*rows[0])

    async def means_nanousd(self, account_id: str) -> int:
        """What an account has, its credit limit included, and what it has spent within the life of a file.

        For `rules.batches.bytes_paid_for`: files of work that was paid are paid for, too.
        """
        since_day = (self._clock.unix_ms() - FILE_EXPIRES_S * 1000) // MS_PER_DAY
        rows = await self._reads.ask(FILES_SQL["means_of_account"], {"account_id": account_id, "since_day": since_day})
        return int(rows[0][0]) if rows else 0

    async def delete(self, account_id: str, file_id: str) -> bool:
        """Nobody sees the file any more. False: the account has no such file."""
        values = {"account_id": account_id, "file_id": file_id}
        return await self._write(
            lambda db, now_ms: bool(db.execute(FILES_SQL["delete_file"], values | {"now_ms": now_ms}).fetchall()),
            frozenset({account_id}),
        )

    async def forget(self, file_ids: Sequence[str] | None = None) -> list[str]:
        """Delete rows of files that are deleted or expired and that no batch reads; the ids of these files.

        Of some files, all of one account, or of all, at most FORGOTTEN_AT_ONCE.
        """
        now = {"now_ms": self._clock.unix_ms() - EXPIRED_MS}
        rows = as_rows([(file_id,) for file_id in file_ids or ()])
        if file_ids is None:
            found = await self._reads.ask(FILES_SQL["files_to_forget"], now | {"rows_max": FORGOTTEN_AT_ONCE})
            rows = as_rows([(file_id,) for file_id, _ in found])
            if not found:
                return []
        forgotten = await self._write(lambda db, _: db.execute(FILES_SQL["forget_files"], rows | now).fetchall())
        return [file_id for (file_id,) in forgotten]

    async def unknown(self, file_ids: Sequence[str]) -> set[str]:
        """Those of some ids that no row has."""
        rows = await self._reads.ask(FILES_SQL["known_files"], as_rows([(file_id,) for file_id in file_ids]))
        return set(file_ids) - {file_id for (file_id,) in rows}

    async def _one(self, statement: str, account_id: str, file_id: str) -> FileRow | None:
        rows = await self._reads.ask(FILES_SQL[statement], self._of(account_id) | {"file_id": file_id})
        return file_of(rows[0]) if rows else None

    def _of(self, account_id: str) -> dict[str, Any]:
        return {"account_id": account_id, "now_ms": self._clock.unix_ms()}


def too_much(kept: KeptFiles, more_bytes: int, bytes_max: int) -> TooMuchKept:
    """Why an account may not keep a file of that many bytes more."""
    if kept.files >= FILES_OF_ACCOUNT_MAX:
        return TooMuchKept(f"An account may keep {FILES_OF_ACCOUNT_MAX:,} files, and has as many. Delete some.")
    return TooMuchKept(
        f"The account keeps {kept.bytes + kept.reserved:,} bytes of files, with the room for its batches' output. With "
        f"{more_bytes:,} more that is over the {bytes_max:,} that it may keep now: delete files, or add credit."
    )


def values_of(file: FileRow) -> dict[str, Any]:
    """A row's values, for a statement that adds it."""
    return msgspec.structs.asdict(file) | {"purpose": file.purpose.value}


def file_of(row: Row) -> FileRow:
    """A row as it was selected."""
    file_id, account_id, filename, purpose, size, created_ms, expires_ms, deleted_ms = row
    return FileRow(
        file_id=file_id,
        account_id=account_id,
        filename=filename,
        purpose=FilePurpose(purpose),
        bytes=size,
        created_ms=created_ms,
        expires_ms=expires_ms,
        deleted_ms=deleted_ms,
    )


def _drop(db: Db, file_id: str) -> None:
    db.execute(FILES_SQL["drop_file"], {"file_id": file_id})
