"""The command line: one command or group a file, named like the file, over the admin API where it is for operators."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells say it


@contextmanager
def importing() -> Iterator[None]:
    """While modules are imported Ctrl-C ends the process at once, silently.

    Nothing has begun yet, and a KeyboardInterrupt in the middle of a C extension's set-up may crash Python.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(EXIT_INTERRUPTED))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
