"""What `embedmesh serve` keeps in its data directory beside the store: its lock, run files, and notes for itself."""

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from embedmesh.files import write_draft
from embedmesh.rules.errors import SetupError

SOCKET_PATH_BYTES_MAX = 100  # Linux allows 108, macOS 104
SERVED_STORE = "serve.store"  # names the store of the last start


@contextlib.contextmanager
def metrics_folder(folder: Path) -> Iterator[Path]:
    """An empty folder in which several workers share their metrics."""
    metrics = folder / "metrics"
    shutil.rmtree(metrics, ignore_errors=True)  # of an earlier run
    metrics.mkdir(mode=0o700)
    try:
        yield metrics
    finally:
        shutil.rmtree(metrics, ignore_errors=True)


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """One `serve` for each data directory. Makes the directory (0700). Raises SetupError."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "serve.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (data_dir, *data_dir.parents) if path.exists())
        raise SetupError(f"{file} is a file, not a folder. Choose another with --data-dir.") from None
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise SetupError(f"cannot write to the folder {data_dir} ({reason}). Choose another with --data-dir.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise SetupError(
            f"another `embedmesh serve` is using {data_dir}. Stop it, or choose another with --data-dir."
        ) from None
    try:
        yield
    finally:
        os.close(lock)


@contextlib.contextmanager
def socket_folder(data_dir: Path) -> Iterator[Path]:
    """A private folder for the node's socket: in the data directory, or a temporary one if that path is too long."""
    folder = data_dir / "run"
    if len(os.fsencode(folder / "node.sock")) > SOCKET_PATH_BYTES_MAX:
        with tempfile.TemporaryDirectory(prefix="embedmesh-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)
        return
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise SetupError(f"cannot make the folder {folder} ({os.strerror(error.errno or 0)}).") from None
    yield folder


def served_before(data_dir: Path, store: str) -> str:
    """Which store the last start here served, if it was another. Notes that of this one. Raises OSError."""
    note = data_dir / SERVED_STORE
    before = os.fsdecode(note.read_bytes()) if note.exists() else ""
    if before != store:
        write_draft(note, os.fsencode(store)).replace(note)
    return "" if before == store else before


def write_catalogue(file: Path, catalogue: Path | None) -> None:
    """A file of settings that names a catalogue, or nothing. Raises OSError."""
    text = f"catalogue = {json.dumps(str(catalogue.absolute()))}\n" if catalogue else ""
    write_draft(file, text.encode()).replace(file)
