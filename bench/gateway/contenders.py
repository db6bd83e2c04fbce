"""Every gateway that is measured, started in front of a cheap node of its own, or of several."""

import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from bench.gateway.material import Material
from bench.gateway.measure import GATEWAY_CORE, OTHER_CORE, Ends, Measured, ends
from bench.gateway.ours import ALONE, SIGNED
from bench.gateway.peers import PEERS, START_S
from bench.rig.http import vectors_of
from bench.rig.install import NotInstalled
from bench.rig.processes import HOST, Process, before_others, family_of, free_port, open_files, rss_mb, wait_for
from embedmesh.process import bind
from embedmesh.provision.bootstrap import BOOTSTRAP_CREDIT_NANOUSD, bootstrap, open_books
from embedmesh.settings import GatewaySettings, store_dsn

PLAIN = "plain"  # ALONE, in front of the node that could sign
DIRECT = "direct"  # no gateway: the cheap node itself
AWAKE_S = 0.5  # until one that was stopped has looked around
WARM_S, WARM_KEYS_A_S = 1.0, 300  # a key that has not asked for a while is dearer: each asks a few times first
REPLY_S = 10.0
NODE_S = 20.0  # until the Python node listens
EMBEDDING = re.compile(rb'"embedding": ?(\[[^\]]*\]|"[^"]*")')


class Setup(NamedTuple):
    """What is started: a stage of ours, a peer, or DIRECT; what its requests are like; what it runs on.

    Each of several keys is of an account of its own.
    """

    name: str
    inputs: int = 1
    keys: int = 1
    nodes: int = 1
    floats: bool = False
    workers: int = 1
    store: str = ""
    options: tuple[str, ...] = ()  # more, of a stage of ours

    @property
    def label(self) -> str:
        """As tables and options name it."""
        more = {
            "PostgreSQL": bool(self.store),
            f"{self.inputs} texts": self.inputs > 1,
            f"{self.keys:,} keys": self.keys > 1,
            f"{self.nodes} nodes": self.nodes > 1,
            "floats": self.floats,
            f"{self.workers} workers": self.workers > 1,
            " ".join(self.options): bool(self.options),
        }
        return ", ".join([self.name, *(words for words, holds in more.items() if holds)])


class Measurable(NamedTuple):
    """A gateway that answers. `first_s` is from its start to its first right answer."""

    ends: Ends
    port: int
    pids: Sequence[int]
    requests: Path
    expected: Path
    first_s: float
    folder: Path
    warm_s: float = WARM_S

    def load(self, seconds: float, rate: float = 0.0) -> Measured:
        """Put it under load: 32 connections without a pause, or `rate` requests a second."""
        return self.ends.ask(
            self.port, self.requests, self.expected, self.pids, warm_s=self.warm_s, seconds=seconds, rate=rate
        )

    @contextmanager
    def awake(self, *, first: bool = False) -> Iterator[None]:
        """Going on, and stopped again after: twenty idle gateways on its core would be a load of their own.

        `first`: before all other work of the machine, as clients and nodes, too. Raises PermissionError.
        """
        self.sleep(signal.SIGCONT)
        time.sleep(AWAKE_S)
        try:
            with before_others(self.ends.pid, *self.pids) if first else nullcontext():
                yield
        finally:
            self.sleep()

    @property
    def resident_mb(self) -> float:
        """Memory of all its processes."""
        return rss_mb(family_of(*self.pids))

    @property
    def open_files(self) -> int:
        """Of all its processes."""
        return open_files(family_of(*self.pids))

    def sleep(self, number: signal.Signals = signal.SIGSTOP) -> None:
        """Stop all its processes, or let them go on."""
        for pid in family_of(*self.pids):
            os.kill(pid, number)


