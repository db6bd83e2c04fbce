"""What differs between Linux, macOS and other systems, each with what is done where it is missing.

Nothing else in this package calls the C library or names what only one of them has; `tests/test_platforms.py` holds
that.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import pwd
import resource
import socket

from embedmesh.rules.acts import Actor

OPEN_FILES_MAX = 10_240  # OPEN_MAX of macOS, which takes no higher soft limit, whatever the hard one says


def call_c(function: str, *given: int) -> None:
    """Call a function of the C library that only helps, such as `malloc_trim`; nothing where the library lacks it."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # musl, macOS; no library at all
        getattr(ctypes.CDLL(None), function)(*given)


def usable_cpus() -> set[int] | None:
    """The CPUs that this process may run on: a container or `taskset` may leave it fewer than there are.

    None where the system does not say.
    """
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


def sync_data(descriptor: int) -> None:
    """Wait until a file's content is on the disk itself. Raises OSError.

    macOS has its disks write out their caches only for F_FULLFSYNC, which not every file system knows.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOTTY, errno.EINVAL):
                raise
    getattr(os, "fdatasync", os.fsync)(descriptor)


def raise_file_limit() -> None:
    """Each connection is a file descriptor; the soft limit is often 1,024, and on macOS 256."""
    now, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for soft in (hard, max(now, OPEN_FILES_MAX)):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            return


def keep_alive(sock: socket.socket, idle_s: int, every_s: int, tries: int) -> None:
    """Have the kernel notice a peer that is gone: after `idle_s` of silence it asks `tries` times, each `every_s`."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    idle = "TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE"  # macOS's name
    for name, value in ((idle, idle_s), ("TCP_KEEPINTVL", every_s), ("TCP_KEEPCNT", tries)):
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def socket_path_bytes_max() -> int:
    """How long the path of a Unix socket may be: `sun_path`, less its closing zero."""
    return 107 if os.uname().sysname == "Linux" else 103  # of macOS and the BSDs


def this_user() -> Actor:
    """Who runs this process, and on which machine: for what is done to a store without a gateway."""
    try:
        name = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:  # as in containers that run as any user
        name = str(os.geteuid())
    return Actor(f"user:{name}", socket.gethostname())
