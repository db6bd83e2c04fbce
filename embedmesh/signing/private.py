"""Files that are made once and that only their owner may read: an identity, a certificate's key."""

from contextlib import suppress
from pathlib import Path

from embedmesh.files import sync, write_draft
from embedmesh.rules.errors import SetupError

PRIVATE_FILE_BYTES_MAX = 8_192  # ten times the largest file that we keep here


def make_once(path: Path, content: bytes) -> None:
    """Write a file (mode 0600) that is not there yet, whole. Of two processes the first one wins. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = write_draft(path, content)
    try:
        with suppress(FileExistsError):  # another process was faster: its file stays
            path.hardlink_to(draft)
    finally:
        draft.unlink()
    sync(path.parent)


def read_private(path: Path, what: str) -> bytes:
    """The content of a file that only its owner may read; `what` names it. Raises SetupError and OSError."""
    status = path.stat()
    if status.st_mode & 0o077:
        raise SetupError(f"Others can read the {what} {path}: run `chmod 600` on it.")
    if status.st_size > PRIVATE_FILE_BYTES_MAX:
        raise SetupError(f"The {what} {path} is too large to be one: restore it from a backup.")
    return path.read_bytes()
