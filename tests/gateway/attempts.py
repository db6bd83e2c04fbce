"""Attempts that begin at once, as tests make them."""

import asyncio

from embedmesh.gateway.nodes.own import OwnLink
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Attempt, NodeClient, Part
from tests.flow.world import MODEL


class Asked:
    """Who began an attempt; a future of what it is told. Told twice, it is an error."""

    def __init__(self) -> None:
        self.told: asyncio.Future[EmbedVectors] = asyncio.get_running_loop().create_future()

    def answered(self, vectors: EmbedVectors) -> None:
        self.told.set_result(vectors)

    def failed(self, failure: NodeFailure) -> None:
        self.told.set_exception(failure)


def ask(client: NodeClient | OwnLink, asked: Asked, ids: list[list[int]], node_id: str = "n0") -> Attempt | None:
    """Begin an attempt."""
    lengths = [len(each) + 2 for each in ids]
    part = Part(node_id, tuple(range(len(ids))), sum(lengths), 0.1)
    link = client if isinstance(client, OwnLink) else client.link_to(node_id)
    assert link is not None
    attempt = link.ask(part, MODEL, Counted(lengths=lengths, ids=ids), "req_1", asked)
    assert not asked.told.done(), "not from inside of the call"
    return attempt


async def at_once(client: NodeClient | OwnLink, ids: list[list[int]], node_id: str = "n0") -> EmbedVectors:
    """What becomes of an attempt that begins at once."""
    asked = Asked()
    assert ask(client, asked, ids, node_id) is not None
    async with asyncio.timeout(5):
        return await asked.told
