"""A refused request's body is let go of with its reply: no cycle of frames and failures keeps it for a collection."""

import asyncio
import gc

import pytest

from embedmesh.gateway.api.app import GatewayApp
from embedmesh.http.receive import BodyBudget
from embedmesh.rules.errors import Failure
from tests.flow.world import ScriptedNodes, make_world
from tests.http.raw import read_reply, request, serving

BODIES = {
    "refused when it is validated": b'{"model":"none","input":"a"}',
    "refused when it is counted": b'{"model":"tiny","input":"' + b"a" * 9_000 + b'"}',
    "refused when it is counted elsewhere": b'{"model":"tiny","input":"' + b"a" * 100_000 + b'"}',
    "no JSON": b"{" * 100_000,
    "by the general server": b'{"model":"none","input":"' + b"a" * 300_000 + b'"}',
}


@pytest.mark.parametrize("why", BODIES)
async def test_nothing_of_a_refused_request_waits_for_a_collection(why: str) -> None:
    world = make_world(ScriptedNodes())
    app = GatewayApp(world, world.fleet.registry, in_flight_max=8, bodies=BodyBudget(10**8), gauges=dict)
    async with serving(app.server) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for tried in range(2):
            if tried:
                gc.collect()
                gc.freeze()  # what a thousand tests before this one have left need not be looked at twice more
                gc.disable()
                gc.set_debug(gc.DEBUG_SAVEALL)
            try:
                writer.write(request(body=BODIES[why]))
                assert (await read_reply(reader)).status in (400, 404)
                await asyncio.sleep(0)
                gc.collect()
                kept = [type(each).__name__ for each in gc.garbage if isinstance(each, Failure)]
            finally:
                gc.set_debug(0)
                gc.garbage.clear()
                gc.enable()
        assert kept == []
        writer.close()
