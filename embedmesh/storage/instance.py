"""A gateway's name in its store. It outlives a restart, so that a gateway can release the holds that it left open.

The name is kept in a file of the data directory, which the gateway locks while it runs: `gateway-0.lock` for the first,
and so on. A process that gets the lock knows that the gateway of that name on this machine is dead.
"""

import fcntl
import os
from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.rules.ids import new_id
from embedmesh.rules.ports import Clock

GATEWAYS_MAX = 256  # of one data directory
NAME_BYTES_MAX = 256


class Instance:
    """One gateway. `name` is the owner of its holds, until `close`."""

    def __init__(self, name: str, descriptor: int) -> None:
        self.name = name
        self._descriptor = descriptor

    def rename(self, name: str) -> None:
        """Take another name, because another gateway of the store has this one, too."""
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{name} {_file(self._descriptor)}".encode(), 0)
        self.name = name

    def close(self) -> None:
        os.close(self._descriptor)


def take_instance(folder: Path, clock: Clock) -> Instance:
    """The first name of this data directory that no running gateway has. Raises SetupError."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for number in range(GATEWAYS_MAX):
            descriptor = os.open(folder / f"gateway-{number}.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                continue
            name, _, file = os.pread(descriptor, NAME_BYTES_MAX, 0).decode("utf-8", "replace").partition(" ")
            instance = Instance(name, descriptor)
            if not name or file != _file(descriptor):  # new, or a copy of another machine's
                instance.rename(new_id("gw", clock))
            return instance
    except OSError as error:
        raise SetupError(f"Cannot write to the folder {folder}: {error.strerror}. Choose another --data-dir.") from None
    raise SetupError(f"{GATEWAYS_MAX} gateways use {folder}: give this one another --data-dir.")


def _file(descriptor: int) -> str:
    """What tells a file from its copy: the machine, the disk and the inode."""
    stat = os.fstat(descriptor)
    return f"{os.uname().nodename}:{stat.st_dev}:{stat.st_ino}"
