"""The same request again: with an Idempotency-Key, or as an SDK's retry. One charge, one reply."""

import asyncio
import json
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest

from embedmesh.dialects.openai.render import reply_bytes_max
from embedmesh.flow.idempotency import Kept
from embedmesh.flow.paid import serve
from embedmesh.flow.retries import LINGER_S, LINGERING_ACCOUNT_MAX, LINGERING_MAX, UNREAD_ENTRY_BYTES, Unread
from embedmesh.rules.embeddings import Call, Counted, EmbedVectors
from embedmesh.rules.errors import Failure, NodeBroke, RateLimited
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import Answer, Part
from embedmesh.rules.limits import KEPT_REPLIES_BYTES_MAX, UNREAD_S
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Shares
from tests.flow.world import (
    EMBEDDINGS,
    GOOD_KEY,
    METERED_KEY,
    NARROW_KEY,
    ScriptedNodes,
    ScriptedWorld,
    make_world,
    undelivered,
)

BODY = b'{"model":"tiny","input":"abc"}'
OTHER_BODY = b'{"model":"tiny","input":"abd"}'
COST = 8
BROKEN_OFF = Delivery.BROKEN_OFF


async def ask(
    world: ScriptedWorld,
    body: bytes = BODY,
    *,
    api_key: str = GOOD_KEY,
    key: str | None = None,
    retries: int | None = None,
    lost: bool = False,
    how: Delivery = Delivery.WHOLE,
) -> Reply:
    """The reply, whose delivery ended in that way; ConnectionResetError where it was `lost` before it began."""
    delivered: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return body

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        if lost:
            raise ConnectionResetError("the caller went")
        delivered.append(reply)
        return how

    await serve(world, EMBEDDINGS, RequestHead(f"Bearer {api_key}", key, retries), receive, deliver)
    return delivered[0]


def charges(world: ScriptedWorld) -> int:
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


async def test_who_comes_while_the_first_runs_waits_for_its_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world()
    gate, embed = asyncio.Event(), world.client.embed

    async def slow(*arguments: Any) -> EmbedVectors:
        await gate.wait()
        return await embed(*arguments)

    monkeypatch.setattr(world.client, "embed", slow)
    first, second = asyncio.create_task(ask(world, key="k")), asyncio.create_task(ask(world, key="k"))
    await asyncio.sleep(0.05)
    assert not first.done() and not second.done()
    gate.set()
    assert (await first).body == (await second).body
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


async def test_who_waits_for_one_that_fails_takes_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(ScriptedNodes(*[NodeBroke("x")] * 1, None), nodes=1)
    embed = world.client.embed

    async def slow(*arguments: Any) -> EmbedVectors:
        await asyncio.sleep(0.03)
        return await embed(*arguments)

    monkeypatch.setattr(world.client, "embed", slow)
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
    monkeypatch.setattr(world.client, "embed", lambda *arguments: asyncio.Event().wait())
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
    world.ledger.kept = KEPT_REPLIES_BYTES_MAX
    with pytest.raises(Failure) as full:
        await ask(world, key="k")
    assert isinstance(full.value, RateLimited)
    assert (full.value.code, full.value.retry_after_s) == ("rate_limit_exceeded", 3_600)
    world.ledger.kept = 0
    monkeypatch.setattr("embedmesh.flow.idempotency.KEPT_REPLY_BYTES_MAX", 15)
    with pytest.raises(Failure, match="leave the key out") as large:
        await ask(world, key="k")
    assert large.value.code == "invalid_value"
    assert world.ledger.log == []
    await ask(world)


async def test_a_reply_that_was_broken_off_is_paid_and_kept_for_its_key() -> None:
    world = make_world()
    first = await ask(world, key="k", how=BROKEN_OFF)
    second = await ask(world, key="k")
    assert second.body == first.body and second.headers["idempotent-replayed"] == "true"
    assert world.ledger.log == [("hold", COST), ("capture", COST)]


# -- an SDK's retries --------------------------------------------------------------------------------------------------


