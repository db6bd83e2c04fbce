"""A key with a limit of requests at one time: a request has its slot from before its money is held until that ends."""

import asyncio
from typing import Any

import pytest

from embedmesh.flow.paid import serve
from embedmesh.rules.errors import Failure, NodeBroke, RateLimited
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from tests.flow.world import EMBEDDINGS, POOR_SINGLE_KEY, SINGLE_KEY, ScriptedNodes, ScriptedWorld, make_world

BODY = b'{"model":"tiny","input":"abc"}'
COST = 8
PLACE = "key_7"


async def ask(
    world: ScriptedWorld,
    *,
    api_key: str = SINGLE_KEY,
    key: str | None = None,
    retries: int | None = None,
    how: Delivery | BaseException = Delivery.WHOLE,
) -> None:
    async def receive(account_id: str) -> bytes:
        return BODY

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert world.slots.in_use[PLACE] == 1
        await asyncio.sleep(0)
        if isinstance(how, BaseException):
            raise how
        return how

    await serve(world, EMBEDDINGS, RequestHead(f"Bearer {api_key}", key, retries), receive, deliver)


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("how", [Delivery.WHOLE, Delivery.BROKEN_OFF, ConnectionResetError("the caller went")])
async def test_a_slot_is_had_until_the_delivery_is_over(key: str | None, how: Delivery | BaseException) -> None:
    """However it ends: charged or not."""
    world = make_world()
    await asyncio.gather(ask(world, key=key, how=how), return_exceptions=True)
    assert world.ledger.log[0] == ("hold", COST)
    assert world.slots.in_use[PLACE] == 0


@pytest.mark.parametrize("how", [Delivery.WHOLE, ConnectionResetError("the caller went")])
async def test_with_a_slot_money_comes_from_a_tab(how: Delivery | BaseException) -> None:
    """Where there is one; the slot is given back as with a hold of its own."""
    world = make_world()
    world.ledger.tabs = True
    await asyncio.gather(ask(world, how=how), return_exceptions=True)
    assert [what for what, _ in world.ledger.log] == ["spend", "capture" if how is Delivery.WHOLE else "release"]
    assert world.slots.in_use[PLACE] == 0


@pytest.mark.parametrize("key", [None, "k"])
async def test_what_fails_gives_its_slot_back(key: str | None) -> None:
    """At a node, or for want of money."""
    world = make_world(ScriptedNodes(NodeBroke("broke"), NodeBroke("broke"), NodeBroke("broke")))
    for api_key in (SINGLE_KEY, POOR_SINGLE_KEY):
        with pytest.raises(Failure):
            await ask(world, api_key=api_key, key=key)
        assert world.slots.in_use[PLACE] == 0


@pytest.mark.parametrize("key", [None, "k"])
@pytest.mark.parametrize("steps", range(12))
async def test_who_leaves_gives_its_slot_back(key: str | None, steps: int) -> None:
    """At whichever step."""
    world = make_world()
    asking = asyncio.ensure_future(ask(world, key=key))
    for _ in range(steps):
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    assert world.slots.in_use[PLACE] == 0


class Slow(ScriptedNodes):
    """Answers when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()

    async def embed(self, *arguments: Any) -> Any:
        await self.gate.wait()
        return await super().embed(*arguments)


@pytest.mark.parametrize("key", [None, "l"])
async def test_without_a_slot_no_money_is_held(key: str | None) -> None:
    """With an Idempotency-Key, whose first holder may be paid already, what was held is released at once."""
    world = make_world(client := Slow())
    first = asyncio.ensure_future(ask(world, key="k"))
    await asyncio.sleep(0.01)
    with pytest.raises(RateLimited, match="all slots are in use"):
        await ask(world, key=key)
    assert world.slots.waited == 1
    assert world.ledger.log[1:] == ([("hold", COST), ("release", COST)] if key else [])
    client.gate.set()
    await first
    await ask(world, key=key)
    assert world.slots.in_use[PLACE] == 0


async def test_who_waits_for_another_request_needs_no_slot() -> None:
    """The same Idempotency-Key again, while the first is under way: one work, one slot, one charge."""
    world = make_world(client := Slow())
    asking = [asyncio.ensure_future(ask(world, key="k")) for _ in range(3)]
    await asyncio.sleep(0.05)
    client.gate.set()
    await asyncio.gather(asking[0])
    assert world.slots.in_use[PLACE] == 0
    world.slots.in_use[PLACE] = 1  # another request: those that waited are not in its way
    await asyncio.gather(*asking)
    assert [what for what, _ in world.ledger.log] == ["hold", "capture"]


async def test_a_retry_that_joins_its_twin_needs_no_slot() -> None:
    """What goes on after its caller has left is under way still."""
    world = make_world(client := Slow())
    first = asyncio.ensure_future(ask(world, retries=0))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert world.slots.in_use[PLACE] == 1
    again = asyncio.ensure_future(ask(world, retries=1))
    await asyncio.sleep(0.01)
    client.gate.set()
    await again
    assert world.slots.in_use[PLACE] == 0
    assert [what for what, _ in world.ledger.log] == ["hold", "capture"]
