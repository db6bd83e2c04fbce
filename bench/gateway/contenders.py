"""Every gateway that is measured, started in front of a cheap node of its own."""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.engine.install import NotInstalled
from bench.fault.rig import HOST, free_port
from bench.gateway.material import Material
from bench.gateway.measure import GATEWAY_CORE, OTHER_CORE, Ends, Measured, ends, family_of, running
from bench.gateway.ours import ALONE, SIGNED
from bench.gateway.peers import PEERS, START_S
from embedmesh.process import bind
from embedmesh.provision.bootstrap import bootstrap

PLAIN = "plain"  # ALONE, in front of the node that could sign
POLL_S, NODE_S = 0.05, 0.5
AWAKE_S = 0.5  # until one that was stopped has looked around
REPLY_S = 10.0
REPLY_BYTES = 4_096  # enough of one


class Contender(NamedTuple):
    """A gateway that answers. `first_s` is from its start to its first right answer."""

    ends: Ends
    port: int
    pids: Sequence[int]
    requests: Path
    expected: Path
    first_s: float

    def ask(self, seconds: float, rate: float = 0.0) -> Measured:
        """Under load."""
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

    def sleep(self, number: signal.Signals = signal.SIGSTOP) -> None:
        """Stop all its processes, or let them go on."""
        for pid in self.pids:
            for one in family_of(pid):
                os.kill(one, number)


@contextmanager
def started(
    name: str, program: Path, material: Material, folder: Path, *, inputs: int = 1, workers: int = 1, store: str = ""
) -> Iterator[Contender]:
    """A stage of ours, or a peer. Raises NotInstalled."""
    folder.mkdir()
    with ExitStack() as stack:
        if name in PEERS:
            node = free_port()
            end = stack.enter_context(ends(program, node, material, inputs))
            peer = PEERS[name](folder, node)
            port, requests = peer.port, material.requests(folder.name, inputs, peer.key, peer.headers)
            begun = time.monotonic()
            pids = [
                stack.enter_context(
                    running(peer.command, folder / "log", core=GATEWAY_CORE, env=dict(peer.environment))
                )
            ]
        else:
            place = folder / "node.sock"
            end = stack.enter_context(ends(program, place, material, inputs))
            if name in (SIGNED, PLAIN):
                place = stack.enter_context(_python_node(name, material, folder))
            port = free_port()
            credentials = bootstrap(folder / "data", f"http://{HOST}:{port}/v1", store or None)
            requests = material.requests(folder.name, inputs, credentials.api_key)
            begun = time.monotonic()
            pids = stack.enter_context(_ours(ALONE if name == PLAIN else name, place, port, folder, workers, store))
        _wait(port, requests, folder / "log")
        contender = Contender(end, port, pids, requests, material.expected(inputs), time.monotonic() - begun)
        stack.callback(contender.sleep, signal.SIGCONT)  # what is stopped does not end
        yield contender


@contextmanager
def _ours(stage: str, node: Path, port: int, folder: Path, workers: int, store: str) -> Iterator[list[int]]:
    sock = bind(HOST, port)
    with ExitStack() as stack:
        stack.callback(sock.close)
        os.set_inheritable(sock.fileno(), True)
        command = [sys.executable, "-m", "bench.gateway.ours", stage, "--data-dir", str(folder / "data")]
        command += ["--nodes", f"unix:{node}", "--listen-fd", str(sock.fileno())]
        environment = {"EMBEDMESH_STORE": store} if store else {}
        yield [
            stack.enter_context(
                running(command, folder / "log", core=GATEWAY_CORE, env=environment, pass_fds=(sock.fileno(),))
            )
            for _ in range(workers)
        ]


@contextmanager
def _python_node(form: str, material: Material, folder: Path) -> Iterator[Path]:
    place = folder / "python.sock"
    files = [str(material.folder / "vector"), str(material.folder / "models")]
    with running(
        [sys.executable, "-m", "bench.gateway.node", str(place), form, *files], folder / "node-log", core=OTHER_CORE
    ):
        while not place.exists():
            time.sleep(POLL_S)
        yield place


def _wait(port: int, requests: Path, log: Path) -> None:
    """Until the first request is answered right."""
    question = requests.read_bytes().partition(b"\0")[0]
    until, said = time.monotonic() + START_S, ""
    while time.monotonic() < until:
        try:
            with socket.create_connection((HOST, port), REPLY_S) as connection:
                connection.sendall(question)
                said = connection.recv(REPLY_BYTES).decode("latin-1")
                if said.startswith("HTTP/1.1 200 "):
                    return
        except OSError as error:
            said = type(error).__name__
        time.sleep(POLL_S)
    raise NotInstalled(
        f"no right answer within {START_S:.0f} s ({said[:200]}): {log.read_text(errors='replace')[-500:]}"
    )
