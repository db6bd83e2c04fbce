"""What gateway and node share as processes: signals, the lifeline, limits, exit codes."""

import asyncio
import contextlib
import gc
import ipaddress
import os
import platform
import resource
import signal
import socket
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from embedmesh.rules.errors import SetupError
from embedmesh.system import call_c

M_MMAP_THRESHOLD = -3  # of malloc.h
MMAP_BYTES_MIN = 64 * 1024  # such blocks get pages of their own, which costs time for each 4 kB that is used of them
CORE_FILTER = Path("/proc/self/coredump_filter")  # which kinds of memory are in a core
EXIT_OK = 0
EXIT_AGAIN = 75  # EX_TEMPFAIL: something that we need is away; starting again may help
EXIT_SETUP = 78  # EX_CONFIG: starting again will not help; a person must fix something


def is_profiled(build: Mapping[str, object] | None = None) -> bool:
    """Whether this Python was built with a profile of real programs (PGO); `build` are sysconfig's variables.

    Who configures Python so says it there. Debian and Ubuntu profile by their own rules, which empty the flag.
    """
    found = sysconfig.get_config_vars() if build is None else build
    return "--enable-optimizations" in str(found.get("CONFIG_ARGS")) or found.get("PGO_PROF_USE_FLAG") == ""


def python_in_words() -> str:
    """The Python that runs us: its version, and whether it was built with a profile."""
    return f"Python {platform.python_version()} {'with' if is_profiled() else 'without'} PGO"


def quieten_gc() -> None:
    """Call after start-up: freezes what lives now, and makes collections small, so that each takes 10 ms at most.

    While requests pile up, young objects live: a collection at every 50,000 of them took 100 ms.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5_000, 3, 200)


def give_memory_back() -> None:
    """Make glibc return large blocks to the system when they are freed. Does nothing with another C library.

    By itself glibc keeps such blocks once it has seen one, and bodies of megabytes leave holes everywhere: 100
    connections with half a body each left some 200 MB behind.
    """
    call_c("mallopt", M_MMAP_THRESHOLD, MMAP_BYTES_MIN)


def keep_memory_off_disk() -> None:
    """No core dumps of this process and its children: texts and keys are in their memory.

    Where the kernel hands cores to a program, the limit does not count (core(5)); such a core then has no memory in it.
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # not Linux
        CORE_FILTER.write_text("0")


def stop_event(lifeline_fd: int | None) -> asyncio.Event:
    """Set on SIGTERM or SIGINT, or when our supervisor dies, which closes the pipe that it holds open."""
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


def hear_hangups(reload: Callable[[], None], stop: asyncio.Event) -> None:
    """Call `reload` on SIGHUP; set `stop` instead where the terminal that we were started in was closed."""
    had_terminal = os.isatty(0)

    def heard() -> None:
        if had_terminal and not os.isatty(0):
            stop.set()
        else:
            reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, heard)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def hold_hangups() -> None:
    """SIGHUP waits until `hear_hangups`, or it would end us before we listen. Processes that we start inherit that."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


@contextlib.contextmanager
def hangups_held() -> Iterator[None]:
    """A process that is started within holds SIGHUP until it hears it; so do we, meanwhile."""
    hold_hangups()
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket. Raises SetupError, in one line that says what to do."""
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


def host_and_port(text: str, option: str) -> tuple[str, int]:
    """The parts of HOST:PORT; an IPv6 address is in brackets. Raises SetupError, which names the option."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) <= 65_535:
        raise SetupError(f"Give {option} as HOST:PORT, such as 0.0.0.0:8443.")
    return host.strip("[]"), int(port)


def beyond_loopback(host: str) -> bool:
    """Whether other machines can reach a socket on this address. A name counts as yes."""
    try:
        return not ipaddress.ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return host != "localhost"
