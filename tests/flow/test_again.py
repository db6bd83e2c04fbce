"""The same request again: with an Idempotency-Key, or as an SDK's retry. One charge, one reply."""

import asyncio
import json

import pytest

from embedmesh.flow.again import KEPT_ACCOUNT_BYTES_MAX, LINGER_S, Asked
from embedmesh.flow.handle import World, handle
from embedmesh.rules.errors import Failure, NodeBroke
from embedmesh.rules.ports import Reply
from tests.flow.world import GOOD_KEY, METERED_KEY, NARROW_KEY, ScriptedNodes, make_world

BODY = b'{"model":"tiny","input":"abc"}'
OTHER_BODY = b'{"model":"tiny","input":"abd"}'
COST = 8


async def ask(
    world: World,
    body: bytes = BODY,
    *,
    api_key: str = GOOD_KEY,
    key: str | None = None,
    retries: int | None = None,
    lost: bool = False,
) -> Reply:
    """The reply; ConnectionResetError where it was `lost` on its way."""
    delivered: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return body

    async def deliver(reply: Reply) -> None:
        if lost:
            raise ConnectionResetError("the caller went")
        delivered.append(reply)

    await handle(world, Asked(f"Bearer {api_key}", key, retries), receive, deliver)
    return delivered[0]


def charges(world: World) -> int:
    return sum(what == "capture" for what, _ in world.ledger.log)


# -- with a key --------------------------------------------------------------------------------------------------------


async def test_a_key_gives_the_same_reply_and_no_second_charge() -> None:
    """Byte for byte; the second says that it is one."""
    world = make_world()
    first, second = await ask(world, key="k"), await ask(world, key="k")
    assert second.body == first.body
    assert second.headers["x-embedmesh-cost-nanousd"] == first.headers["x-embedmesh-cost-nanousd"]
    assert "idempotent-replayed" not in first.headers and second.headers["idempotent-replayed"] == "true"
    assert world.ledger.log == [("hold", COST), ("capture", COST)]
    assert len(world.client.asked) == 1


async def test_another_key_is_another_request() -> None:
    world = make_world()
    await ask(world, key="k")
    await ask(world, key="l")
    assert charges(world) == 2


async def test_the_same_key_with_another_body_is_a_conflict() -> None:
    """Whether the first is done or under way."""
    world = make_world()
    await ask(world, key="k")
    with pytest.raises(Failure) as refused:
        await ask(world, OTHER_BODY, key="k")
    assert refused.value.code == "idempotency_conflict"
    assert charges(world) == 1


async def test_who_comes_while_the_first_runs_waits_for_its_reply() -> None:
    world = make_world()
    gate, embed = asyncio.Event(), world.client.embed

    async def slow(*arguments):
        await gate.wait()
        return await embed(*arguments)

    world.client.embed = slow
    first, second = asyncio.create_task(ask(world, key="k")), asyncio.create_task(ask(world, key="k"))
    await asyncio.sleep(0.05)
    assert not first.done() and not second.done()
    gate.set()
    assert (await first).body == (await second).body
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


async def test_who_waits_for_one_that_fails_takes_its_place() -> None:
    world = make_world(ScriptedNodes(*[NodeBroke("x")] * 1, None), nodes=1)
    embed = world.client.embed

    async def slow(*arguments):
        await asyncio.sleep(0.03)
        return await embed(*arguments)

    world.client.embed = slow
    first = asyncio.create_task(ask(world, key="k"))
    await asyncio.sleep(0.01)
    second = await ask(world, key="k")
    with pytest.raises(Failure):
        await first
    assert json.loads(second.body)["usage"]["total_tokens"] == 5
    assert charges(world) == 1


async def test_a_reply_that_was_not_delivered_is_not_kept() -> None:
    """Nobody was charged for it: the next one is done anew."""
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, key="k", lost=True)
    await ask(world, key="k")
    assert [what for what, _ in world.ledger.log] == ["hold", "release", "hold", "capture"]


