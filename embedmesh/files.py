"""Writes files that must be whole, private and durable: a draft is written beside the file, synced, then renamed."""

import os
from contextlib import suppress
from pathlib import Path

DRAFT_SUFFIX = ".part"


def path_in(folder: Path, text: str) -> Path:
    """The path that somebody has written, relative to `folder`; `~` is a home.

    Raises ValueError, in words that follow its name, where it can be none.
    """
    if "\0" in text:
        raise ValueError("has a NUL character")
    try:
        return folder / Path(text).expanduser()
    except RuntimeError:
        raise ValueError("begins with the home of nobody on this machine") from None


def make_draft(path: Path) -> tuple[Path, int]:
    """A new file (mode 0600) beside `path`, and its descriptor: write it, sync it, then rename it to `path`.

    Removes the drafts of processes that died. Raises OSError.
    """
    _remove_stale_drafts(path)
    draft = path.with_name(f"{path.name}.{os.getpid()}{DRAFT_SUFFIX}")
    # O_EXCL and O_NOFOLLOW: never into a file, or through a link, that somebody else made there.
    return draft, os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)


def write_draft(path: Path, content: bytes) -> Path:
    """A complete draft of `path`, synced to disk. Raises OSError, and then leaves none."""
    draft, descriptor = make_draft(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        draft.unlink()
        raise
    return draft


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on disk.

    Not for a store in use: closing its file would drop the locks that SQLite has on it.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_stale_drafts(path: Path) -> None:
    for draft in path.parent.glob(f"{path.name}.*{DRAFT_SUFFIX}"):
        process = draft.name[len(path.name) + 1 : -len(DRAFT_SUFFIX)]
        if process.isdecimal() and (int(process) == os.getpid() or not _is_alive(int(process))):
            with suppress(FileNotFoundError):
                draft.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        return True
    return True
