"""A node without an address dials out: it opens connections to its gateway, and serves requests on them.

Each begins as a signed `GET /v1/nodes/{id}/dial` with `Upgrade: embedmesh-node`. After the gateway's 101 the roles
change: the gateway sends the same requests that it would send to an address, and the node's own server answers.

Behind the gateway's name may be several gateways of one store. Each of its addresses gets connections, also one that
comes later: left to a balancer's chance, a gateway that has just started would get none from nodes that are content.
"""

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from urllib.parse import urlsplit

from embedmesh.http.server import HttpServer
from embedmesh.rules.limits import DIALLED_CONNECTIONS
from embedmesh.system import keep_alive

UPGRADE_S = 10.0  # for connecting, TLS and the 101
REDIAL_MIN_S, REDIAL_MAX_S = 0.25, 10.0  # pause between two tries of one connection
LOOK_UP_S = 5.0  # between two look-ups of the gateway's name; what they cost is nothing beside a heartbeat
GATEWAYS_DIALLED_MAX = 16  # addresses of one name
UPGRADE_HEAD_BYTES_MAX = 8 * 1024
HEAD_END = b"\r\n\r\n"
KEEP_ALIVE_IDLE_S, KEEP_ALIVE_EVERY_S, KEEP_ALIVE_TRIES = 20, 5, 3  # routers forget quiet ones, often after a minute

Sign = Callable[[str, str, bytes], dict[str, str]]
"""Method, path and body -> the headers that sign the request."""

FindAddresses = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port -> the addresses that the host has now. Raises OSError."""


async def find_addresses(host: str, port: int) -> Sequence[str]:
    """The system's answer. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class DialOut:
    """Keeps DIALLED_CONNECTIONS open to each address of the gateway at `url`, served by `server`."""

    def __init__(self, url: str, server: HttpServer, find: FindAddresses = find_addresses) -> None:
        parts = urlsplit(url)
        self._host_header = parts.netloc
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._server = server
        self._find = find
        self._following: asyncio.Task[None] | None = None
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}  # by address
        self._wanted: frozenset[str] = frozenset()  # addresses that the name had last
        self._leaving = False

    def start(self, node_id: str, sign: Sign) -> None:
        """Dial, and dial again whenever a connection ends. Does nothing if it has started already."""
        if self._following is None:
            self._following = asyncio.create_task(self._follow(node_id, sign))

    def leave(self) -> None:
        """Open no further connections; those that are open stay."""
        self._leaving = True

    async def stop(self) -> None:
        tasks = [task for each in self._tasks.values() for task in each]
        if self._following is not None:
            tasks.append(self._following)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._following = None

    async def _follow(self, node_id: str, sign: Sign) -> None:
        """Look the name up now and then, and keep connections to what it stands for."""
        while not self._leaving:
            # Where no name server answers the gateways may be well: then all stays as it is.
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(UPGRADE_S):
                    found = list(await self._find(self._host, self._port))[:GATEWAYS_DIALLED_MAX]
                self._wanted = frozenset(found)
                self._tasks = {
                    address: kept
                    for address, tasks in self._tasks.items()
                    if (kept := [task for task in tasks if not task.done()]) or address in found
                }
                for address in found:
                    tasks = self._tasks.setdefault(address, [])
                    missing = DIALLED_CONNECTIONS - len(tasks)
                    tasks += [asyncio.create_task(self._keep(address, node_id, sign)) for _ in range(missing)]
            await asyncio.sleep(LOOK_UP_S)

    async def _keep(self, address: str, node_id: str, sign: Sign) -> None:
        """One connection, for as long as the name has the address."""
        pause_s = REDIAL_MIN_S
        while not self._leaving and address in self._wanted:
            transport: asyncio.Transport | None = None
            try:
                async with asyncio.timeout(UPGRADE_S):
                    transport, first_data = await self._dial(address, node_id, sign)
                await self._server.adopt(transport, first_data)
                pause_s = REDIAL_MIN_S
            except (OSError, TimeoutError, ValueError):
                pause_s = min(2 * pause_s, REDIAL_MAX_S)
            finally:
                if transport is not None and not transport.is_closing():
                    transport.close()
            await asyncio.sleep(pause_s * (0.75 + secrets.randbelow(500) / 1000))  # also after one that was served

    async def _dial(self, address: str, node_id: str, sign: Sign) -> tuple[asyncio.Transport, bytes]:
        """An upgraded connection, and the data that has already come on it. Raises OSError and ValueError."""
        path = f"/v1/nodes/{node_id}/dial"
        headers = {"Host": self._host_header, "Connection": "Upgrade", "Upgrade": "embedmesh-node"}
        headers |= sign("GET", path, b"")
        head = f"GET {path} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
        name = self._host if self._tls is not None else None
        transport, upgrade = await asyncio.get_running_loop().create_connection(
            _Upgrade, address, self._port, ssl=self._tls, server_hostname=name
        )
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
