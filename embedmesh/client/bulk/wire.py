"""Connections of a bulk run to one endpoint: opened as they are needed, and kept."""

import asyncio
import socket
import ssl
import time
from collections.abc import Mapping

from embedmesh.client.access import Access
from embedmesh.client.bulk.connection import Broke, BulkConnection
from embedmesh.client.bulk.posting import (
    ConnectionBroke,
    ConnectionWasClosed,
    NoSecureConnection,
    NothingThere,
    Posted,
    TooLate,
)
from embedmesh.client.wire import CLIENT_IDLE_S, CONNECT_WITHIN_S
from embedmesh.rules.tls_failures import tls_failure


class BulkWire:
    """For one event loop. `within_s` is the time for one reply, the connection included."""

    def __init__(self, access: Access, within_s: float) -> None:
        self._access = access
        self._within_s = within_s
        self._idle: list[tuple[float, BulkConnection]] = []
        port = "" if access.port == (443 if access.tls else 80) else f":{access.port}"
        host = f"[{access.host}]" if ":" in access.host else access.host
        lines = "".join(f"{name}: {value}\r\n" for name, value in access.headers.items())
        self._lines = f" HTTP/1.1\r\nHost: {host}{port}\r\n{lines}"

    async def post(self, path: str, body: bytes, headers: Mapping[str, str], bytes_max: int) -> Posted:
        """Send, and wait for the whole reply. Raises NotPosted; a cancellation closes the connection."""
        more = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {self._access.path}{path}{self._lines}{more}Content-Length: {len(body)}\r\n\r\n"
        request = head.encode("latin-1") + body
        kept = self._kept()
        try:
            async with asyncio.timeout(self._within_s):
                if kept is None:
                    return await self._on(await self._dial(), request, bytes_max)
                return await self._on(kept, request, bytes_max)
        except Broke as broke:
            self.close()  # the others may be as old
            kind = ConnectionBroke if broke.heard or not kept else ConnectionWasClosed
            raise kind(f"the connection to {self._access.base_url} broke") from None
        except TimeoutError:
            raise TooLate(f"{self._access.base_url} did not answer in time") from None

    async def _on(self, connection: BulkConnection, request: bytes, bytes_max: int) -> Posted:
        reply = await connection.exchange(request, bytes_max)
        if connection.usable:
            self._idle.append((time.monotonic(), connection))
        return reply

    def _kept(self) -> BulkConnection | None:
        oldest = time.monotonic() - CLIENT_IDLE_S
        while self._idle:
            since, connection = self._idle.pop()
            if connection.usable and since > oldest:
                return connection
            connection.close()
        return None

    async def _dial(self) -> BulkConnection:
        access = self._access
        try:
            async with asyncio.timeout(CONNECT_WITHIN_S):
                _, connection = await asyncio.get_running_loop().create_connection(
                    BulkConnection, access.host, access.port, ssl=access.tls
                )
        except ssl.SSLError as error:
            raise NoSecureConnection(str(tls_failure(access.base_url, error))) from None
        except TimeoutError:
            raise NothingThere(f"{access.base_url} cannot be reached in time") from None
        except ConnectionRefusedError:
            raise NothingThere(f"nothing listens at {access.base_url}", is_refused=True) from None
        except socket.gaierror:
            raise NothingThere(f"no host of that name is known: {access.base_url}") from None
        except OSError as error:
            raise NothingThere(f"{access.base_url} cannot be reached ({error.strerror or 'no connection'})") from None
        return connection

    def close(self) -> None:
        """Close the kept connections."""
        while self._idle:
            self._idle.pop()[1].close()
