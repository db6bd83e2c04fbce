"""A listening Unix socket that only its owner may connect to."""

import os
import socket
import stat
from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.system import socket_path_bytes_max

LIVENESS_CHECK_S = 1.0  # the kernel answers a connect to a live socket at once


def bind_unix(path: Path) -> socket.socket:
    """A bound socket with mode 0600. A socket file that nobody listens on is removed. Raises SetupError."""
    if len(os.fsencode(path)) > socket_path_bytes_max():
        raise SetupError(
            f"The socket's path is longer than {socket_path_bytes_max()} bytes: choose a shorter data directory."
        )
    _remove_stale(path)
    sock = socket.socket(socket.AF_UNIX)
    before = os.umask(0o177)  # so that there is no moment at which others may connect
    try:
        sock.bind(str(path))
    except OSError as error:
        sock.close()
        raise SetupError(f"Cannot make the socket {path.name}: {error.strerror}. Is its folder there?") from None
    finally:
        os.umask(before)
    return sock


def remove_unix(path: Path, inode: int) -> None:
    """Remove our own socket file at the end; a successor may have made its own there while we drained."""
    try:
        if path.lstat().st_ino == inode:
            path.unlink()
    except FileNotFoundError:
        return


def _remove_stale(path: Path) -> None:
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise SetupError(f"{path.name} exists and is not a socket: remove it or choose another path.")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(LIVENESS_CHECK_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except FileNotFoundError:
            return
        except OSError as error:
            raise SetupError(f"Cannot tell who listens on {path.name}: {error.strerror}.") from None
    raise SetupError(f"Another node is already serving on {path.name}: stop it first or choose another path.")