class Gate(ScriptedNodes):
    """Nodes that answer once they may."""

    def __init__(self, *script: Failure | None) -> None:
        super().__init__(*script)
        self.open = asyncio.Event()

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        await self.open.wait()
        return await super().embed(part, model, counted, request_id)


async def test_a_retry_attaches_to_its_twin() -> None:
    """One call of a node, one charge, two replies."""
    world = make_world(gate := Gate())
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
    world = make_world(gate := Gate())
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
async def test_what_is_no_retry_of_it_is_another_request(other: dict[str, Any]) -> None:
    """Another body or key; a first try, or one without an SDK's word."""
    world = make_world(gate := Gate())
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
    monkeypatch.setattr("embedmesh.flow.retries.LINGER_S", 0.02)
    assert LINGER_S >= 1.0
    world = make_world(gate := Gate())
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
    world = make_world(gate := Gate(NodeBroke("x"), None))
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
    world = make_world(gate := Gate(NodeBroke("x"), None))
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
    await world.single_flight.stop()
    assert world.ledger.log == [("hold", COST), ("release", COST)]


@pytest.mark.parametrize("bound", ["LINGERING_MAX", "LINGERING_ACCOUNT_MAX"])
async def test_too_many_do_not_linger(monkeypatch: pytest.MonkeyPatch, bound: str) -> None:
    """What is over a bound, in all or of an account, is given up at once."""
    monkeypatch.setattr(f"embedmesh.flow.retries.{bound}", 1)
    world = make_world()
    for body in (BODY, OTHER_BODY):
        with pytest.raises(ConnectionResetError):
            await ask(world, body, retries=0, lost=True)
    assert [what for what, _ in world.ledger.log] == ["hold", "hold", "release"]
    await world.single_flight.stop()


async def test_what_one_account_left_behind_leaves_room_for_others() -> None:
    """However many it hangs up on; once its works have lingered, or are found, they count no more."""
    assert LINGERING_ACCOUNT_MAX * 4 <= LINGERING_MAX
    world = make_world()
    bodies = [b'{"model":"tiny","input":"%s"}' % bytes([97 + n // 26, 97 + n % 26]) for n in range(40)]
    for body in bodies:
        with pytest.raises(ConnectionResetError):
            await ask(world, body, retries=0, lost=True)
    assert len(world.single_flight._lingering) == LINGERING_ACCOUNT_MAX
    for body in bodies[:LINGERING_ACCOUNT_MAX]:
        await ask(world, body, retries=1)
    assert charges(world) == LINGERING_ACCOUNT_MAX
    assert (len(world.single_flight._lingering), world.replies.taken) == (0, 0)


async def test_what_lingers_takes_room_for_its_reply() -> None:
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=0, lost=True)
    assert world.replies.taken > 0
    await world.single_flight.stop()
    assert world.replies.taken == 0


async def test_a_work_whose_money_is_not_held_for_long_enough_is_delivered_to_nobody() -> None:
    """Else whoever lets one delivery after the other come to nothing reads the last one when the hold has ended."""
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=0, lost=True)
    world.clock.now += 34.0  # of 30 for the work, 20 for the reply and 5
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=1, lost=True)
    world.clock.now += 2.0
    with pytest.raises(Failure) as late:
        await ask(world, retries=2)
    assert late.value.code == "deadline_exceeded"
    assert [what for what, _ in world.ledger.log] == ["hold", "release"]
    await ask(world, retries=3)
    assert [what for what, _ in world.ledger.log] == ["hold", "release", "hold", "capture"]


# -- a reply that was paid and not read --------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [None, 0])
async def test_a_retry_of_a_reply_that_was_broken_off_gets_it_and_pays_nothing(first: int | None) -> None:
    """Byte for byte, and says so; whether or not the first try came from an SDK that counts."""
    world = make_world()
    broken = await ask(world, retries=first, how=BROKEN_OFF)
    again = await ask(world, retries=1)
    assert again.body == broken.body
    assert again.headers["x-embedmesh-cost-nanousd"] == str(COST)
    assert again.headers["idempotent-replayed"] == "true"
    assert world.ledger.log == [("hold", COST), ("capture", COST)]
    assert len(world.client.asked) == 1


