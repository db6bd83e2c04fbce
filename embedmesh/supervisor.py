"""`embedmesh serve`: one command that runs a gateway and an ordinary node, and keeps both running.

Where only servers of other makes run the catalogue's models, it runs the gateway alone.
The supervisor holds three things that must outlive its children: the lock on the data directory, the listening socket
(callers wait in its backlog while a gateway restarts, instead of being refused), and the lifeline, a pipe that closes
when the supervisor dies, so that its children end. There is no in-process short cut: production runs the same.
"""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from embedmesh.catalogue import load_catalogue
from embedmesh.command_line import as_arguments
from embedmesh.credentials import Credentials
from embedmesh.logs.setup import start_logging, tell
from embedmesh.own_folder import locked, metrics_folder, served_before, socket_folder, write_catalogue
from embedmesh.own_port import authority_to_name, base_url, until_ready
from embedmesh.process import EXIT_OK, EXIT_SETUP, bind, hangups_held, hear_hangups, keep_memory_off_disk, stop_event
from embedmesh.provision.assets import assets_dir
from embedmesh.provision.bootstrap import bootstrap, key_defaults
from embedmesh.rules.errors import SetupError
from embedmesh.rules.models import Model
from embedmesh.settings import CONFIG_VARIABLE, ENV_PREFIX, GatewaySettings, NodeSettings, store_dsn
from embedmesh.storage.engines import shown_store

RESTART_FIRST_S = 0.05  # a crash is answered at once
RESTART_MAX_S = 1.0  # a child that keeps dying should not heat the machine, nor keep callers waiting for 3 s
HEALTHY_AFTER_S = 2.0  # starting takes a second: a child that lived longer starts again without delay
STOP_GATEWAY_S = 35.0  # its own drain, and a little
STOP_NODE_S = 10.0
NODE_CONFIG = "node.toml"  # beside the node's socket
READY_REPLIES_A_WORKER = 8  # workers share the socket: we cannot choose which one answers, but they take turns

Say = Callable[[str], None]


class ReadyEndpoint(NamedTuple):
    """There is something to ask: a model that has made a first vector here, or None for a gateway alone.

    `store` names the store, without a password; `authority` is a file that clients must be told to trust, if any.
    """

    credentials: Credentials
    model: Model | None
    store: str
    authority: Path | None


OnReady = Callable[[ReadyEndpoint], None]


class Origin(NamedTuple):
    """Which settings the command line or the environment has given, and the file of the others, if there is one.

    `read` reads that file again (SetupError).
    """

    given: Collection[str]
    file: Path | None
    read: Callable[[], GatewaySettings]


@dataclass
class Child:
    """One supervised process."""

    name: str
    arguments: list[str]
    pass_fds: tuple[int, ...]
    stop_s: float
    environment: dict[str, str]
    before: Callable[[], None] = lambda: None  # it starts, or reads its settings again
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0

    async def start(self) -> None:
        """Start it in a session of its own, so that Ctrl-C in the terminal reaches us alone: we stop in order."""
        self.started = time.monotonic()
        self.before()
        with hangups_held():  # it hears of one that comes while it starts once it can
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

    def hang_up(self) -> None:
        """Tell it to read its settings again."""
        if self.process is not None and self.process.returncode is None:
            self.before()
            self.process.send_signal(signal.SIGHUP)

    async def stop(self) -> None:
        """Ask it to drain; kill it if that takes longer than `stop_s`."""
        if self.process is None or self.process.returncode is not None:
            return
        self.process.terminate()
        try:
            async with asyncio.timeout(self.stop_s):
                await self.process.wait()
        except (TimeoutError, asyncio.CancelledError):
            self.process.kill()
            await self.process.wait()


def main(
    gateway: GatewaySettings, node: NodeSettings, *, say: Say, on_ready: OnReady, origin: Origin | None = None
) -> int:
    """Run until told to stop. `say` gets lines of progress. Without an `origin` the children read no file."""
    start_logging("serve", gateway.log_format, gateway.log_level)
    keep_memory_off_disk()  # nor of its children
    try:
        folder = gateway.data_dir
        with locked(folder), socket_folder(folder) as run_folder, bind(gateway.host, gateway.port) as sock:
            return asyncio.run(Service(gateway, node, sock, run_folder, say, on_ready, origin).serve())
    except SetupError as error:
        tell(f"embedmesh serve: {error}", logging.CRITICAL)
        return EXIT_SETUP


