"""HTTP clients for benches and tests.

`Wire` is a blocking socket and some fifty lines, so that its own cost is small beside what it measures, and so that it
can say anything at all, HTTP or not. `AsyncClient` sends many requests at a time to one server.
"""

import base64
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from bench.rig.processes import HOST
from embedmesh.upstream.pools import tcp_pool

MODEL = "all-MiniLM-L6-v2"
REPLY_S = 30.0  # as long as the gateway gives an ordinary request
REPLY_BYTES_MAX = 64 * 1024 * 1024
RECV_BYTES = 256 * 1024  # of one read: a hundred vectors
HEAD_END = b"\r\n\r\n"

Vectors = npt.NDArray[np.float32]

Address = tuple[str, int] | Path
"""Host and port, or the path of a Unix socket."""


class Reply(NamedTuple):
    """What came back. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        """The body, decoded."""
        return msgspec.json.decode(self.body)

    @property
    def code(self) -> str | None:
        """The `code` of the error envelope; None for a success."""
        return None if self.status == 200 else self.json()["error"]["code"]

    @property
    def outcome(self) -> str:
        """`200`, or another status and the error's code."""
        return "200" if self.status == 200 else f"{self.status} {self.code}"

    def vectors(self) -> Vectors:
        """[inputs, width], in order, of a reply with base64."""
        return vectors_of(item["embedding"] for item in self.json()["data"])


def vectors_of(encoded: Any) -> Vectors:
    """The rows of several vectors in base64."""
    return np.array([np.frombuffer(base64.b64decode(each), "<f4") for each in encoded])


class Wire:
    """One keep-alive connection. Raises OSError (TimeoutError when late), EOFError when the other side closes."""

    def __init__(self, address: Address, timeout_s: float = REPLY_S) -> None:
        self._timeout_s = timeout_s
        family = socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(address) if isinstance(address, Path) else address)
        except OSError:
            self._socket.close()
            raise
        if family == socket.AF_INET:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, request: bytes) -> Reply:
        """Send all, read one reply; the deadline is for both together."""
        return self.receive(self.send(request))

    def timed(self, request: bytes) -> tuple[float, Reply]:
        """As `ask`, with the seconds that it took."""
        begun = time.perf_counter()
        reply = self.ask(request)
        return time.perf_counter() - begun, reply

    def send(self, data: bytes) -> float:
        """Send bytes of any kind. Returns the deadline of their reply, on the monotonic clock."""
        deadline = time.monotonic() + self._timeout_s
        self._socket.settimeout(self._timeout_s)
        self._socket.sendall(data)
        return deadline

    def receive(self, deadline: float) -> Reply:
        """One whole reply with a Content-Length. Raises EOFError if the connection ends before its last byte."""
        data = b""
        while (end := data.find(HEAD_END)) < 0:
            data += self._read(deadline)
        first, *lines = data[:end].decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        chunks, missing = [data[end + 4 :]], int(headers["content-length"]) - (len(data) - end - 4)
        while missing > 0:
            chunks.append(self._read(deadline))
            missing -= len(chunks[-1])
        return Reply(int(first.split(" ", 2)[1]), headers, b"".join(chunks))

    def read_some(self) -> bytes:
        """The first bytes that come."""
        return self._read(time.monotonic() + self._timeout_s)

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def __enter__(self) -> "Wire":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, deadline: float) -> bytes:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("the reply is late")
        self._socket.settimeout(remaining_s)
        data = self._socket.recv(RECV_BYTES)
        if not data:
            raise EOFError("the connection was closed before the reply's last byte")
        return data


class AsyncClient:
    """Requests to one server with one key, on as many kept connections as they need."""

    def __init__(self, port: int, key: str, host: str = HOST) -> None:
        self._pool = tcp_pool(host, port)
        self._key = key

    async def ask(self, method: str, path: str, body: bytes = b"") -> Reply:
        """One request. Raises NodeFailure where no reply comes."""
        request = http_request(method, path, body, key=self._key)
        reply = await self._pool.exchange(lambda: request, REPLY_BYTES_MAX)
        headers = {name.decode(): value.decode("latin-1") for name, value in reply.headers.items()}
        return Reply(reply.status, headers, reply.body)

    def close(self) -> None:
        """Hang up."""
        self._pool.close()


def http_request(
    method: str, path: str, body: bytes = b"", *, key: str | None = None, headers: Mapping[str, str] | None = None
) -> bytes:
    """A whole HTTP/1.1 request; the body is JSON unless `headers` says otherwise."""
    fields = {"Host": "localhost", "Content-Length": str(len(body)), "Content-Type": "application/json"}
    if key is not None:
        fields["Authorization"] = f"Bearer {key}"
    fields |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode() + HEAD_END + body


def embedding_request(
    given: Any, *, key: str | None = None, path: str = "/v1/embeddings", model: str = MODEL, **more: Any
) -> bytes:
    """A whole request for embeddings of `given`, in base64 unless `more` says otherwise."""
    fields = {"model": model, "input": given, "encoding_format": "base64", **more}
    return http_request("POST", path, msgspec.json.encode(fields), key=key)
