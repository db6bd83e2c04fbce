"""`embedmesh serve`: one command that runs a gateway and an ordinary node, and keeps both running.

The supervisor holds three things that must outlive its children: the lock on the data directory, the listening socket
(callers wait in its backlog while a gateway restarts, instead of being refused), and the lifeline, a pipe whose closing
tells the children that it has died. There is no in-process short cut: what runs here is what production runs.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from embedmesh.catalogue import load_catalogue
from embedmesh.command_line import as_arguments
from embedmesh.process import EXIT_OK, EXIT_SETUP, bind
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import bootstrap, key_defaults
from embedmesh.rules.errors import SetupError
from embedmesh.settings import ENV_PREFIX, Credentials, GatewaySettings, NodeSettings, store_dsn

RESTART_FIRST_S = 0.05  # a crash is answered at once
RESTART_MAX_S = 1.0  # a child that keeps dying should not heat the machine, nor keep callers waiting for 3 s
HEALTHY_AFTER_S = 2.0  # a child that lived so long had started, which takes one; it starts again without delay
STOP_GATEWAY_S = 35.0  # its own drain, and a little
STOP_NODE_S = 10.0
SOCKET_PATH_BYTES_MAX = 100  # Linux allows 108, macOS 104
POLL_READY_S = 0.05
LOOKS_A_WORKER = 8  # workers share the socket: nobody can ask all of them, but they take turns

Say = Callable[[str], None]


@dataclass
class Child:
    """One supervised process."""

    name: str
    arguments: list[str]
    pass_fds: tuple[int, ...]
    stop_s: float
    environment: dict[str, str]
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    delay_s: float = RESTART_FIRST_S

    async def start(self) -> None:
        """Start it in a session of its own: Ctrl-C in the terminal is ours to hand on, in order."""
        self.started = time.monotonic()
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "embedmesh",
            *self.arguments,
            pass_fds=self.pass_fds,
            start_new_session=True,
            stdin=asyncio.subprocess.DEVNULL,
            env=os.environ | self.environment,
        )

    async def stop(self) -> None:
        """Ask it to drain; kill it when it takes longer than it may."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(self.stop_s):
                await self.process.wait()
        except (TimeoutError, asyncio.CancelledError):
            self.process.kill()
            await self.process.wait()


def main(gateway: GatewaySettings, node: NodeSettings, *, say: Say, on_ready: Callable[[Credentials], None]) -> int:
    """Run until told to stop. `say` gets a line of progress; `on_ready` is called once the first vector was made."""
    try:
        with locked(gateway.data_dir), socket_folder(gateway.data_dir) as folder:
            sock = bind(gateway.host, gateway.port)
            with sock:
                return asyncio.run(_run(gateway, node, sock, folder / "node.sock", say, on_ready))
    except SetupError as error:
        print(f"embedmesh serve: {error}", file=sys.stderr)  # noqa: T201 - a line for the person who started us
        return EXIT_SETUP


async def _run(
    gateway: GatewaySettings,
    node: NodeSettings,
    sock: socket.socket,
    node_socket: Path,
    say: Say,
    on_ready: Callable[[Credentials], None],
) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    load_catalogue(gateway.catalogue, assets=assets_dir())  # what is wrong with it is told before anything starts
    key_defaults(gateway)  # likewise
    metrics = _metrics_folder(node_socket.parent)
    shutil.rmtree(metrics, ignore_errors=True)  # what the workers of an earlier run counted is over
    if gateway.workers > 1:
        metrics.mkdir(mode=0o700)
    host, port = sock.getsockname()[:2]
    lifeline_out, lifeline_in = os.pipe()
    children = [
        Child("node", _node_arguments(node, gateway, node_socket, lifeline_out), (lifeline_out,), STOP_NODE_S, {}),
        *(
            Child(
                "gateway" if gateway.workers == 1 else f"gateway {number}",
                _gateway_arguments(gateway, number, node_socket, sock.fileno(), lifeline_out),
                (lifeline_out, sock.fileno()),
                STOP_GATEWAY_S,
                # Not on its command line, which everybody on this machine can read.
                {ENV_PREFIX + "STORE": gateway.store} if gateway.store else {},
            )
            for number in range(1, gateway.workers + 1)
        ),
    ]
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    say("starting the gateway and a node; loading the model")
    ready = asyncio.Event()
    tasks: list[asyncio.Task[bool] | asyncio.Task[int] | asyncio.Task[None]] = []
    exit_codes: list[int] = []
    try:
        await children[0].start()  # the slower one first; the store is opened while the model loads
        credentials = bootstrap(gateway.data_dir, base_url(host, port), store_dsn(gateway))
        await asyncio.gather(*(child.start() for child in children[1:]))
        keepers = [asyncio.create_task(_keep(child, say, ready)) for child in children]
        stopping = asyncio.create_task(stop.wait())
        looks = 1 if gateway.workers == 1 else LOOKS_A_WORKER * gateway.workers

        def tell() -> None:
            ready.set()
            on_ready(credentials)

        telling = asyncio.create_task(_tell_when_ready(host, port, looks, tell))
        tasks = [stopping, *keepers, telling]
        done, _ = await asyncio.wait([stopping, *keepers], return_when=asyncio.FIRST_COMPLETED)
        exit_codes = [task.result() for task in done if task in keepers]
    finally:
        sock.close()  # who comes now is refused at once, and does not wait for what will not come
        for task in tasks:
            task.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, _kill, children)  # a second Ctrl-C does not wait
        say("stopping: letting running requests finish" if stop.is_set() else "stopping")
        for child in reversed(children):  # the gateway first: it still needs the node
            await child.stop()
        os.close(lifeline_in)
        os.close(lifeline_out)
        shutil.rmtree(metrics, ignore_errors=True)
        say("stopped")
    return int(exit_codes[0]) if exit_codes else EXIT_OK