async def test_who_waits_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    world.client.embed = lambda *arguments: asyncio.Event().wait()
    first = asyncio.create_task(ask(world, key="k"))
    await asyncio.sleep(0)
    second = asyncio.create_task(ask(world, key="k"))
    await asyncio.sleep(0.03)
    world.clock.now += 10_000
    with pytest.raises(Failure, match="still under way"):
        await second
    first.cancel()


@pytest.mark.parametrize("key", ["", "k" * 256])
async def test_a_key_that_is_none_is_refused(key: str) -> None:
    with pytest.raises(Failure, match="1 to 255"):
        await ask(make_world(), key=key)


async def test_a_reply_that_cannot_be_kept_is_refused_before_money_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too large a one, or where too many are kept: with the key alone; without it the request is taken."""
    world = make_world()
    world.ledger.kept = KEPT_ACCOUNT_BYTES_MAX
    with pytest.raises(Failure) as full:
        await ask(world, key="k")
    assert (full.value.code, full.value.retry_after_s) == ("rate_limit_exceeded", 3_600)
    world.ledger.kept = 0
    monkeypatch.setattr("embedmesh.flow.again.KEPT_REPLY_BYTES_MAX", 15)
    with pytest.raises(Failure, match="leave the key out") as large:
        await ask(world, key="k")
    assert large.value.code == "invalid_value"
    assert world.ledger.log == []
    await ask(world)


# -- an SDK's retries --------------------------------------------------------------------------------------------------


class Gate:
    """Nodes that answer once they may."""

    def __init__(self, world: World) -> None:
        self.open = asyncio.Event()
        self._embed = world.client.embed
        world.client.embed = self

    async def __call__(self, *arguments):
        await self.open.wait()
        return await self._embed(*arguments)


async def test_a_retry_attaches_to_its_twin() -> None:
    """One call of a node, one charge, two replies."""
    world = make_world()
    gate = Gate(world)
    first = asyncio.create_task(ask(world, retries=0))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(world, retries=1))
    await asyncio.sleep(0.01)
    gate.open.set()
    assert (await first).body == (await second).body
    assert world.ledger.log == [("hold", COST), ("capture", COST)]
    assert len(world.client.asked if hasattr(world.client, "asked") else [1]) == 1


async def test_a_retry_finds_the_work_whose_caller_has_gone() -> None:
    """It goes on for a little; whoever gets the reply is charged, once."""
    world = make_world()
    gate = Gate(world)
    first = asyncio.create_task(ask(world, retries=0))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    assert world.ledger.log == [("hold", COST)]
    second = asyncio.create_task(ask(world, retries=1))
    await asyncio.sleep(0.01)
    gate.open.set()
    await second
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


async def test_a_reply_that_was_lost_is_there_for_the_retry() -> None:
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=0, lost=True)
    await ask(world, retries=1)
    await ask(world, retries=2)  # the one before was delivered: this is another
    assert [what for what, _ in world.ledger.log] == ["hold", "capture", "hold", "capture"]


@pytest.mark.parametrize(
    "other",
    [{"body": OTHER_BODY}, {"api_key": METERED_KEY}, {"retries": 0}, {"retries": None}],
)
async def test_what_is_no_retry_of_it_is_another_request(other: dict[str, object]) -> None:
    """Another body or key; a first try, or one without an SDK's word."""
    world = make_world()
    gate = Gate(world)
    first = asyncio.create_task(ask(world, retries=0))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(world, **{"retries": 1, **other}))
    await asyncio.sleep(0.01)
    gate.open.set()
    await asyncio.gather(first, second)
    assert charges(world) == 2


@pytest.mark.parametrize("done", [False, True])
async def test_work_that_nobody_comes_back_for_is_released(monkeypatch: pytest.MonkeyPatch, done: bool) -> None:
    """Under way or done, once the time is over; what was given up is not found by a later retry."""
    monkeypatch.setattr("embedmesh.flow.again.LINGER_S", 0.02)
    assert LINGER_S >= 1.0
    world = make_world()
    gate = Gate(world)
    if done:
        gate.open.set()
        with pytest.raises(ConnectionResetError):
            await ask(world, retries=0, lost=True)
    else:
        first = asyncio.create_task(ask(world, retries=0))
        await asyncio.sleep(0.005)
        first.cancel()
    await asyncio.sleep(0.05)
    assert world.ledger.log == [("hold", COST), ("release", COST)]
    gate.open.set()
    await ask(world, retries=1)
    assert charges(world) == 1


