"""Files at other addresses (`s3://`, `gs://`, `hf://`), by fsspec: the extra `embedmesh[remote]`."""

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