@contextmanager
def started(setup: Setup, material: Material) -> Iterator[Measurable]:
    """A stage of ours, or a peer. Raises NotInstalled."""
    folder = material.folder / f"{setup.name}-{time.monotonic_ns()}"
    folder.mkdir()
    with ExitStack() as stack:
        ours = setup.name not in PEERS and setup.name != DIRECT
        places = [folder / f"node-{n}.sock" if ours else free_port() for n in range(setup.nodes)]
        end = stack.enter_context(ends(places, material, setup.inputs, floats=setup.floats))
        keys: Sequence[str | None] = [None]
        headers: Mapping[str, str] = {}
        if ours:
            if setup.name in (SIGNED, PLAIN):
                places = [stack.enter_context(_python_node(setup.name, material, folder))]
            port = free_port()
            keys = _keys(folder / "data", f"http://{HOST}:{port}/v1", setup)
        elif setup.name == DIRECT:
            port = int(str(places[0]))
        else:
            peer = PEERS[setup.name](folder, [int(str(place)) for place in places])
            port, keys, headers = peer.port, [peer.key], peer.headers
        requests = material.requests(folder, setup.inputs, keys, headers, floats=setup.floats)
        begun = time.monotonic()
        processes: list[Process] = []
        if ours:
            processes = _ours(setup, [f"unix:{place}" for place in places], port, folder)
        elif setup.name != DIRECT:
            processes = [Process(peer.command, folder / "log", core=GATEWAY_CORE, environment=peer.environment)]
        for process in processes:
            stack.enter_context(process)
        expected = folder / "expected"
        expected.write_bytes(_first_answer(port, requests, processes, material, setup.inputs))
        first_s = time.monotonic() - begun
        pids = [process.pid for process in processes]
        warm_s = WARM_S + setup.keys / WARM_KEYS_A_S
        found = Measurable(end, port, pids, requests, expected, first_s, folder, warm_s)
        stack.callback(found.sleep, signal.SIGCONT)  # what is stopped does not end
        yield found


def _ours(setup: Setup, nodes: Sequence[str], port: int, folder: Path) -> list[Process]:
    with bind(HOST, port) as sock:
        os.set_inheritable(sock.fileno(), True)
        stage = ALONE if setup.name == PLAIN else setup.name
        command = [sys.executable, "-m", "bench.gateway.ours", stage, "--data-dir", str(folder / "data")]
        command += ["--listen-fd", str(sock.fileno())]
        command += setup.options
        for node in nodes:
            command += ["--nodes", node]
        environment = {"EMBEDMESH_STORE": setup.store} if setup.store else {}
        return [
            Process(command, folder / "log", core=GATEWAY_CORE, environment=environment, pass_fds=(sock.fileno(),))
            for _ in range(setup.workers)
        ]


def _keys(data_dir: Path, base_url: str, setup: Setup) -> list[str]:
    """One, or several of as many accounts, in a new store."""
    first = bootstrap(data_dir, base_url, setup.store or None)
    keys = [first.api_key]
    if setup.keys > 1:
        settings = GatewaySettings(data_dir=data_dir, store=setup.store)
        with open_books(data_dir, store_dsn(settings)) as books:
            for number in range(1, setup.keys):
                account = f"account-{number}"
                books.accounts.create(account)
                books.accounts.credit(account, BOOTSTRAP_CREDIT_NANOUSD, account)
                keys.append(books.keys.create(account, ["embeddings"])[1])
    return keys


@contextmanager
def _python_node(form: str, material: Material, folder: Path) -> Iterator[Path]:
    path = folder / "python.sock"
    files = [str(material.folder / "vector"), str(material.folder / "models")]
    command = [sys.executable, "-m", "bench.gateway.node", str(path), form, *files]
    with Process(command, folder / "node-log", core=OTHER_CORE) as process:
        if not wait_for(path.exists, NODE_S, lambda: process.lives):
            raise NotInstalled(f"the node that signs did not start: {process.log_tail()}")
        yield path


def _first_answer(port: int, requests: Path, processes: Sequence[Process], material: Material, inputs: int) -> bytes:
    """The lines that `ends` looks for in every answer: each vector as it stands in the first one, which is right."""
    request = requests.read_bytes().partition(b"\0")[0]
    found: list[bytes] = []

    def is_right() -> bool:
        with socket.create_connection((HOST, port), REPLY_S) as wire:
            wire.sendall(request)
            reply = HTTPResponse(wire, method="POST")
            try:
                reply.begin()
                body = reply.read()
            except HTTPException:
                return False
        if reply.status != 200:
            return False
        found[:] = EMBEDDING.findall(body)
        values = [msgspec.json.decode(each) for each in found]
        vectors = vectors_of(values) if isinstance(values[0], str) else np.array(values, dtype=np.float32)
        return len(vectors) == inputs and all(np.array_equal(each, material.vector) for each in vectors)

    lives = processes[0] if processes else None
    if not wait_for(is_right, START_S, lambda: lives is None or lives.lives):
        said = lives.log_tail()[-500:] if lives is not None else ""
        raise NotInstalled(f"no right answer within {START_S:.0f} s: {said}")
    return b"".join(each + b"\n" for each in found)