async def test_it_is_kept_until_it_was_read_to_its_end() -> None:
    world = make_world()
    await ask(world, retries=0, how=BROKEN_OFF)
    await ask(world, retries=1, how=BROKEN_OFF)
    with pytest.raises(ConnectionResetError):
        await ask(world, retries=2, lost=True)
    await ask(world, retries=3)
    assert charges(world) == 1
    await ask(world, retries=4)
    assert charges(world) == 2


async def test_who_is_answered_after_all_leaves_nothing_for_a_retry() -> None:
    """Two callers of one work: the reply is broken off by one and read by the other."""
    world = make_world(gate := Gate())
    first = asyncio.create_task(ask(world, retries=0, how=BROKEN_OFF))
    await asyncio.sleep(0.01)
    second = asyncio.create_task(ask(world, retries=1))
    await asyncio.sleep(0.01)
    gate.open.set()
    await asyncio.gather(first, second)
    assert charges(world) == 1
    await ask(world, retries=1)
    assert charges(world) == 2


@pytest.mark.parametrize(
    "other",
    [{"body": OTHER_BODY}, {"api_key": METERED_KEY}, {"retries": 0}, {"retries": None}, {"key": "k"}],
)
async def test_what_is_no_retry_of_it_is_charged(other: dict[str, Any]) -> None:
    world = make_world()
    await ask(world, retries=0, how=BROKEN_OFF)
    await ask(world, **{"retries": 1, **other})
    assert charges(world) == 2


async def test_what_was_not_paid_is_not_kept() -> None:
    """It broke off before it began; or we ended it ourselves, though it had begun."""
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, lost=True)

    async def receive(account_id: str) -> bytes:
        return BODY

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await serve(world, EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}"), receive, deliver)
    await ask(world, retries=1)
    assert [what for what, _ in world.ledger.log] == ["hold", "release", "hold", "release", "hold", "capture"]


async def test_a_reply_that_is_kept_costs_a_request_and_no_tokens() -> None:
    world = make_world()
    await ask(world, api_key=METERED_KEY, retries=0, how=BROKEN_OFF)
    reply = await ask(world, api_key=METERED_KEY, retries=1)
    assert world.rate_limits.taken == {"requests": 2, "tokens": 5}
    assert reply.headers["x-ratelimit-remaining-requests"] == "0"
    with pytest.raises(Failure, match="too much"):
        await ask(world, api_key=METERED_KEY, retries=2)


class Later:
    """Calls that are to be made later."""

    def __init__(self) -> None:
        self.calls: list[Later.Call] = []

    def __call__(self, seconds: float, then: Callable[[], None]) -> "Later.Call":
        self.calls.append(Later.Call(seconds, then))
        return self.calls[-1]

    class Call(NamedTuple):
        seconds: float
        then: Callable[[], None]

        def cancel(self) -> None:
            pass


class Minute:
    """What is unread, with room for `entries` replies of one input."""

    def __init__(self, entries: int) -> None:
        self.later = Later()
        self.unread: Unread[Kept] = Unread(self.later, entries * (UNREAD_ENTRY_BYTES + 16))

    def keep(self, account: str, number: int, inputs: int = 1) -> None:
        answer = Answer(bytes(16) * inputs, 4, 3, ())
        self.unread.keep(self.caller(account), b"%d" % number, Kept(answer, number), len(answer.data))

    def kept(self, account: str, numbers: range) -> list[int]:
        found = [self.unread.find(self.caller(account), b"%d" % number) for number in numbers]
        return [each.cost for each in found if each is not None]

    def caller(self, account: str) -> Caller:
        return Caller(account, f"key of {account}", frozenset())


def test_it_is_kept_for_a_minute() -> None:
    minute = Minute(10)
    minute.keep("a", 1)
    (call,) = minute.later.calls
    assert call.seconds == UNREAD_S == 60
    assert minute.kept("a", range(3)) == [1]
    call.then()
    assert minute.kept("a", range(3)) == []
    assert minute.unread._shares.taken == 0
    call.then()


