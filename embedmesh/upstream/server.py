"""A server of another make as HTTP has it: its URL, its token, its connections, and requests in JSON."""

import json
import ssl
from typing import Any
from urllib.parse import urlsplit

import msgspec

from embedmesh.fleet.addresses import DEFAULT_PORTS
from embedmesh.rules.errors import InvalidValue, NodeFailure
from embedmesh.rules.limits import UPSTREAM_URL_CHARS_MAX
from embedmesh.upstream.http1_reader import Http1Reply
from embedmesh.upstream.http1_stream import BodyStream
from embedmesh.upstream.pools import tcp_pool
from embedmesh.upstream.refusals import SUCCESS, failure_of

REFUSAL_BYTES_MAX = 64 * 1024  # of a reply without success to a request for a stream; it says why in a few hundred


class UpstreamUrl(msgspec.Struct, frozen=True):
    """The parts of a server's URL."""

    tls: bool
    host: str
    port: int
    path: str  # before `/embeddings`, without a trailing slash


def parse_url(url: str) -> UpstreamUrl:
    """Parse `http://HOST:PORT` or `https://HOST/some/v1`; the default path is `/v1`. Raises InvalidValue."""
    try:
        parts = urlsplit(url)
        port = DEFAULT_PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
    except ValueError:
        parts, port = urlsplit(""), 0
    sane = url.isascii() and url.isprintable() and " " not in url and len(url) <= UPSTREAM_URL_CHARS_MAX
    if not sane or not port or not parts.hostname or "@" in parts.netloc or parts.query or parts.fragment:
        raise InvalidValue("A server's address is like http://10.0.0.7:8080 or https://host/v1.", param="address")
    return UpstreamUrl(parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/") or "/v1")


class UpstreamServer:
    """One server. Paths are below that of its URL, without a leading slash; or from the root on, with one."""

    def __init__(self, url: UpstreamUrl, token: str) -> None:
        tls = ssl.create_default_context() if url.tls else None
        self._pool = tcp_pool(url.host, url.port, tls, name=url.host)  # no policy: an operator chose the server
        self._path = url.path
        host = url.host if url.port in DEFAULT_PORTS.values() else f"{url.host}:{url.port}"
        authorization = f"Authorization: Bearer {token}\r\n" if token else ""
        self._lines = f" HTTP/1.1\r\nHost: {host}\r\n{authorization}Content-Type: application/json\r\n"

    async def exchange(self, path: str, body: dict[str, Any], limit: int) -> Http1Reply:
        """A whole reply of any status, whose body has at most `limit` bytes. Raises a NodeFailure."""
        request = self._request(path, body, "application/json")
        return await self._pool.exchange(lambda: request, limit)

    async def stream(self, path: str, body: dict[str, Any], limit: int) -> BodyStream:
        """A reply with success whose body, of at most `limit` bytes, is read as it comes. Raises a NodeFailure."""
        request = self._request(path, body, "text/event-stream")
        stream = await self._pool.stream(lambda: request, limit)
        if stream.status in SUCCESS:
            return stream
        said = b""
        try:
            said = await stream.read_all(REFUSAL_BYTES_MAX)
        except NodeFailure:
            pass  # the status says enough
        finally:
            stream.close()
        raise failure_of(stream.status, stream.headers, said)

    def close(self) -> None:
        """Drop every idle connection."""
        self._pool.close()

    def _request(self, path: str, body: dict[str, Any], accept: str) -> bytes:
        encoded = json.dumps(body, ensure_ascii=False).encode()
        target = path if path.startswith("/") else f"{self._path}/{path}"
        head = (
            f"POST {target}{self._lines}Accept: {accept}\r\nAccept-Encoding: identity\r\n"
            f"Content-Length: {len(encoded)}\r\n\r\n"
        )
        return head.encode("latin-1") + encoded


def checked(reply: Http1Reply) -> Http1Reply:
    """A reply with success. Raises the failure that any other status means."""
    if reply.status in SUCCESS:
        return reply
    raise failure_of(reply.status, reply.headers, reply.body)


def is_plain(headers: dict[bytes, bytes]) -> bool:
    """Whether a body came as it is, and not compressed, which was not asked for."""
    return headers.get(b"content-encoding", b"identity").lower() == b"identity"