async def _keep(child: Child, say: Say, ready: asyncio.Event) -> int:
    """Start a child again whenever it dies. Returns the exit code of one that cannot run on this set-up.

    A set-up that all have worked on is not given up: what is in the way now (an engine killed for want of memory while
    it started, a file that is away for a moment) may pass, and the others go on answering.
    """
    while True:
        assert child.process is not None
        code = await child.process.wait()
        if code == EXIT_SETUP and not ready.is_set():
            return code
        if time.monotonic() - child.started > HEALTHY_AFTER_S:
            child.delay_s = RESTART_FIRST_S
        say(f"the {child.name} ended with code {code}; starting it again")
        await asyncio.sleep(child.delay_s)
        child.delay_s = min(child.delay_s * 2, RESTART_MAX_S)
        await child.start()


async def _tell_when_ready(host: str, port: int, looks: int, tell: Callable[[], None]) -> None:
    """Call `tell` once /readyz says 200 so many times in a row: whichever worker answers has really embedded."""
    right = 0
    if host in ("0.0.0.0", "::"):  # noqa: S104 - not bound here, only recognised
        host = "127.0.0.1"
    while True:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection(host, port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            status = await reader.readline()
            writer.close()
            right = right + 1 if b" 200 " in status else 0
            if right >= looks:
                tell()
                return
            if right:
                continue
        await asyncio.sleep(POLL_READY_S)


def _gateway_arguments(
    settings: GatewaySettings, number: int, node_socket: Path, listen_fd: int, lifeline_fd: int
) -> list[str]:
    ours = ["--nodes", f"unix:{node_socket}", "--listen-fd", str(listen_fd), "--lifeline-fd", str(lifeline_fd)]
    if settings.workers > 1:
        ours += ["--metrics-file", str(_metrics_folder(node_socket.parent) / f"{number}.json")]
    return ["gateway", *ours, *as_arguments(settings, without=("host", "port", "store", "workers"))]


def _node_arguments(node: NodeSettings, gateway: GatewaySettings, node_socket: Path, lifeline_fd: int) -> list[str]:
    ours = ["--uds", str(node_socket), "--lifeline-fd", str(lifeline_fd)]
    catalogue = ["--catalogue", str(gateway.catalogue)] if gateway.catalogue else []
    return ["node", *ours, *catalogue, *as_arguments(node, without=("data_dir",))]


def _metrics_folder(folder: Path) -> Path:
    return folder / "metrics"


def _kill(children: list[Child]) -> None:
    for child in children:
        if child.process is not None and child.process.returncode is None:
            child.process.kill()


def base_url(host: str, port: int) -> str:
    """What a client on this machine is told to use."""
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{shown}:{port}/v1"


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """One `serve` a data directory. Makes the directory (0700). Raises SetupError."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "serve.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except (FileExistsError, NotADirectoryError):
        file = next(place for place in (data_dir, *data_dir.parents) if place.exists())
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
    """A private folder for the node's socket: in the data directory, or a temporary one where that path is too long."""
    folder = data_dir / "run"
    if len(os.fsencode(folder / "node.sock")) <= SOCKET_PATH_BYTES_MAX:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise SetupError(f"cannot make the folder {folder} ({os.strerror(error.errno or 0)}).") from None
        yield folder
    else:
        folder = Path(tempfile.mkdtemp(prefix="embedmesh-"))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
