"""Files at other addresses (`s3://`, `gs://`, `hf://`), by fsspec: the extra `embedmesh[remote]`."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from embedmesh.bulk.usage import WrongUsage


def file_system(address: str, **options: Any) -> tuple[Any, str]:
    """fsspec's file system of an address, with options of its own, and the path in it. Raises WrongUsage."""
    try:
        import fsspec
    except ImportError:
        raise WrongUsage("Addresses need fsspec, which is not installed: pip install 'embedmesh[remote]'.") from None
    try:
        system, path = fsspec.core.url_to_fs(address, **options)
    except (ImportError, ValueError) as error:  # a package that this protocol needs, or no protocol
        raise WrongUsage(f"{address} cannot be used: {str(error).rstrip('.')}.") from None
    return system, path


@contextmanager
def told_as_os_error() -> Iterator[None]:
    """Raise OSError for whatever a driver raises: each has errors of its own."""
    try:
        yield
    except (OSError, EOFError):
        raise
    except Exception as error:  # noqa: BLE001 - see above
        raise OSError(errno.EIO, type(error).__name__) from None
