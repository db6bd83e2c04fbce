"""Python imports this at its start where its folder is on PYTHONPATH: it makes an engine process that can be broken.

SIGUSR1 makes it loop for ever, SIGUSR2 wait for ever for a lock that is never released.
"""

import signal
import sys
import threading


def _loop(*_: object) -> None:
    while True:
        pass


def _hang(*_: object) -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


if "embedmesh.engine.worker" in sys.orig_argv:
    signal.signal(signal.SIGUSR1, _loop)
    signal.signal(signal.SIGUSR2, _hang)
