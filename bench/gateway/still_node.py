"""A node that answers all that it was asked, at once, when it is told to: in the caller's thread, without a task.

So a gateway that is counted does the same from run to run, however busy the machine is: nothing comes to it while it
works. The form is that of a real node (see embedmesh.node.compact_path), signed or not.
"""

import re
import socket
from pathlib import Path

import msgspec

from bench.gateway.node import SPECIALS, Signs
from embedmesh.node.compact_path import SIGNED, SIGNED_HEADERS, UNSIGNED
from embedmesh.rules.embeddings import EMBED_HEAD, VECTORS_HEAD, EmbedIds, EmbedVectors, unpack_ids

BACKLOG = 256
RECV_BYTES = 1 << 20
HEAD_END = b"\r\n\r\n"
LENGTH = re.compile(rb"Content-Length: (\d+)")


class StillNode:
    """Listens at a path. Every input gets the same vector."""

    def __init__(self, path: Path, vector: bytes, *, signed: bool) -> None:
        self._vector = vector
        self._signs = Signs() if signed else None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(BACKLOG)
        self._listener.setblocking(False)
        self._connections: list[socket.socket] = []
        self._asked: dict[socket.socket, bytes] = {}

    def is_asked(self) -> bool:
        """Whether anything has come that is not answered."""
        while True:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                break
            connection.setblocking(False)
            self._connections.append(connection)
        for connection in self._connections:
            try:
                data = connection.recv(RECV_BYTES)
            except BlockingIOError:
                continue
            if data:
                self._asked[connection] = self._asked.get(connection, b"") + data
        return any(map(_is_whole, self._asked.values()))

    def answer(self) -> None:
        """All that has come."""
        whole = [(connection, data) for connection, data in self._asked.items() if _is_whole(data)]
        for connection, reply in [(connection, self._reply(data)) for connection, data in whole]:
            del self._asked[connection]
            connection.setblocking(True)
            connection.sendall(reply)
            connection.setblocking(False)

    def close(self) -> None:
        """Hang up."""
        for each in (self._listener, *self._connections):
            each.close()

    def _reply(self, request: bytes) -> bytes:
        head = (SIGNED if self._signs is not None else UNSIGNED).match(request, len(EMBED_HEAD))
        assert head is not None and request.startswith(EMBED_HEAD), "the gateway has another form now"
        *headers, _, _ = head.groups()
        body = request[head.end() :]
        ids = unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds))
        tokens = sum(len(each) + SPECIALS for each in ids)
        reply = msgspec.msgpack.encode(EmbedVectors(tokens, self._vector * len(ids)))
        lines = b""
        if self._signs is not None:
            named = dict(zip(SIGNED_HEADERS, [value.decode("ascii") for value in headers], strict=True))
            checked = self._signs.check_head("POST", "/v1/embeddings", named)
            self._signs.check_body(checked, body)
            signed = self._signs.sign(checked, reply, tokens)
            lines = "".join(f"{name}: {value}\r\n" for name, value in signed).encode("ascii")
        return VECTORS_HEAD + b"%d\r\n%b\r\n" % (len(reply), lines) + reply


def _is_whole(request: bytes) -> bool:
    head, end, body = request.partition(HEAD_END)
    length = LENGTH.search(head)
    return bool(end) and length is not None and len(body) == int(length[1])
