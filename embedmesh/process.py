"""What gateway and node have in common as processes: signals, the lifeline, limits, logging, exit codes."""

import asyncio
import contextlib
import ctypes
import gc
import ipaddress
import logging
import os
import resource
import signal
import socket
import sys

from embedmesh.rules.errors import SetupError

M_MMAP_THRESHOLD = -3  # of malloc.h
MMAP_BYTES = 64 * 1024  # blocks as large have pages of their own, which costs time for each 4 kB that is used of them
EXIT_OK = 0
EXIT_AGAIN = 75  # EX_TEMPFAIL: something that we need is away; starting again may help
EXIT_SETUP = 78  # EX_CONFIG: starting again will not help; a person must mend something


def quieten_gc() -> None:
    """After start-up: what lives now lives for ever, and garbage is collected in heaps that take some 10 ms at most.

    While requests pile up what is young lives: in heaps of 50,000 to look at it took 100 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 3, 200)


def give_memory_back() -> None:
    """Large blocks are given back to the system when they are freed. With glibc; elsewhere nothing happens.

    By itself it learns from the first large block to keep such blocks, and bodies of megabytes leave holes everywhere:
    100 connections with half a body each left some 200 MB behind.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)


def raise_file_limit() -> None:
    """Each connection is a file descriptor; the soft limit is often 1,024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def log_to_stderr() -> None:
    """Lines for a person or a collector: time, level, what. Never a text, a key or a body."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("asyncio").setLevel(logging.ERROR)


def stop_event(lifeline_fd: int | None) -> asyncio.Event:
    """Set on SIGTERM or SIGINT, or when the pipe that our supervisor holds open is closed because it died."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if lifeline_fd is not None:

        def readable() -> None:
            if not os.read(lifeline_fd, 1):
                loop.remove_reader(lifeline_fd)
                stop.set()

        loop.add_reader(lifeline_fd, readable)
    return stop


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises SetupError, in one line that says what to do."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()
    except OSError as error:
        sock.close()
        if isinstance(error, socket.gaierror):
            raise SetupError(f"there is no address {host} on this machine. Mend --host.") from None
        reason = os.strerror(error.errno or 0)
        raise SetupError(
            f"cannot listen on {host} port {port} ({reason}). Stop what uses it, or choose another with --port"
            ' (with make: ARGS="--port 8099").'
        ) from None
    sock.setblocking(False)
    return sock


def beyond_loopback(host: str) -> bool:
    """Whether others than this machine reach what listens on an address. A name counts as one that they do."""
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host != "localhost"
