"""The port to where files lie: a disk (`disk.py`) or object storage (`objects.py`). Everything here blocks.

A key is a path of our own names, such as `contents/3f/file-…`. What is written under it appears whole or not at all.
"""

from typing import Protocol

FREE_BYTES = 2**62  # object storage has room: accounts have bounds of their own


def store_key(store_id: str) -> str:
    """Where the mark of a store is that keeps files here."""
    return f"stores/{store_id}"


class Draft(Protocol):
    """What is being written. Methods raise StorageFull; then call `abort`."""

    def write(self, data: bytes) -> object:
        """Append."""

    def end(self) -> None:
        """It is durable, under its key."""

    def abort(self) -> None:
        """Leave nothing, also where `end` has just succeeded and nobody heard of it. Raises nothing."""


class Stored(Protocol):
    """What was written, while it is read: `size` bytes."""

    size: int

    def read(self, start: int, size: int, until: int) -> bytes:
        """`size` bytes from `start`; of those before `until`, some will be asked for next. Raises ContentsLost,
        StorageFull, OSError.
        """

    def close(self) -> None:
        """Harmless twice."""


class FileBackend(Protocol):
    """Methods raise StorageFull where it has no room, or cannot be reached now."""

    threads_max: int  # that may wait for it at one time

    def make(self) -> None:
        """Prepare it. Raises SetupError, and no StorageFull: a gateway starts without it."""

    def mark(self) -> None:
        """Leave the mark of the store, `store_key`."""

    def check(self) -> None:
        """Whether it can be used now; raises StorageFull where not."""

    def total_bytes(self) -> int:
        """How many bytes files could take in all; 0 where there is no room for any, however empty it is."""

    def free_bytes(self) -> int:
        """How many bytes files may take yet."""

    def begin(self, key: str) -> Draft:
        """Write something new."""

    def open(self, key: str) -> Stored:
        """Read something. Raises ContentsLost."""

    def drop(self, key: str) -> None:
        """Delete all under a key, drafts too. What cannot be deleted now is a stray. Raises nothing."""

    def names(self, key: str) -> list[str]:
        """What lies right under a key, drafts too; nothing where there is no such key."""

    def is_old(self, key: str, age_s: float) -> bool:
        """Whether everything under a key, drafts too, was last written longer ago."""

    def cut(self) -> None:
        """The gateway ends: whatever waits gives up."""
