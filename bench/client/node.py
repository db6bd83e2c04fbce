"""A cheap node with a vector for every text: `python -m bench.client.node PATH TABLE MODELS`.

It speaks as a real node does, and chooses one of some thousand vectors by a text's ids: what a client puts into the
wrong row is noticed, and yet the client and the gateway are what is measured.
"""

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import uvloop

from bench.gateway.node import SPECIALS, CheapNode, serve
from embedmesh.node.app import CompactDone
from embedmesh.rules.embeddings import EmbedIds, EmbedVectors, unpack_ids


class TableNode(CheapNode):
    """`rows` are the vectors as bytes."""

    def __init__(self, rows: list[bytes], models: bytes) -> None:
        super().__init__(rows[0], models)
        self._rows = rows

    def begin_compact(self, body: bytes, done: CompactDone) -> Callable[[], object]:
        """The compact form."""
        ids = unpack_ids(msgspec.msgpack.decode(body, type=EmbedIds))
        tokens = sum(len(each) + SPECIALS for each in ids)
        rows = self._rows
        vectors = b"".join([rows[(31 * each[0] + 7 * each[-1] + each[len(each) // 2]) % len(rows)] for each in ids])
        reply = msgspec.msgpack.encode(EmbedVectors(tokens, vectors))
        return asyncio.get_running_loop().call_soon(done, reply, tokens).cancel


if __name__ == "__main__":
    path, table, models = sys.argv[1:]
    rows = [row.tobytes() for row in np.load(table)]
    uvloop.run(serve(path, TableNode(rows, Path(models).read_bytes()), signed=False))
