"""A cheap node that signs what it says, or does not: `python -m bench.gateway.node PATH signed|plain VECTOR MODELS`.

`ends` cannot sign. Both forms are this same process, so that what differs is the signatures alone. It speaks as a real
node does, by the same code: only the engine is not there.
"""

import asyncio
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import uvloop

from embedmesh.http.receive import BodyBudget
from embedmesh.http.server import HttpServer
from embedmesh.node.app import CompactDone
from embedmesh.node.compact_path import CompactPath
from embedmesh.rules.clock import SystemClock
from embedmesh.rules.embeddings import EmbedIds, EmbedVectors, unpack_ids
from embedmesh.signing.messages import CheckedRequest, RequestChecker
from embedmesh.signing.session import Session

SESSION = Session("0123456789abcdef", bytes(range(32)))  # both sides know it: the bench is about cost
NODE_ID = "node_" + 32 * "0"
SPECIALS = 2
DRAIN_S = 0.1


class CheapNode:
    """Answers with the same vector for every input."""

    def __init__(self, vector: bytes, models: bytes) -> None:
        self._vector, self._models = vector, models

    def begin_compact(self, body: bytes, done: CompactDone) -> Callable[[], object]:
        """The compact form."""
        ids = unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds))
        tokens = sum(len(each) + SPECIALS for each in ids)
        reply = msgspec.msgpack.encode(EmbedVectors(tokens, self._vector * len(ids)))
        return asyncio.get_running_loop().call_soon(done, reply, tokens).cancel

    def list_bytes(self) -> bytes:
        """What it serves."""
        return self._models


class Signs:
    """As a node's signed API does, without receipts."""

    def __init__(self) -> None:
        self._clock = SystemClock()
        self._checker = RequestChecker(NODE_ID)
        self._checker.add(SESSION, self._now_s())

    def check_head(self, method: str, path: str, headers: Mapping[str, str]) -> CheckedRequest:
        """Before its body is there."""
        return self._checker.check_head(method, path, headers, self._now_s())

    def check_body(self, checked: CheckedRequest, body: bytes) -> None:
        """Accept the request, once."""
        checked.check_body(body, self._now_s())

    def sign(self, checked: CheckedRequest, reply: bytes, tokens: int) -> list[tuple[str, str]]:
        """The headers of a reply."""
        return checked.sign_reply(200, reply, 0, self._now_s())

    def _now_s(self) -> int:
        return self._clock.unix_ms() // 1000


async def serve(path: str, node: CheapNode, signed: bool) -> None:
    """Until it is cancelled."""
    fast_path = CompactPath(node, BodyBudget(1 << 30), Signs() if signed else None)
    server = HttpServer({}, fast_path=fast_path)
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(path)
    await server.start(sock)
    try:
        await asyncio.Event().wait()
    finally:
        await server.drain(DRAIN_S)


if __name__ == "__main__":
    path, form, vector, models = sys.argv[1:]
    reply = Path(models).read_bytes()
    node = CheapNode(Path(vector).read_bytes(), reply.partition(b"\r\n\r\n")[2])
    uvloop.run(serve(path, node, form == "signed"))