def test_an_account_makes_room_for_its_own_and_leaves_room_for_others() -> None:
    minute = Minute(100)
    for number in range(200):
        minute.keep("a", number)
    assert minute.kept("a", range(200)) == list(range(120, 200)), "four fifths, the last ones"
    minute.keep("b", 1)
    assert minute.kept("b", range(3)) == [1]
    minute.keep("c", 1, inputs=10**6)
    assert minute.kept("c", range(3)) == [], "what never fits is not kept"
    assert len(minute.kept("a", range(200))) == 80


def test_what_is_kept_again_takes_room_once() -> None:
    minute = Minute(10)
    for _ in range(3):
        minute.keep("a", 1)
    assert minute.unread._shares.taken == UNREAD_ENTRY_BYTES + 16
    minute.unread.forget(minute.caller("a"), b"1")
    minute.unread.forget(minute.caller("a"), b"1")
    assert (minute.unread._shares.taken, minute.unread._accounts) == (0, {})


# -- room for replies --------------------------------------------------------------------------------------------------


async def test_replies_under_way_are_bounded_by_account_before_anything_is_done_for_them() -> None:
    """Who leaves its own unread is refused before its tokens are counted; another account is served."""
    world = make_world()
    world = msgspec.structs.replace(world, replies=Shares(5 * reply_bytes_max(Call("tiny", texts=["abc"]), 4)))
    read = asyncio.Event()

    async def receive(account_id: str) -> bytes:
        return BODY

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        await read.wait()
        return Delivery.WHOLE

    reading = [
        asyncio.create_task(serve(world, EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}"), receive, deliver))
        for _ in range(4)
    ]
    await asyncio.sleep(0.05)
    with pytest.raises(Failure, match="bytes of replies under way") as refused:
        await ask(world, api_key=METERED_KEY)  # of the same account
    assert refused.value.code == "overloaded"
    assert world.rate_limits.taken == {"requests": 1, "tokens": 0}
    assert [what for what, _ in world.ledger.log] == ["hold"] * 4
    read.set()
    await asyncio.gather(*reading)
    assert world.replies.taken == 0
    await ask(world)


async def test_a_reply_that_can_never_be_made_is_told_so_for_good() -> None:
    """Not as something that passes; in base64 it fits."""
    world = make_world()
    world = msgspec.structs.replace(world, replies=Shares(1_000))
    body = b'{"model":"tiny","input":["a","b"]%s}'
    with pytest.raises(Failure, match=r"at most 800 can be made here.*base64") as refused:
        await ask(world, body % b"")
    assert (refused.value.code, refused.value.param) == ("invalid_value", "input")
    await ask(world, body % b',"encoding_format":"base64"')


@pytest.mark.parametrize("error", [ConnectionResetError(), asyncio.CancelledError(), RuntimeError()])
async def test_room_is_given_back_however_a_request_ends(error: BaseException) -> None:
    world = make_world()

    async def receive(account_id: str) -> bytes:
        return BODY

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        assert world.replies.taken > len(reply.body)
        raise error

    with pytest.raises(type(error)):
        await serve(world, EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}"), receive, deliver)
    with pytest.raises(Failure):
        await ask(world, b'{"model":"tiny","input":"abcdefghijk"}')
    assert world.replies.taken == 0


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
        await serve(world, EMBEDDINGS, RequestHead(f"Bearer {METERED_KEY}"), receive, undelivered)
    assert refused.value.code == "rate_limit_exceeded"
    assert [what for what, _ in world.ledger.log] == ["hold", "capture"]


async def test_a_caller_that_hangs_up_keeps_its_tokens_spent() -> None:
    world = make_world()
    with pytest.raises(ConnectionResetError):
        await ask(world, api_key=METERED_KEY, lost=True)
    assert world.rate_limits.taken == {"requests": 1, "tokens": 5}
