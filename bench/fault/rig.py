"""The processes: a gateway without a node of its own, and fault nodes that it has invited. All end with the bench."""

import asyncio
import json
import os
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedmesh.gateway.nodes.pools import OutboundPool, tcp_pool
from embedmesh.provision.bootstrap import bootstrap
from embedmesh.rules.errors import NodeFailure
from embedmesh.settings import Credentials

HOST = "127.0.0.1"
START_S = 20.0  # one on a quiet machine
STOP_S = 40.0  # a gateway drains for 30
POLL_S = 0.05
REPLY_BYTES_MAX = 4 * 1024 * 1024


@dataclass(frozen=True)
class Speed:
    """Of a scripted node. As it is, one is busy for somewhat more than half of the time with all the load."""

    tokens_per_s: float = 20_000.0
    fixed_ms: float = 2.0
    fifo: bool = False


class Node:
    """One fault node. It joins when it is told to."""

    def __init__(self, process: asyncio.subprocess.Process, node_id: str) -> None:
        self.process = process
        self.node_id = node_id

    async def order(self, line: str) -> dict[str, Any]:
        """Tell it something; what it says of its counts."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line.encode() + b"\n")
        return json.loads(await self.process.stdout.readline())

    async def kill(self) -> None:
        """kill -9: also one that has stopped itself."""
        with suppress(ProcessLookupError):
            self.process.kill()
        await self.process.wait()


class Rig:
    """One gateway and its nodes."""

    def __init__(self, folder: Path, port: int, credentials: Credentials, gateway: asyncio.subprocess.Process) -> None:
        self.folder = folder
        self.port = port
        self.credentials = credentials
        self.gateway = gateway
        self.nodes: list[Node] = []
        self._started = 0
        self._admin: OutboundPool = tcp_pool(HOST, port)

    @property
    def log(self) -> Path:
        """What the gateway wrote."""
        return self.folder / "gateway.log"

    @property
    def data_dir(self) -> Path:
        """The gateway's."""
        return self.folder / "data"

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """The admin API. Raises RuntimeError for a refusal."""
        data = json.dumps(body).encode() if body is not None else b""
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {HOST}\r\nAuthorization: Bearer {self.credentials.admin_key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        reply = await self._admin.exchange(lambda: head.encode() + data, REPLY_BYTES_MAX)
        if reply.status != 200:
            raise RuntimeError(f"{method} {path}: {reply.status} {reply.body[:300]!r}")
        return json.loads(reply.body)

    async def look(self, node: Node) -> dict[str, Any]:
        """How the gateway sees a node."""
        found: dict[str, Any] = await self.ask("GET", f"/v1/admin/nodes/{node.node_id}")
        return found

    async def act(self, node: Node, action: str) -> None:
        """Say something of a node."""
        await self.ask("POST", f"/v1/admin/nodes/{node.node_id}/{action}")

    async def until(self, node: Node, *states: str) -> None:
        """Wait until a node is in one of these states. Raises RuntimeError."""
        begun = time.monotonic()
        found: dict[str, Any] = {}
        while time.monotonic() - begun < START_S:
            with suppress(RuntimeError):  # it has not registered yet
                found = await self.look(node)
                if found["state"] in states:
                    return
            await asyncio.sleep(POLL_S)
        raise RuntimeError(f"node {node.node_id} is not {' or '.join(states)}: {found}")

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
            raise RuntimeError(f"a node did not start: {folder.with_suffix('.log').read_text()[-2000:]}")
        node.node_id = json.loads(line)["node_id"]
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

    async def stop(self) -> int:
        """SIGTERM to the gateway, and wait until it has drained; its exit code."""
        if self.gateway.returncode is None:
            self.gateway.terminate()
        async with asyncio.timeout(STOP_S):
            return await self.gateway.wait()

    async def kill(self) -> None:
        """All of it, at once."""
        self._admin.close()
        for node in self.nodes:
            await node.kill()
        if self.gateway.returncode is None:
            self.gateway.kill()
            await self.gateway.wait()


@asynccontextmanager
async def rigged(folder: Path, options: tuple[str, ...] = ()) -> AsyncIterator[Rig]:
    """A running gateway with an account and keys. Raises RuntimeError."""
    port = free_port()
    credentials = bootstrap(folder / "data", f"http://{HOST}:{port}/v1")
    lifeline, held = os.pipe()
    command = ["-m", "embedmesh", "gateway", "--data-dir", str(folder / "data"), "--port", str(port)]
    command += ["--node-networks", "127.0.0.0/8", "--lifeline-fd", str(lifeline), *options]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBEDMESH_")}
    kept |= {name: value for name, value in os.environ.items() if name == "EMBEDMESH_ASSETS_DIR"}
    with (folder / "gateway.log").open("wb") as log:
        gateway = await asyncio.create_subprocess_exec(
            sys.executable, *command, stderr=log, env=kept, pass_fds=(lifeline,), start_new_session=True
        )
    os.close(lifeline)
    rig = Rig(folder, port, credentials, gateway)
    try:
        await _answers(rig)
        yield rig
    finally:
        os.close(held)
        await asyncio.shield(rig.kill())


async def _answers(rig: Rig) -> None:
    begun = time.monotonic()
    while time.monotonic() - begun < START_S and rig.gateway.returncode is None:
        with suppress(NodeFailure):
            await rig.ask("GET", "/v1/admin/nodes")
            return
        await asyncio.sleep(POLL_S)
    raise RuntimeError(f"the gateway did not start: {rig.log.read_text()[-2000:]}")


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as sock:
        sock.bind((HOST, 0))
        port: int = sock.getsockname()[1]
        return port