async def test_a_failure_is_told_to_all_and_remembered_by_nobody() -> None:
    world = make_world(ScriptedNodes(NodeBroke("x"), None))
    gate = Gate(world)
    first, second = asyncio.create_task(ask(world, retries=0)), None
    await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(world, retries=1))
    await asyncio.sleep(0.01)
    gate.open.set()
    outcomes = await asyncio.gather(first, second, return_exceptions=True)
    assert all(isinstance(outcome, Failure) for outcome in outcomes)
    await ask(world, retries=2)
    assert [what for what, _ in world.ledger.log] == ["hold", "release", "hold", "capture"]


async def test_a_failure_that_nobody_heard_is_not_told_to_the_retry() -> None:
    """The work failed after its caller had gone: the retry is tried anew."""
    world = make_world(ScriptedNodes(NodeBroke("x"), None))
    gate = Gate(world)
    first = asyncio.create_task(ask(world, retries=0))
    await asyncio.sleep(0.01)
    first.cancel()
    await asyncio.sleep(0.01)
    gate.open.set()
    await asyncio.sleep(0.02)
    await ask(world, retries=1)
    assert [what for what, _ in world.ledger.log] == ["hold", "release", "hold", "capture"]


async def test_when_the_gateway_ends_nothing_lingers() -> None:
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=0, lost=True)
    await world.twins.stop()
    assert world.ledger.log == [("hold", COST), ("release", COST)]


async def test_too_many_do_not_linger(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is over the bound is given up at once."""
    monkeypatch.setattr("embedmesh.flow.again.LINGERING_MAX", 1)
    world = make_world()
    for body in (BODY, OTHER_BODY):
        with pytest.raises(ConnectionResetError):
            await ask(world, body, retries=0, lost=True)
    assert [what for what, _ in world.ledger.log] == ["hold", "hold", "release"]
    await world.twins.stop()


# -- keys that may not do everything -----------------------------------------------------------------------------------


async def test_a_key_for_other_models_is_told_so() -> None:
    world = make_world()
    with pytest.raises(Failure, match="may not use this model") as refused:
        await ask(world, api_key=NARROW_KEY)
    assert refused.value.code == "insufficient_scope"
    await ask(world, b'{"model":"acme/native","input":[1,2]}', api_key=NARROW_KEY)


async def test_a_key_with_limits_is_told_what_is_left() -> None:
    """On each reply; a key without limits is told nothing."""
    world = make_world()
    reply = await ask(world, api_key=METERED_KEY)
    told = {name: value for name, value in reply.headers.items() if name.startswith("x-ratelimit")}
    assert told == {
        "x-ratelimit-limit-requests": "2",
        "x-ratelimit-remaining-requests": "1",
        "x-ratelimit-reset-requests": "7.000s",
        "x-ratelimit-limit-tokens": "12",
        "x-ratelimit-remaining-tokens": "7",
        "x-ratelimit-reset-tokens": "7.000s",
    }
    assert not any(name.startswith("x-ratelimit") for name in (await ask(world)).headers)


async def test_the_rate_is_looked_at_before_the_body_and_tokens_before_money() -> None:
    world = make_world()
    with pytest.raises(Failure, match="too much"):
        await ask(world, b'{"model":"tiny","input":["abcde","abcde"]}', api_key=METERED_KEY)
    await ask(world, api_key=METERED_KEY)

    async def receive(account_id: str) -> bytes:
        raise AssertionError("the body was read")

    with pytest.raises(Failure) as refused:
        await handle(world, Asked(f"Bearer {METERED_KEY}"), receive, deliver=None)
    assert refused.value.code == "rate_limit_exceeded"
    assert [what for what, _ in world.ledger.log] == ["hold", "capture"]


async def test_a_caller_that_hangs_up_keeps_its_tokens_spent() -> None:
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, api_key=METERED_KEY, lost=True)
    assert world.allowances.taken == {"requests": 1, "tokens": 5}
