"""Object storage in memory, by fsspec, that does what a test says before each operation: `faulty://PREFIX`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

OPERATIONS = ("pipe_file", "cat_file", "rm", "find", "ls")


class FaultyFileSystem(MemoryFileSystem):  # type: ignore[misc]
    """`before` is called with the name of each operation, in a thread: it may wait, or raise."""

    protocol = "faulty"
    before: Callable[[str], None] = staticmethod(lambda operation: None)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.replace("faulty://", "memory://") if isinstance(path, str) else path)


def _told(name: str) -> Any:
    real = getattr(MemoryFileSystem, name)

    def operation(self: FaultyFileSystem, *given: Any, **options: Any) -> Any:
        type(self).before(name)
        return real(self, *given, **options)

    return operation


for _name in OPERATIONS:
    setattr(FaultyFileSystem, _name, _told(_name))
fsspec.register_implementation("faulty", FaultyFileSystem, clobber=True)


@contextmanager
def faults(before: Callable[[str], None]) -> Iterator[None]:
    """While it lasts, `before` is called before each operation."""
    FaultyFileSystem.before = staticmethod(before)
    try:
        yield
    finally:
        FaultyFileSystem.before = staticmethod(lambda operation: None)
