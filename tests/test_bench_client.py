"""The parts of the bench of the client: its node tells texts apart, its targets compare what they say."""

import asyncio

import msgspec
import numpy as np

from bench.client.__main__ import BASETEN, CHEAP, NAMES, OPENAI, OURS, OURS_STREAM, REAL, Figures, Row, targets_of
from bench.client.drive import CLIENTS
from bench.client.node import TableNode
from bench.rig.figures import Spread
from embedmesh.rules.embeddings import EmbedVectors, pack_ids


def row(client: str, per_s: float, node: str = CHEAP, wrong: int = 0) -> Row:
    flat = Spread.of([1.0])
    return Row(node, client, Spread.of([per_s]), flat, flat, flat, wrong)


def test_targets_are_of_the_node_that_costs_nothing() -> None:
    rows = [row(OPENAI, 100), row(BASETEN, 200), row(OURS, 190), row(OURS_STREAM, 1), row(OURS, 9, REAL)]
    found = {target.what: target for target in targets_of(rows)}
    assert [found[f"texts/s over {peer}'s, same requests"].verdict for peer in ("openai", "baseten")] == [
        "reached",
        "missed",
    ]
    assert found["texts/s over baseten's, as both come"].verdict == "not measured"
    assert found["memory of a stream"].verdict == "reached"


async def test_the_node_tells_texts_apart_and_knows_them_again() -> None:
    rows = [np.full(3, number, "<f4").tobytes() for number in range(50)]
    node = TableNode(rows, b"{}")
    replies: asyncio.Queue[bytes | Exception] = asyncio.Queue()
    ids = [[7, 8, 9], [1, 2], [7, 8, 9], [3]]
    body = msgspec.msgpack.encode(pack_ids("m", ids))
    node.begin_compact(body, lambda reply, tokens: replies.put_nowait(reply))
    answer = await replies.get()
    assert isinstance(answer, bytes)
    reply = msgspec.msgpack.decode(answer, type=EmbedVectors)
    found = np.frombuffer(reply.data, "<f4").reshape(4, 3)
    assert np.array_equal(found[0], found[2]) and len(np.unique(found[:, 0])) == 3


def test_a_wrong_vector_breaks_the_bench() -> None:
    figures = Figures(1, 1, 1, [row(OURS, 1), row(OPENAI, 1, wrong=3)], {}, [])
    assert figures.broken == ["openai: 3 wrong vectors"]
    assert set(NAMES) == set(CLIENTS)
