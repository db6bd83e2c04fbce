"""A node that nobody can reach dials out: it opens connections to its gateway, and answers on them as if called.

Each begins as a signed `GET /v1/nodes/{id}/dial` with `Upgrade: embedmesh-node`. After the gateway's 101 the roles
change: the gateway sends requests, the very ones that it would send to an address, and the node's own server answers.
"""

import asyncio
import contextlib
import logging
import secrets
import socket
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

from embedmesh.http.server import HttpServer

log = logging.getLogger("embedmesh.node")

CONNECTIONS = 16  # kept open: as many calls as a gateway sends such a node at one time
UPGRADE_S = 10.0  # for connecting, TLS and the 101
AGAIN_MIN_S, AGAIN_MAX_S = 0.25, 10.0  # between two tries of one of them
HEAD_BYTES_MAX = 8 * 1024
HEAD_END = b"\r\n\r\n"
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 20), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 3))
"""Seconds of silence after which the line is tried, between two tries, and how many in vain mean that it is dead: a
router on the way forgets quiet connections, often after a minute."""

Sign = Callable[[str, str, bytes], dict[str, str]]


class DialOut:
    """Keeps CONNECTIONS open to a gateway at `url`, served by `server`."""

    def __init__(self, url: str, server: HttpServer) -> None:
        self._url = url
        self._server = server
        self._tasks: list[asyncio.Task[None]] = []
        self.leaving = False  # then nothing is dialled any more

    def start(self, node_id: str, sign: Sign) -> None:
        """Dial, and dial again whenever a connection ends. Does nothing when it has begun already."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._keep(node_id, sign)) for _ in range(CONNECTIONS)]

    async def stop(self) -> None:
        """Dial no more, and end what is open."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    async def _keep(self, node_id: str, sign: Sign) -> None:
        pause = AGAIN_MIN_S
        while not self.leaving:
            transport: asyncio.Transport | None = None
            try:
                async with asyncio.timeout(UPGRADE_S):
                    transport, rest = await self._dial(node_id, sign)
                await self._server.adopt(transport, rest)
                pause = AGAIN_MIN_S
            except (OSError, TimeoutError, ValueError):
                pause = min(2 * pause, AGAIN_MAX_S)
            finally:
                if transport is not None and not transport.is_closing():
                    transport.close()
            await asyncio.sleep(pause * (0.75 + secrets.randbelow(500) / 1000))  # also where it was taken, and ended

    async def _dial(self, node_id: str, sign: Sign) -> tuple[asyncio.Transport, bytes]:
        """An upgraded connection, and what has already come on it. Raises OSError and ValueError."""
        parts = urlsplit(self._url)
        tls = ssl.create_default_context() if parts.scheme == "https" else None
        port = parts.port or (443 if tls else 80)
        path = f"/v1/nodes/{node_id}/dial"
        headers = {"Host": parts.netloc, "Connection": "Upgrade", "Upgrade": "embedmesh-node", **sign("GET", path, b"")}
        head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        loop = asyncio.get_running_loop()
        transport, upgrade = await loop.create_connection(_Upgrade, parts.hostname or "", port, ssl=tls)
        try:
            _stay_alive(transport)
            transport.write(head.encode("ascii"))
            return transport, await upgrade.answered
        except BaseException:
            transport.abort()
            raise


class _Upgrade(asyncio.Protocol):
    """Reads the gateway's 101, and what may follow it in the same packet."""

    def __init__(self) -> None:
        self.answered: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, end, rest = self._data.partition(HEAD_END)
        if self.answered.done():
            return
        if end and head.startswith(b"HTTP/1.1 101 "):
            self.answered.set_result(rest)
        elif end or len(self._data) > HEAD_BYTES_MAX:
            self.answered.set_exception(ValueError("the gateway does not take the connection"))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.answered.done():
            self.answered.set_exception(ConnectionResetError("the gateway closed the connection"))


def _stay_alive(transport: asyncio.BaseTransport) -> None:
    sock = transport.get_extra_info("socket")
    with contextlib.suppress(OSError, AttributeError):  # not every system has all of these
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in KEEP_ALIVE:
            sock.setsockopt(socket.IPPROTO_TCP, option, value)
