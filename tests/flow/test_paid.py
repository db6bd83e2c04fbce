"""The whole story over scripted edges: the order of the steps, and that every hold ends once."""

import asyncio
import json
import random
from collections.abc import Coroutine
from typing import Any

import pytest

from bench.lives.loop import Loop
from embedmesh.fleet.registry import Node
from embedmesh.flow.paid import serve
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import (
    DeadlineExceeded,
    Failure,
    NodeBroke,
    NodeBusy,
    NodeRefused,
    NodeTooSlow,
    NodeUnreachable,
    Overloaded,
    UpstreamRefused,
    WrongAnswer,
)
from embedmesh.rules.exchange import Deliver, Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Part
from embedmesh.rules.holds import Claim, Hold
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from tests.flow.world import (
    EMBEDDINGS,
    GOOD_KEY,
    NATIVE,
    POOR_KEY,
    SCOPELESS_KEY,
    ScriptedNodes,
    ScriptedWorld,
    make_world,
    right_reply,
    undelivered,
)

BODY = b'{"model":"tiny","input":"abc"}'
COST = 8  # five tokens at 1.5 nano-USD each, rounded up


async def ask(
    world: ScriptedWorld, body: bytes = BODY, key: str | None = GOOD_KEY, *, deliver: Deliver | None = None
) -> list[Reply]:
    delivered: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return body

    async def take(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        delivered.append(reply)
        return Delivery.WHOLE

    await serve(world, EMBEDDINGS, RequestHead(f"Bearer {key}" if key else None), receive, deliver or take)
    return delivered


async def test_a_good_request_is_held_answered_delivered_and_then_charged() -> None:
    world = make_world()

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        assert world.ledger.log == [("hold", COST)], "nothing is charged before delivery"
        assert json.loads(reply.body)["usage"]["prompt_tokens"] == 5
        return Delivery.WHOLE

    await ask(world, deliver=deliver)
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


@pytest.mark.parametrize("key", [None, "", "em_unknown", "x" * 600, "em good"])
async def test_a_wrong_key_is_refused_before_the_body_is_read(key: str | None) -> None:
    async def receive(account_id: str) -> bytes:
        raise AssertionError("the body was read")

    with pytest.raises(Failure) as refused:
        await serve(
            make_world(), EMBEDDINGS, RequestHead(f"Bearer {key}" if key is not None else None), receive, undelivered
        )
    assert refused.value.code == "invalid_api_key"


@pytest.mark.parametrize("header", ["em_good", "Basic em_good", "Bearer", "Bearer  ", "em_good Bearer"])
async def test_only_a_bearer_header_identifies(header: str) -> None:
    async def receive(account_id: str) -> bytes:
        raise AssertionError("the body was read")

    with pytest.raises(Failure, match="missing or not valid"):
        await serve(make_world(), EMBEDDINGS, RequestHead(header), receive, undelivered)


async def test_a_key_without_the_scope_is_told_so() -> None:
    with pytest.raises(Failure) as refused:
        await ask(make_world(), key=SCOPELESS_KEY)
    assert refused.value.code == "insufficient_scope"


@pytest.mark.parametrize("body", [b"{", b"{}", b'{"model":"no","input":"a"}', b'{"model":"tiny","input":"abcdefghij"}'])
async def test_a_wrong_request_costs_nothing_and_reaches_no_node(body: bytes) -> None:
    nodes = ScriptedNodes()
    world = make_world(nodes)
    with pytest.raises(Failure):
        await ask(world, body)
    assert world.ledger.log == []
    assert nodes.asked == []


async def test_without_money_no_node_is_asked() -> None:
    nodes = ScriptedNodes()
    with pytest.raises(Failure) as refused:
        await ask(make_world(nodes), key=POOR_KEY)
    assert refused.value.code == "insufficient_quota"
    assert nodes.asked == []


FAILING = [
    # what every node does, what the caller hears
    (NodeBusy("busy"), "overloaded"),
    (NodeBroke("broke"), "no_node_available"),
    (NodeUnreachable("gone"), "no_node_available"),
    (NodeRefused("400"), "bad_node_response"),
    (UpstreamRefused("400"), "bad_node_response"),
    (WrongAnswer("wrong"), "bad_node_response"),
    (NodeTooSlow("slow"), "deadline_exceeded"),
]


@pytest.mark.parametrize(("failure", "code"), FAILING)
async def test_when_every_node_fails_the_caller_is_told_and_not_charged(failure: Failure, code: str) -> None:
    nodes = ScriptedNodes(failure, failure, failure, failure)
    world = make_world(nodes, nodes=4)
    with pytest.raises(Failure) as refused:
        await ask(world)
    assert refused.value.code == code
    assert world.ledger.log == [("hold", COST), ("release", COST)]
    asked = [node_id for node_id, _ in nodes.asked]
    begun = not isinstance(failure, NodeBusy | NodeUnreachable)
    assert len(asked) == (3 if begun else 4), "at most three attempts; who refuses at once has made none"
    assert len(set(asked)) == len(asked), "on distinct nodes"


@pytest.mark.parametrize(("asked_s", "told_s"), [(0.0, 1.0), (7.0, 7.0), (86_400.0, 60.0)])
async def test_a_caller_hears_when_the_last_node_wants_to_be_asked_again(asked_s: float, told_s: float) -> None:
    """Within bounds: other nodes may be free before."""
    nodes = ScriptedNodes(*[NodeBusy("busy", retry_after_s=asked_s)] * 4)
    with pytest.raises(Overloaded) as refused:
        await ask(make_world(nodes, nodes=2))
    assert refused.value.retry_after_s == told_s


async def test_a_second_node_answers_under_the_same_hold() -> None:
    nodes = ScriptedNodes(NodeBroke("broke"), right_reply([[1], [2]]))
    world = make_world(nodes, nodes=3)
    delivered = await ask(world)
    assert len(nodes.asked) == 3, "a broken node and a wrong answer, then a right one"
    assert len(delivered) == 1
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


async def test_with_hedging_the_first_right_answer_is_delivered_and_the_other_is_broken_off() -> None:
    broken_off: list[str] = []

    class OneHangs(ScriptedNodes):
        async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
            if not self.asked:
                self.asked.append((part.node_id, []))
                try:
                    await asyncio.sleep(3_600)
                except asyncio.CancelledError:
                    broken_off.append(part.node_id)
                    raise
            return await super().embed(part, model, counted, request_id)

    nodes = OneHangs()
    world = make_world(nodes, nodes=2)
    scheduler: Any = world.fleet
    scheduler.retries._hedge = True
    delivered = await ask(world)
    assert len(delivered) == 1
    assert [node_id for node_id, _ in nodes.asked][:1] == broken_off
    assert len({node_id for node_id, _ in nodes.asked}) == 2
    assert world.ledger.log == [("hold", COST), ("capture", COST)], "the caller pays once"
    assert [node.load.parts for node in world.fleet.registry] == [0, 0]


async def test_what_no_node_has_ever_served_is_not_told_as_passing() -> None:
    """503 says that trying again may work: so it may where a node has yet to say what it serves, or has served it."""
    world = make_world(nodes=1)
    registry = world.fleet.registry
    registry.answered_right(next(iter(registry)), [NATIVE.id])
    assert await code_of(world) == "no_node_available", "it had served it before"

    world = make_world(nodes=0)
    registry = world.fleet.registry
    node = registry.add(Node("n0", "unix:/nowhere"))
    assert await code_of(world) == "no_node_available", "it may serve it"
    registry.answered_right(node, [NATIVE.id])
    assert await code_of(world) == "model_not_found"
    registry.failed(node, NodeUnreachable("gone"))
    assert await code_of(world) == "model_not_found", "and a node that is down changes nothing about that"
    registry.add(Node("n1", "unix:/nowhere"))
    assert await code_of(world) == "no_node_available", "the new one may serve it"
    assert world.ledger.log == []


async def code_of(world: ScriptedWorld) -> str:
    with pytest.raises(Failure) as refused:
        await ask(world)
    return refused.value.code


async def test_without_a_node_there_is_nothing_to_pay() -> None:
    world = make_world(nodes=0)
    with pytest.raises(Failure) as refused:
        await ask(world)
    assert refused.value.code == "no_node_available"
    assert world.ledger.log == []


@pytest.mark.parametrize("error", [ConnectionResetError(), TimeoutError(), asyncio.CancelledError(), RuntimeError()])
async def test_a_reply_that_is_not_delivered_is_not_charged(error: BaseException) -> None:
    """Nothing of it had left; or it was us who broke it off."""

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        raise error

    world = make_world()
    with pytest.raises(type(error)):
        await ask(world, deliver=deliver)
    assert world.ledger.log == [("hold", COST), ("release", COST)]


async def test_a_reply_that_its_caller_broke_off_is_charged_in_full() -> None:
    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        return Delivery.BROKEN_OFF

    world = make_world()
    await ask(world, deliver=deliver)
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


async def test_a_caller_that_goes_while_a_node_works_is_not_charged_and_leaves_no_load_behind() -> None:
    nodes = ScriptedNodes(asyncio.CancelledError())
    world = make_world(nodes)
    with pytest.raises(asyncio.CancelledError):
        await ask(world)
    assert world.ledger.log == [("hold", COST), ("release", COST)]
    assert [node.load.tokens for node in world.fleet.registry] == [0]


async def test_a_request_ends_before_its_hold_however_loaded_the_fleet_becomes_meanwhile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both deadlines are one decision: else the sweep could release a hold whose request is still being answered."""

    class Silent(ScriptedNodes):
        async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
            await asyncio.sleep(3_600)
            raise AssertionError("nobody waits for so long")

    world = make_world(Silent())
    place = world.ledger.hold

    async def place_slowly_while_others_arrive(hold: Hold, claim: Claim | None = None) -> None:
        await place(hold, claim)
        for node in world.fleet.registry:
            node.load.began(100_000_000, world.clock.now)
        world.clock.now = hold.deadline_ms / 1000 - 20.0  # what is left is for writing the reply

    monkeypatch.setattr(world.ledger, "hold", place_slowly_while_others_arrive)
    with pytest.raises(Failure, match="took longer than it may"):
        async with asyncio.timeout(5):
            await ask(world)
    assert world.ledger.log == [("hold", COST), ("release", COST)]


async def test_the_node_gets_ids_written_anew_and_never_the_callers_bytes() -> None:
    nodes = ScriptedNodes()
    await ask(make_world(nodes), b'{ "model" : "tiny", "input" : "\\u0061bc", "user": "me" }')
    assert nodes.asked == [("n0", [[4, 5, 6]])]


class Slow(ScriptedNodes):
    """Takes so many seconds, of the loop's time."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.broken_off = 0

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        seconds = self.seconds if part.node_id == "n0" else 0.1
        try:
            await asyncio.sleep(seconds)
        except asyncio.CancelledError:
            self.broken_off += 1
            raise
        return await super().embed(part, model, counted, request_id)


@pytest.mark.parametrize(
    ("nodes", "seconds", "least_s", "broken_off"),
    [
        (1, 20.0, 20.0, 0),  # far beyond an attempt's time, within the request's
        (2, 20.0, 1.0, 1),  # another one is asked in its place
    ],
)
def test_a_slow_node_is_waited_for_where_no_other_can_be_asked(
    nodes: int, seconds: float, least_s: float, broken_off: int
) -> None:
    """In virtual time. To break off what nobody else would begin anew helps nobody."""

    async def story() -> float:
        world = make_world(client := Slow(seconds), nodes=nodes)
        world.fleet._policy = lambda options, horizon_s, dice: options[0]
        began = asyncio.get_running_loop().time()
        await ask(world)
        assert client.broken_off == broken_off
        return asyncio.get_running_loop().time() - began

    took_s = in_virtual_time(story())
    assert least_s <= took_s < least_s + 1.0


def test_the_only_node_is_waited_for_until_the_request_s_own_time_is_over() -> None:
    """Then the caller is told, and nothing is charged."""

    async def story() -> float:
        world = make_world(client := Slow(10_000.0))
        (node,) = world.fleet.registry
        began = asyncio.get_running_loop().time()
        with pytest.raises(DeadlineExceeded):
            await ask(world)
        assert world.ledger.log == [("hold", COST), ("release", COST)]
        assert (client.broken_off, node.load.parts) == (1, 0)
        assert node.state is NodeState.READY
        return asyncio.get_running_loop().time() - began

    assert REQUEST_MIN_S <= in_virtual_time(story()) < REQUEST_MIN_S + 1.0


def in_virtual_time(story: Coroutine[None, None, float]) -> float:
    loop = Loop(random.Random(1), 0.0)
    try:
        return loop.run_until_complete(story)
    finally:
        loop.close()


async def test_a_burst_that_nobody_waited_before_does_not_all_stand_in_line() -> None:
    """Each was let in when nobody waited; while their holds became durable the others came."""

    world = make_world(Slow(3_600))
    asking = [asyncio.create_task(ask(world)) for _ in range(2_000)]
    await asyncio.sleep(0.5)
    refused = [each.exception() for each in asking if each.done()]
    assert refused and all(isinstance(each, Overloaded) for each in refused)
    assert len(asking) - len(refused) < 1_000  # some milliseconds each, four seconds of them
    released = sum(what == "release" for what, _ in world.ledger.log)
    assert released == sum(what == "hold" for what, _ in world.ledger.log) - (len(asking) - len(refused))
    for each in asking:
        each.cancel()
    await asyncio.gather(*asking, return_exceptions=True)
