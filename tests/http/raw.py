"""Raw HTTP for tests: bytes in, a parsed reply out. What a library would refuse to send must be sendable here."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from embedmesh.http.server import HttpServer


@dataclass
class Raw:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = json.loads(self.body)["error"]
        return error


@asynccontextmanager
async def serving(server: HttpServer) -> AsyncIterator[int]:
    """The server on a free port."""
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    await server.start(sock)
    try:
        yield sock.getsockname()[1]
    finally:
        await server.drain(0.1)


async def read_reply(reader: asyncio.StreamReader) -> Raw:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Raw(int(head[0].split()[1]), headers, body)


async def send(port: int, raw: bytes, *, timeout_s: float = 5.0) -> Raw:
    """One connection, these bytes, one reply."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(raw)
        async with asyncio.timeout(timeout_s):
            return await read_reply(reader)
    finally:
        writer.close()


def request(
    method: str = "POST",
    path: str = "/v1/embeddings",
    body: bytes = b"",
    *,
    key: str | None = "em_good",
    content_type: str | None = "application/json",
    **headers: str,
) -> bytes:
    """A whole request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: test", f"Content-Length: {len(body)}"]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if content_type is not None:
        lines.append(f"Content-Type: {content_type}")
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
