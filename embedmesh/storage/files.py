"""Files in the store: their rows. What is in them lies on the disk (`embedmesh.jobs.files`)."""

from collections.abc import Sequence

import msgspec

from embedmesh.rules.batches import FilePurpose, FileRow
from embedmesh.rules.ports import Clock
from embedmesh.storage.ledger.writes import WriteDurably
from embedmesh.storage.reads import Reads


class FilesPage(msgspec.Struct, frozen=True):
    """A page of an account's files; `more`: there are others after it."""

    files: list[FileRow]
    more: bool


class KeptFiles(msgspec.Struct, frozen=True):
    """How much is kept: files and bytes, with what is reserved for the outputs of batches that are not over."""

    files: int
    bytes: int
    bytes_of_all: int  # by all accounts together


class FileRows:
    """The rows of files. An account sees its own only."""

    def __init__(self, reads: Reads, write: WriteDurably, clock: Clock) -> None:
        self._reads = reads
        self._write = write
        self._clock = clock

    async def add(self, file: FileRow, *, bytes_max: int) -> None:
        """Keep a file whose contents are durable already. Raises TooMuchKept, StoreUnavailable.

        `bytes_max` is how much its account may keep in all, this file included.
        """
        raise NotImplementedError

    async def find(self, account_id: str, file_id: str) -> FileRow | None:
        """A file of the account that is neither deleted nor expired. Raises StoreUnavailable."""
        raise NotImplementedError

    async def page(
        self,
        account_id: str,
        *,
        after: str | None = None,
        limit: int,
        newest_first: bool = True,
        purpose: FilePurpose | None = None,
    ) -> FilesPage:
        """A page of an account's files by their time, after the file `after`. Raises StoreUnavailable."""
        raise NotImplementedError

    async def kept(self, account_id: str) -> KeptFiles:
        """How much an account keeps, and all together. Raises StoreUnavailable."""
        raise NotImplementedError

    async def delete(self, account_id: str, file_id: str) -> bool:
        """Nobody sees the file any more. False: the account has no such file. Raises StoreUnavailable."""
        raise NotImplementedError

    async def forget(self) -> list[str]:
        """Delete rows of files that nobody sees and no batch reads; their ids. Raises StoreUnavailable."""
        raise NotImplementedError

    async def unknown(self, file_ids: Sequence[str]) -> set[str]:
        """Those of some ids that no row has. Raises StoreUnavailable."""
        raise NotImplementedError