@dataclass(frozen=True)
class Service:
    """What one `embedmesh serve` runs: a node on a Unix socket in `folder`, and gateway workers on `sock`."""

    gateway: GatewaySettings
    node: NodeSettings
    sock: socket.socket
    folder: Path
    say: Say
    on_ready: OnReady
    origin: Origin | None = None

    def say_store(self) -> str:
        """Say which store is served, and warn where the last start here served another. Returns how it is shown."""
        store = shown_store(store_dsn(self.gateway))
        self.say(f"the store is {store}")
        with contextlib.suppress(OSError):
            if before := served_before(self.gateway.data_dir, store):
                words = f"the last start in this data directory served another store, {before}; this one serves {store}"
                tell(f"embedmesh: {words}: other accounts, keys and money", logging.WARNING)
        return store

    async def serve(self) -> int:
        """Build the children, run them until told to stop, stop them. Returns the exit code. Raises SetupError."""
        # Mistakes in it are named before anything starts.
        catalogue = load_catalogue(self.gateway.catalogue, assets=assets_dir())
        ours = [model for model in catalogue.written if not model.foreign]
        model = min(ours, key=lambda each: each.reranks, default=None)  # the first that embeds, if there is one
        key_defaults(self.gateway)  # likewise
        check_certificate(self.gateway)  # likewise
        stopping = stop_event(None)
        with _lifeline() as lifeline_fd, metrics_folder(self.folder) as metrics:
            children = self.build(lifeline_fd, metrics, with_node=model is not None)
            hear_hangups(lambda: self.pass_on(children), stopping)
            store = self.say_store()
            if model is not None:
                self.say("starting the gateway and a node; loading the model")
            else:
                self.say("starting the gateway alone: only other servers run the catalogue's models")
            try:
                return await self.run(children, stopping, model, store)
            finally:
                self.say("stopping: letting running requests finish" if stopping.is_set() else "stopping")
                await self.stop(children)
                self.say("stopped")

    def build(self, lifeline_fd: int, metrics: Path, *, with_node: bool) -> list[Child]:
        """The children: first the node, if any, then the gateway's workers."""
        gateway, node_socket, listen_fd = self.gateway, self.folder / "node.sock", self.sock.fileno()
        lifeline = ["--lifeline-fd", str(lifeline_fd)]
        arguments = ["gateway", "--listen-fd", str(listen_fd), *lifeline]
        children = []
        given = None if self.origin is None else self.origin.given
        if with_node:
            node_arguments = ["node", "--uds", str(node_socket), *lifeline]
            followed = self.origin is not None and self.origin.file is not None and "catalogue" not in self.origin.given
            if gateway.catalogue and not followed:
                node_arguments += ["--catalogue", str(gateway.catalogue)]
            node_arguments += as_arguments(self.node, without=())
            if gateway.traces:
                node_arguments += ["--traces", gateway.traces, "--traces-a-second", str(gateway.traces_a_second)]
            if followed:
                write_catalogue(self.folder / NODE_CONFIG, gateway.catalogue)
            # In our file may stand what a node of its own needs.
            own_file = {CONFIG_VARIABLE: str(self.folder / NODE_CONFIG) if followed else os.devnull}
            before = self.follow_catalogue if followed else lambda: None
            children.append(Child("node", node_arguments, (lifeline_fd,), STOP_NODE_S, own_file, before))
            arguments += ["--nodes", f"unix:{node_socket}"]
        arguments += as_arguments(gateway, without=("host", "port", "store", "workers"), only=given)
        # The store's DSN is not on the command line, which everybody on this machine can read.
        stored = gateway.store and (given is None or "store" in given)
        environment = {ENV_PREFIX + "STORE": gateway.store} if stored else {}
        if self.origin is not None and self.origin.file is not None:
            environment[CONFIG_VARIABLE] = str(self.origin.file.absolute())
        for number in range(1, gateway.workers + 1):
            several = gateway.workers > 1
            own = ["--metrics-file", str(metrics / f"{number}.json")] if several else []
            name = f"gateway {number}" if several else "gateway"
            children.append(Child(name, arguments + own, (lifeline_fd, listen_fd), STOP_GATEWAY_S, environment))
        return children

    def follow_catalogue(self) -> None:
        """Write the node's file of settings: which catalogue ours names now. If ours is wrong, the node's stays."""
        assert self.origin is not None
        with contextlib.suppress(SetupError, OSError):  # the gateway says what is wrong with it
            write_catalogue(self.folder / NODE_CONFIG, self.origin.read().catalogue)

    def pass_on(self, children: list[Child]) -> None:
        """SIGHUP: gateway and node read again what can change while they run."""
        self.say("reading the settings again")
        for child in children:
            child.hang_up()

    async def run(self, children: list[Child], stopping: asyncio.Event, model: Model | None, store: str) -> int:
        """Keep the children running until `stopping`, or until one cannot run. Returns the exit code."""
        host, port = self.sock.getsockname()[:2]
        await children[0].start()  # the slower one first; the store is opened while the model loads
        url = base_url(host, port, self.gateway.tls_cert)
        credentials = bootstrap(self.gateway.data_dir, url, store_dsn(self.gateway))
        await asyncio.gather(*(child.start() for child in children[1:]))
        ready = asyncio.Event()

        async def announce() -> None:
            workers = self.gateway.workers
            path = "/health" if model is None else "/readyz"  # a gateway alone is ready when it has a server
            certificate, replies = self.gateway.tls_cert, 1 if workers == 1 else READY_REPLIES_A_WORKER * workers
            await until_ready(host, port, path, replies, tls=certificate is not None)
            ready.set()
            named = None if certificate is None else await authority_to_name(host, port, url, certificate)
            self.on_ready(ReadyEndpoint(credentials, model, store, named))

        keepers = [asyncio.create_task(_keep(child, self.say, ready)) for child in children]
        others = [asyncio.create_task(stopping.wait()), asyncio.create_task(announce())]
        try:
            await asyncio.wait([others[0], *keepers], return_when=asyncio.FIRST_COMPLETED)
            return next((keeper.result() for keeper in keepers if keeper.done()), EXIT_OK)
        finally:
            for task in (*keepers, *others):
                task.cancel()

    async def stop(self, children: list[Child]) -> None:
        """Refuse new callers, then stop the gateway, then the node, which it needs. A second signal kills them all."""

        def kill() -> None:
            for child in children:
                if child.process is not None and child.process.returncode is None:
                    child.process.kill()

        self.sock.close()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, kill)
        for child in reversed(children):
            await child.stop()


def check_certificate(gateway: GatewaySettings) -> None:
    """Raises SetupError where it cannot be used. Without TLS nothing of it is imported: a node starts after this."""
    files = gateway.tls_cert, gateway.tls_key, gateway.tls_client_ca
    if any(files):
        from embedmesh.http.tls import Certificate  # brings an HTTP server along: 150 ms

        Certificate.given(*files)


async def _keep(child: Child, say: Say, ready: asyncio.Event) -> int:
    """Start a child again whenever it dies. Returns the exit code of one that cannot run with these settings.

    Settings that have worked once are not given up: what is in the way now (an engine killed for lack of memory, a
    missing file) may pass, and the others go on answering.
    """
    delay_s = RESTART_FIRST_S
    while True:
        assert child.process is not None
        code = await child.process.wait()
        if code == EXIT_SETUP and not ready.is_set():
            return code
        if time.monotonic() - child.started > HEALTHY_AFTER_S:
            delay_s = RESTART_FIRST_S
        say(f"the {child.name} ended with code {code}; starting it again")
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, RESTART_MAX_S)
        await child.start()


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """The reading end of a pipe that closes when this process ends, however it ends."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(writing)
        os.close(reading)
