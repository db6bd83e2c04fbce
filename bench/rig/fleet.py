"""A gateway without a node of its own, and fault nodes that it has invited. All processes end with the bench."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from bench.rig.command import CannotRun
from bench.rig.http import AsyncClient
from bench.rig.processes import EMBEDMESH, HOST, LOG_SHOWN_CHARS, Process, free_port
from embedmesh.credentials import Credentials
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.errors import NodeFailure

START_S = 20.0  # one on a quiet machine
POLL_S = 0.05


@dataclass(frozen=True)
class Speed:
    """Of a scripted node. By default, one is busy for somewhat more than half of the time with all the load."""

    tokens_per_s: float = 20_000.0
    fixed_ms: float = 2.0
    fifo: bool = False


class Node:
    """One fault node. It joins when it is ordered to."""

    def __init__(self, process: asyncio.subprocess.Process, node_id: str) -> None:
        self.process = process
        self.node_id = node_id

    async def order(self, line: str) -> None:
        """Send it a command, and wait until it has followed it."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        await self.process.stdout.readline()

    async def kill(self) -> None:
        """kill -9: also one that has stopped itself."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Fleet:
    """One gateway and its nodes."""

    def __init__(self, folder: Path, port: int, credentials: Credentials, gateway: Process) -> None:
        self.folder = folder
        self.port = port
        self.credentials = credentials
        self.gateway = gateway
        self.nodes: list[Node] = []
        self._started = 0
        self._admin = AsyncClient(port, credentials.admin_key)

    @property
    def data_dir(self) -> Path:
        """The gateway's."""
        return self.folder / "data"

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The admin API. Raises RuntimeError for a refusal."""
        reply = await self._admin.ask(method, path, msgspec.json.encode(body) if body is not None else b"")
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.body[:300]!r}")
        return reply.json()

    async def look(self, node: Node) -> dict[str, Any]:
        """How the gateway sees a node."""
        found: dict[str, Any] = await self.ask("GET", f"/v1/admin/nodes/{node.node_id}")
        return found

    async def act(self, node: Node, action: str) -> None:
        """Trust, drain, resume or remove a node."""
        await self.ask("POST", f"/v1/admin/nodes/{node.node_id}/{action}")

    async def until(self, node: Node, *states: str) -> None:
        """Wait until a node is in one of these states. Raises CannotRun."""
        begun = time.monotonic()
        found: dict[str, Any] = {}
        while time.monotonic() - begun < START_S:
            with suppress(RuntimeError):  # it has not registered yet
                found = await self.look(node)
                if found["state"] in states:
                    return
            await asyncio.sleep(POLL_S)
        raise CannotRun(f"node {node.node_id} is not {' or '.join(states)}: {found}")

    async def start(
        self, speed: Speed, *, dials_out: bool = False, seed: int = 1, options: tuple[str, ...] = ()
    ) -> Node:
        """A node's process, which has not joined yet."""
        token = (await self.ask("POST", "/v1/admin/invites"))["token"]
        self._started += 1
        folder = self.folder / f"node-{self._started}"
        command = ["-m", "bench.faultnode", "--control", "--gateway", f"http://{HOST}:{self.port}", "--join", token]
        command += ["--data-dir", str(folder), "--seed", str(seed), "--tokens-per-s", str(speed.tokens_per_s)]
        command += ["--fixed-ms", str(speed.fixed_ms), *(["--fifo"] if speed.fifo else []), *options]
        if not dials_out:
            command += ["--address", f"https://{HOST}:{free_port()}"]
        with folder.with_suffix(".log").open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        node = Node(process, "")
        self.nodes.append(node)
        assert process.stdout is not None
        async with asyncio.timeout(START_S):
            line = await process.stdout.readline()
        if not line:
            raise CannotRun(f"a node did not start: {folder.with_suffix('.log').read_text()[-LOG_SHOWN_CHARS:]}")
        node.node_id = msgspec.json.decode(line)["node_id"]
        return node

    async def join(self, node: Node, *states: str) -> None:
        """Have a node join, and wait until it gets work, or until another state is reached."""
        await node.order("join")
        await self.until(node, *(states or ("ready",)))

    async def drop(self, node: Node) -> None:
        """Remove a node from the gateway and end its process."""
        with suppress(RuntimeError):
            await self.act(node, "remove")
        await node.kill()

    async def kill_nodes(self) -> None:
        """All of them, at once."""
        self._admin.close()
        for node in self.nodes:
            await node.kill()


@asynccontextmanager
async def running(folder: Path, options: tuple[str, ...] = ()) -> AsyncIterator[Fleet]:
    """A running gateway with an account and keys. Raises CannotRun."""
    port = free_port()
    credentials = bootstrap(folder / "data", f"http://{HOST}:{port}/v1")
    lifeline, held = os.pipe()
    command = [*EMBEDMESH, "gateway", "--data-dir", str(folder / "data"), "--port", str(port)]
    command += ["--node-networks", "127.0.0.0/8", "--lifeline-fd", str(lifeline), *options]
    with Process(command, folder / "gateway.log", pass_fds=(lifeline,)) as gateway:
        os.close(lifeline)
        fleet = Fleet(folder, port, credentials, gateway)
        try:
            await _answers(fleet)
            yield fleet
        finally:
            os.close(held)
            await asyncio.shield(fleet.kill_nodes())
            gateway.kill()


async def _answers(fleet: Fleet) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < START_S and fleet.gateway.lives:
        with suppress(NodeFailure):
            await fleet.ask("GET", "/v1/admin/nodes")
            return
        await asyncio.sleep(POLL_S)
    raise CannotRun(f"the gateway did not start: {fleet.gateway.log_tail()}")
