"""A node without an address dials out: it opens connections to its gateway, and serves requests on them.

Each begins as a signed `GET /v1/nodes/{id}/dial` with `Upgrade: embedmesh-node`. After the gateway's 101 the roles
change: the gateway sends the same requests that it would send to an address, and the node's own server answers.
"""

import asyncio
import contextlib
import secrets
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

from embedmesh.http.server import HttpServer
from embedmesh.rules.limits import DIALLED_CONNECTIONS
from embedmesh.system import keep_alive

UPGRADE_S = 10.0  # for connecting, TLS and the 101
REDIAL_MIN_S, REDIAL_MAX_S = 0.25, 10.0  # pause between two tries of one connection
UPGRADE_HEAD_BYTES_MAX = 8 * 1024
HEAD_END = b"\r\n\r\n"
KEEP_ALIVE_IDLE_S, KEEP_ALIVE_EVERY_S, KEEP_ALIVE_TRIES = 20, 5, 3  # routers forget quiet ones, often after a minute

Sign = Callable[[str, str, bytes], dict[str, str]]
"""Method, path and body -> the headers that sign the request."""


class DialOut:
    """Keeps DIALLED_CONNECTIONS open to the gateway at `url`, served by `server`."""

    def __init__(self, url: str, server: HttpServer) -> None:
        self._url = url
        self._server = server
        self._tasks: list[asyncio.Task[None]] = []
        self._leaving = False

    def start(self, node_id: str, sign: Sign) -> None:
        """Dial, and dial again whenever a connection ends. Does nothing if it has started already."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._keep(node_id, sign)) for _ in range(DIALLED_CONNECTIONS)]

    def leave(self) -> None:
        """Open no further connections; those that are open stay."""
        self._leaving = True

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _keep(self, node_id: str, sign: Sign) -> None:
        pause_s = REDIAL_MIN_S
        while not self._leaving:
            transport: asyncio.Transport | None = None
            try:
                async with asyncio.timeout(UPGRADE_S):
                    transport, first_data = await self._dial(node_id, sign)
                await self._server.adopt(transport, first_data)
                pause_s = REDIAL_MIN_S
            except (OSError, TimeoutError, ValueError):
                pause_s = min(2 * pause_s, REDIAL_MAX_S)
            finally:
                if transport is not None and not transport.is_closing():
                    transport.close()
            await asyncio.sleep(pause_s * (0.75 + secrets.randbelow(500) / 1000))  # also after one that was served

    async def _dial(self, node_id: str, sign: Sign) -> tuple[asyncio.Transport, bytes]:
        """An upgraded connection, and the data that has already come on it. Raises OSError and ValueError."""
        parts = urlsplit(self._url)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        path = f"/v1/nodes/{node_id}/dial"
        headers = {"Host": parts.netloc, "Connection": "Upgrade", "Upgrade": "embedmesh-node", **sign("GET", path, b"")}
        head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        loop = asyncio.get_running_loop()
        transport, upgrade = await loop.create_connection(_Upgrade, parts.hostname or "", port, ssl=tls)
        try:
            sock = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):
                keep_alive(sock, KEEP_ALIVE_IDLE_S, KEEP_ALIVE_EVERY_S, KEEP_ALIVE_TRIES)
            transport.write(head.encode("ascii"))
            return transport, await upgrade.first_data
        except BaseException:
            transport.abort()
            raise


class _Upgrade(asyncio.Protocol):
    """Reads the gateway's 101, and the data that may follow it in the same packet."""

    def __init__(self) -> None:
        self.first_data: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, following = self._data.partition(HEAD_END)
        if self.first_data.done():
            return
        if end and head.startswith(b"HTTP/1.1 101 "):
            self.first_data.set_result(following)
        elif end or len(self._data) > UPGRADE_HEAD_BYTES_MAX:
            self.first_data.set_exception(ValueError("the gateway does not take the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.first_data.done():
            self.first_data.set_exception(ConnectionResetError("the gateway closed the connection"))
