"""Every gateway that is measured, started in front of a cheap node of its own."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.gateway.material import Material
from bench.gateway.measure import GATEWAY_CORE, OTHER_CORE, Ends, Measured, ends
from bench.gateway.ours import ALONE, SIGNED
from bench.gateway.peers import PEERS, START_S
from bench.rig.http import Wire
from bench.rig.install import NotInstalled
from bench.rig.processes import HOST, Process, family_of, free_port, open_files, rss_mb, wait_for
from embedmesh.process import bind
from embedmesh.provision.bootstrap import bootstrap

PLAIN = "plain"  # ALONE, in front of the node that could sign
AWAKE_S = 0.5  # until one that was stopped has looked around
REPLY_S = 10.0
NODE_S = 20.0  # until the Python node listens


class Measurable(NamedTuple):
    """A gateway that answers. `first_s` is from its start to its first right answer."""

    ends: Ends
    port: int
    pids: Sequence[int]
    requests: Path
    expected: Path
    first_s: float
    folder: Path

    def load(self, seconds: float, rate: float = 0.0) -> Measured:
        """Put it under load: 32 connections without a pause, or `rate` requests a second."""
        return self.ends.ask(self.port, self.requests, self.expected, self.pids, seconds=seconds, rate=rate)

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Going on, and stopped again after: twenty idle gateways on its core would be a load of their own."""
        self.sleep(signal.SIGCONT)
        time.sleep(AWAKE_S)
        try:
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
def started(
    name: str, material: Material, *, inputs: int = 1, workers: int = 1, store: str = ""
) -> Iterator[Measurable]:
    """A stage of ours, or a peer. Raises NotInstalled."""
    folder = material.folder / f"{name}-{inputs}-{workers}-{time.monotonic_ns()}"
    folder.mkdir()
    with ExitStack() as stack:
        if name in PEERS:
            node = free_port()
            end = stack.enter_context(ends(node, material, inputs))
            peer = PEERS[name](folder, node)
            port, requests = peer.port, material.requests(folder.name, inputs, peer.key, peer.headers)
            begun = time.monotonic()
            processes = [
                Process(peer.command, folder / "log", core=GATEWAY_CORE, environment=peer.environment),
            ]
        else:
            path = folder / "node.sock"
            end = stack.enter_context(ends(path, material, inputs))
            if name in (SIGNED, PLAIN):
                path = stack.enter_context(_python_node(name, material, folder))
            port = free_port()
            credentials = bootstrap(folder / "data", f"http://{HOST}:{port}/v1", store or None)
            requests = material.requests(folder.name, inputs, credentials.api_key)
            begun = time.monotonic()
            processes = _ours(ALONE if name == PLAIN else name, path, port, folder, workers, store)
        for process in processes:
            stack.enter_context(process)
        _wait(port, requests, processes[0])
        pids = [process.pid for process in processes]
        found = Measurable(end, port, pids, requests, material.expected(inputs), time.monotonic() - begun, folder)
        stack.callback(found.sleep, signal.SIGCONT)  # what is stopped does not end
        yield found


def _ours(stage: str, node: Path, port: int, folder: Path, workers: int, store: str) -> list[Process]:
    with bind(HOST, port) as sock:
        os.set_inheritable(sock.fileno(), True)
        command = [sys.executable, "-m", "bench.gateway.ours", stage, "--data-dir", str(folder / "data")]
        command += ["--nodes", f"unix:{node}", "--listen-fd", str(sock.fileno())]
        environment = {"EMBEDMESH_STORE": store} if store else {}
        return [
            Process(command, folder / "log", core=GATEWAY_CORE, environment=environment, pass_fds=(sock.fileno(),))
            for _ in range(workers)
        ]


@contextmanager
def _python_node(form: str, material: Material, folder: Path) -> Iterator[Path]:
    path = folder / "python.sock"
    files = [str(material.folder / "vector"), str(material.folder / "models")]
    command = [sys.executable, "-m", "bench.gateway.node", str(path), form, *files]
    with Process(command, folder / "node-log", core=OTHER_CORE) as process:
        if not wait_for(path.exists, NODE_S, lambda: process.lives):
            raise NotInstalled(f"the node that signs did not start: {process.log_tail()}")
        yield path


def _wait(port: int, requests: Path, process: Process) -> None:
    """Until the first request is answered right."""
    request = requests.read_bytes().partition(b"\0")[0]

    def is_right() -> bool:
        with Wire((HOST, port), REPLY_S) as wire:
            wire.send(request)
            return wire.read_some().startswith(b"HTTP/1.1 200 ")

    if not wait_for(is_right, START_S, lambda: process.lives):
        raise NotInstalled(f"no right answer within {START_S:.0f} s: {process.log_tail()[-500:]}")
