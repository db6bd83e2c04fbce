"""Other people's 318 cases for JSON parsers, sent to the gateway over real HTTP: RFC 8259, no more and no less."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.receive import BodyBudget
from tests.data import outside_data
from tests.flow.world import ScriptedNodes, make_world
from tests.http.raw import Raw, read_reply, request, serving

SUITE = "json_test_suite"
CASES = 318  # of all three verdicts
REPLY_S = 5.0
BODIES_BYTES = 10**8


@asynccontextmanager
async def gateway(nodes: ScriptedNodes) -> AsyncIterator[tuple[GatewayApp, int]]:
    """The real gateway over scripted nodes, on a port."""
    world = make_world(nodes)
    app = GatewayApp(world, world.fleet.registry, in_flight_max=8, bodies=BodyBudget(BODIES_BYTES), gauges=dict)
    async with serving(app.server) as port:
        yield app, port


async def answers(bodies: Mapping[str, bytes]) -> dict[str, Raw]:
    """What the gateway says to each body, all on one connection: none of them may break it."""
    async with gateway(ScriptedNodes()) as (app, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        said = {}
        for name, body in bodies.items():
            writer.write(request(body=body))
            async with asyncio.timeout(REPLY_S):
                said[name] = await read_reply(reader)
        writer.close()
        assert app.metrics.internal_errors._value.get() == 0
        return said


def cases() -> dict[str, bytes]:
    found = {path.name: path.read_bytes() for path in outside_data(SUITE).glob("*.json")}
    assert len(found) == CASES
    return found


def is_right(name: str, reply: Raw) -> bool:
    """Whether the verdict that the name's first letter asks for was given."""
    if reply.status == 200:
        return not name.startswith("n_")
    error = reply.error
    refused_as_json = (reply.status, error["code"]) == (400, "invalid_json")
    enveloped = set(error) == {"message", "type", "param", "code"} and bool(reply.headers["x-request-id"])
    verdict = {"y": not refused_as_json, "n": refused_as_json, "i": True}[name[0]]
    return enveloped and reply.status in (400, 404) and verdict


@pytest.mark.parametrize(
    ("before", "after"),
    [(b"", b""), (b'{"model":"tiny","input":', b"}"), (b'{"input":"a","model":"tiny","user":', b"}")],
    ids=["as the body", "as the input", "as the user"],
)
async def test_every_case_gets_the_right_verdict(before: bytes, after: bytes) -> None:
    said = await answers({name: before + content + after for name, content in cases().items()})
    wrong = {name: (reply.status, reply.body[:200]) for name, reply in said.items() if not is_right(name, reply)}
    assert wrong == {}


async def test_the_suite_reaches_the_vectors() -> None:
    """Among the right documents are strings: as the input they are embedded, so not all of the above is refusals."""
    bodies = {name: b'{"model":"tiny","input":' + content + b"}" for name, content in cases().items()}
    said = await answers(bodies)
    embedded = [name for name, reply in said.items() if reply.status == 200]
    assert len(embedded) > 10
    assert not [name for name in embedded if name.startswith("n_")]
