"""The other routers, each in front of the same nodes: nginx (the system's) and sglang-router (its own environment)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from bench.rig.install import healthy, nginx, python_router
from bench.rig.processes import Process, free_port

START_S = 30.0


class Peer(NamedTuple):
    """A router and its policy."""

    name: str
    program: str  # nginx or sglang-router
    policy: str  # as its option


PEERS = (
    Peer("nginx, round robin", "nginx", ""),
    Peer("nginx, two choices", "nginx", "random two least_conn;"),
    Peer("nginx, least requests", "nginx", "least_conn;"),
    Peer("sglang-router, round robin", "sglang-router", "round_robin"),
    Peer("sglang-router, two choices", "sglang-router", "power_of_two"),
)


@contextmanager
def running(peer: Peer, nodes: Sequence[int], folder: Path) -> Iterator[int]:
    """The peer in front of nodes at these ports; the port that it listens on. Raises NotInstalled."""
    port = free_port()
    folder.mkdir()
    if peer.program == "nginx":
        command = nginx(peer.policy, nodes, folder, port)
    else:
        command = python_router(peer.program, peer.policy, nodes, port, "--request-timeout-secs", "600")
    with healthy(Process(command, folder / "log"), port, START_S):
        yield port
