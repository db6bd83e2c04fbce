"""A caller of streams on a socket of its own: it reads byte by byte, hangs up where it likes, resets, stops reading."""

import json
import socket
import struct
from collections.abc import Iterator
from typing import Any

from bench.rig.http import http_request

LINGER_NOT = struct.pack("ii", 1, 0)
RECV_BYTES = 64 * 1024
DONE = b"data: [DONE]\n\n"


class CutOff(Exception):
    """The stream has ended without the end of its HTTP body."""


class Caller:
    """One request, and its reply as it comes. Header names are in lower case. Close it."""

    def __init__(
        self,
        address: tuple[str, int],
        key: str,
        path: str,
        body: dict[str, Any],
        *,
        timeout_s: float = 30.0,
        receive_bytes: int | None = None,
        **headers: str,
    ) -> None:
        """`receive_bytes` is how much the kernel may keep that was not read."""
        self.sock = socket.socket()
        if receive_bytes is not None:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.sock.settimeout(timeout_s)
        self.sock.connect(address)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._had = b""
        self.sock.sendall(http_request("POST", path, json.dumps(body).encode(), key=key, headers=headers))

    def head(self) -> tuple[int, dict[str, str]]:
        """The status and the headers."""
        first, *lines = self._until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines if line)}
        return int(first.split(" ")[1]), self.headers

    def chunk(self) -> bytes | None:
        """The next HTTP chunk, which is one write of the gateway; None after the last. Raises CutOff."""
        size = int(self._until(b"\r\n"), 16)
        while len(self._had) < size + 2:
            self._more()
        data, self._had = self._had[:size], self._had[size + 2 :]
        return data or None

    def chunks(self) -> Iterator[bytes]:
        """All that are left."""
        while (data := self.chunk()) is not None:
            yield data

    def body(self) -> bytes:
        """Of a reply with a length."""
        size = int(self.headers["content-length"])
        while len(self._had) < size:
            self._more()
        return self._had

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close by a TCP reset."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_NOT)
        self.sock.close()

    def __enter__(self) -> "Caller":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._had:
            self._more()
        found, _, self._had = self._had.partition(mark)
        return found

    def _more(self) -> None:
        try:
            data = self.sock.recv(RECV_BYTES)
        except ConnectionResetError:
            data = b""
        if not data:
            raise CutOff
        self._had += data


def event_of(chunk: bytes) -> dict[str, Any]:
    """The JSON of a write that is one event."""
    assert chunk.startswith(b"data: {") and chunk.endswith(b"}\n\n") and chunk.count(b"\n\n") == 1, chunk
    made: dict[str, Any] = json.loads(chunk[6:])
    return made


def events_of(chunks: Iterator[bytes]) -> list[dict[str, Any]]:
    """All events of a whole stream, which must end as it should: with [DONE], by itself."""
    *events, last = chunks
    assert last == DONE, last
    return [event_of(each) for each in events]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """What they say, of one answer."""
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)
