"""The ordinary request in two steps, and everything by which it stops being ordinary on the way."""

import asyncio
import json
import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.lives.loop import Loop
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.paid import serve
from embedmesh.flow.retries import LINGER_S
from embedmesh.flow.straight import LOOK_EVERY_S, StraightEmbeddings, StraightRequest
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Counted, EmbedVectors, numbers_of
from embedmesh.rules.errors import BadNodeResponse, Failure, NodeBroke, NodeBusy, NodeUnreachable, WrongAnswer
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.shares import Room
from embedmesh.rules.straight import GoOn
from tests.flow.world import (
    EMBEDDINGS,
    GOOD_KEY,
    METERED_KEY,
    NARROW_KEY,
    POOR_KEY,
    SCOPELESS_KEY,
    SINGLE_KEY,
    ScriptedNodes,
    ScriptedWorld,
    make_world,
    right_reply,
)

BODY = b'{"model":"tiny","input":"abc"}'
SEVERAL = b'{"model":"tiny","input":["abc","abc"]}'
COST = 8  # five tokens at 1.5 nano-USD each, rounded up
PLAIN: Mapping[str, str] = {}
SDK = {"x-stainless-retry-count": "0"}
WRONG = EmbedVectors(tokens=5, data=b"\0" * 16)
SOON_S = 0.001


class Attempt:
    """One that a test ends."""

    def __init__(self, part: Part, ids: list[list[int]], owner: AttemptOwner) -> None:
        self.part = part
        self.cancelled = False
        self._ids = ids
        self._owner = owner

    def cancel(self) -> None:
        self.cancelled = True

    def answer(self, vectors: EmbedVectors | None = None) -> None:
        self._owner.answered(vectors or right_reply(self._ids))

    def fail(self, failure: Any) -> None:
        self._owner.failed(failure)


class Nodes(ScriptedNodes):
    """Attempts that begin at once wait for the test; others are answered by the script."""

    def __init__(self, *script: Any, connected: bool = True) -> None:
        super().__init__(*script)
        self.attempts: list[Attempt] = []
        self._connected = connected

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Any:
        if not self._connected:
            return None
        assert counted.ids is not None
        ids = [numbers_of(counted.ids[row]) for row in part.rows]
        self.attempts.append(Attempt(part, ids, owner))
        return self.attempts[-1]


class Line:
    """A caller's connection: what it gets, and how it takes a reply."""

    def __init__(self, *, rest: object | None = None, ends: Any = None) -> None:
        """Of a reply, `rest` is left; a coroutine's delivery ends like `ends`, or whole."""
        self.replies: list[Reply] = []
        self.ended = 0
        self.task: asyncio.Task[None] | None = None
        self._rest = rest
        self._ends = ends

    def deliver(self, reply: Reply) -> object | None:
        self.replies.append(reply)
        return self._rest

    def end(self) -> None:
        self.ended += 1

    def go_on(self, handle: GoOn, rest: object | None = None) -> None:
        assert self.task is None
        assert rest is self._rest
        self.task = asyncio.ensure_future(handle(self._deliver))

    async def _deliver(self, reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        self.replies.append(reply)
        if isinstance(self._ends, Exception):
            raise self._ends
        return self._ends or Delivery.WHOLE


class Counts:
    """How requests ended, in order, and what was charged."""

    def __init__(self) -> None:
        self.codes: list[str] = []
        self.charged: list[tuple[int, int]] = []

    def ended(self, code: str, model: str, seconds: float, tokens: int = 0, nanousd: int = 0) -> None:
        self.codes.append(code)
        if nanousd:
            self.charged.append((tokens, nanousd))


class Desk:
    """A straight path over a scripted world."""

    def __init__(self, nodes: Nodes | None = None, *, count: int = 1, room: int = 100) -> None:
        self.client = nodes or Nodes()
        self.world: ScriptedWorld = make_world(self.client, nodes=count)
        self.world.ledger.tabs = True
        self.counts = Counts()
        self.room = Room(room, "full")
        self.straight = StraightEmbeddings(self.world, EMBEDDINGS, self.room, self.counts, self._observe)

    async def _observe(self, began: float, account: str, model: str, outcome: Any) -> None:
        try:
            ended: Outcome = await outcome
            self.counts.ended("ok" if ended.delivery is Delivery.WHOLE else "broken_off", model, 0.0)
        except Failure as failure:
            self.counts.ended(failure.code, model, 0.0)
            raise
        finally:
            self.room.give_back(account)

    def ask(
        self, line: Line, body: bytes = BODY, key: str = GOOD_KEY, headers: Mapping[str, str] = PLAIN
    ) -> StraightRequest | None:
        known = self.straight.knows({"authorization": f"Bearer {key}", **headers})
        return None if known is None else self.straight.ask(known, body, line)

    def begin(
        self, line: Line, body: bytes = BODY, key: str = GOOD_KEY, headers: Mapping[str, str] = PLAIN
    ) -> StraightRequest:
        asked = self.ask(line, body, key, headers)
        assert asked is not None
        return asked

    @property
    def log(self) -> list[tuple[str, int]]:
        return self.world.ledger.log

    def assert_nothing_left(self) -> None:
        assert self.room.taken == 0
        assert not self.straight.in_flight
        assert not self.world.single_flight.straight
        assert self.world.replies.taken == 0
        for node in self.world.fleet.registry:
            assert (node.load.parts, node.load.tokens) == (0, 0)


async def retry(desk: Desk) -> Reply:
    """The same request again, as an SDK sends it."""
    replies: list[Reply] = []

    async def receive(account_id: str) -> bytes:
        return BODY

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        assert isinstance(reply, Reply)
        replies.append(reply)
        return Delivery.WHOLE

    await serve(desk.world, EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}", retries=1), receive, deliver)
    return replies[0]


async def test_it_is_held_asked_answered_delivered_and_charged() -> None:
    desk, line = Desk(), Line()
    asked = desk.begin(line)
    assert desk.log == [("spend", COST)]
    assert line.replies == []
    desk.client.attempts[0].answer()
    assert desk.log == [("spend", COST), ("capture", COST)]
    assert json.loads(line.replies[0].body)["usage"] == {"prompt_tokens": 5, "total_tokens": 5}
    assert line.replies[0].headers["x-embedmesh-request"] == asked.request_id
    assert (line.ended, line.task) == (1, None)
    assert (desk.counts.codes, desk.counts.charged) == (["ok"], [(5, COST)])
    assert desk.world.node("n0").counts["answers"] == 1
    desk.assert_nothing_left()


@given(
    texts=st.lists(st.text("abcz", min_size=1, max_size=6), min_size=1, max_size=4),
    single=st.booleans(),
    encoding=st.sampled_from(["float", "base64", None]),
)
@settings(deadline=None)  # a busy machine takes its time for an event loop
def test_the_reply_is_that_of_the_hard_way(texts: list[str], single: bool, encoding: str | None) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": texts[0] if single else texts}
    body = msgspec.json.encode(asked if encoding is None else asked | {"encoding_format": encoding})

    async def both() -> None:
        desk, line = Desk(), Line()
        own_id = desk.begin(line, body).request_id
        desk.client.attempts[0].answer()
        hard: list[Reply] = []

        async def receive(account_id: str) -> bytes:
            return body

        async def deliver(reply: Reply | StreamedReply) -> Delivery:
            assert isinstance(reply, Reply)
            hard.append(reply)
            return Delivery.WHOLE

        await serve(make_world(), EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}", request_id=own_id), receive, deliver)
        assert line.replies == hard
        assert list(line.replies[0].headers) == list(hard[0].headers)

    asyncio.run(both())


NOT_ORDINARY: dict[str, Callable[[Desk], StraightRequest | None]] = {
    "unknown key": lambda desk: desk.ask(Line(), key="em_unknown"),
    "no scope": lambda desk: desk.ask(Line(), key=SCOPELESS_KEY),
    "another model": lambda desk: desk.ask(Line(), key=NARROW_KEY),
    "no money": lambda desk: desk.ask(Line(), key=POOR_KEY),
    "two keys": lambda desk: desk.ask(Line(), headers={"api-key": POOR_KEY}),
    "an Idempotency-Key": lambda desk: desk.ask(Line(), headers={"idempotency-key": "one"}),
    "a retry": lambda desk: desk.ask(Line(), headers={"x-stainless-retry-count": "1"}),
    "no JSON": lambda desk: desk.ask(Line(), b"{"),
    "unknown model": lambda desk: desk.ask(Line(), b'{"model":"no","input":"abc"}'),
    "no text": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":""}'),
    "no text among others": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":["a",""]}'),
    "no texts": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":[]}'),
    "a text that is too long": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":"abcdefghij"}'),
    "token ids": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":[1,2]}'),
    "dimensions": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":"abc","dimensions":2}'),
    "over a limit": lambda desk: desk.ask(Line(), b'{"model":"tiny","input":["abc","abc","abc"]}', METERED_KEY),
}  # fmt: skip


@pytest.mark.parametrize("what", NOT_ORDINARY)
async def test_what_is_not_ordinary_is_left_alone(what: str) -> None:
    """Nothing was taken: no money, no limits, no room; no node was asked."""
    desk = Desk()
    assert NOT_ORDINARY[what](desk) is None
    assert desk.log == []
    assert desk.world.rate_limits.taken == {"requests": 0, "tokens": 0}
    assert desk.client.attempts == []
    desk.assert_nothing_left()


async def test_a_key_with_a_cache_is_left_alone() -> None:
    desk = Desk()
    caller = Caller("acct", "key_1", frozenset({"embeddings"}), cache=CachePolicy.CHARGED)

    class Cached:
        async def find(self, token: str) -> Caller | None:
            return caller

        def known(self, token: str, now: float) -> Caller | None:
            return caller

    desk.straight.world = msgspec.structs.replace(desk.world, keys=Cached())
    assert desk.ask(Line()) is None


@pytest.mark.parametrize("full", ["room", "nodes", "connections"])
async def test_without_room_what_was_held_goes_back(full: str) -> None:
    desk = Desk(Nodes(connected=full != "connections"), room=0 if full == "room" else 100)
    if full == "nodes":
        desk.world.node("n0").paused_until = desk.world.clock.now + 1
    assert desk.ask(Line()) is None
    assert desk.log == [("spend", COST), ("release", COST)]
    desk.assert_nothing_left()


async def test_a_reply_of_several_vectors_takes_room_like_any_other() -> None:
    """Or callers who do not read could have more of them in memory than there is room for."""
    desk = Desk()
    alone = EMBEDDINGS.parse(desk.world, RequestHead(), SEVERAL).reply_bytes_max
    desk.begin(Line(), SEVERAL)
    assert desk.world.replies.taken == alone
    desk.client.attempts[0].answer()
    desk.assert_nothing_left()
    others = 0
    while desk.world.replies.take(f"other {others}", desk.world.replies.total // 16):
        others += 1
    while desk.world.replies.take("acct", alone):
        others += 1
    full, log = desk.world.replies.taken, list(desk.log)
    assert desk.ask(Line(), SEVERAL) is None
    assert desk.log == [*log, ("spend", 15), ("release", 15)]
    assert desk.world.replies.taken == full
    assert desk.room.taken == 0
    assert desk.ask(Line()) is not None


@pytest.mark.parametrize("headers", [PLAIN, SDK], ids=["plain", "sdk"])
@pytest.mark.parametrize("end", ["whole", "rest", "broken off", "failed", "late", "left", "bug"])
async def test_the_room_of_a_reply_goes_back_however_the_request_ends(
    end: str, headers: Mapping[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = "rest" if end in ("rest", "broken off") else None
    desk, line = Desk(), Line(rest=rest, ends=ConnectionResetError() if end == "broken off" else None)
    asked = desk.begin(line, SEVERAL, headers=headers)
    assert desk.world.replies.taken
    if end == "left":
        asked.caller_left()
        await asyncio.sleep(SOON_S)
    elif end == "failed":
        desk.client.attempts[0].fail(WrongAnswer("wrong"))
    else:
        if end == "late":
            asked.share()
        elif end == "bug":
            monkeypatch.setattr(type(asked.call), "render", None)
        desk.client.attempts[0].answer()
    if line.task is not None:
        await asyncio.gather(line.task, return_exceptions=True)
    await desk.world.single_flight.stop()
    desk.assert_nothing_left()


async def test_who_waits_already_goes_first() -> None:
    desk = Desk()
    desk.world.node("n0").in_flight_max = 1
    first = Line()
    desk.begin(first)
    waiting = asyncio.create_task(_slow(desk))
    await asyncio.sleep(SOON_S)
    assert desk.world.fleet.queued_tokens
    assert desk.ask(Line()) is None
    desk.client.attempts[0].answer()
    await waiting
    desk.assert_nothing_left()


async def _slow(desk: Desk) -> None:
    async def receive(account_id: str) -> bytes:
        return b'{"model":"tiny","input":"abcd"}'

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        return Delivery.WHOLE

    await serve(desk.world, EMBEDDINGS, RequestHead(f"Bearer {GOOD_KEY}"), receive, deliver)


@pytest.mark.parametrize("end", ["answered", "failed", "left"])
async def test_a_slot_is_had_until_the_request_is_over(end: str) -> None:
    """However it ends. Without one it begins on the spine, and no money is held."""
    desk, line = Desk(), Line()
    asked = desk.begin(line, key=SINGLE_KEY)
    assert desk.world.slots.in_use["key_7"] == 1
    assert desk.ask(Line(), key=SINGLE_KEY) is None
    assert desk.log == [("spend", COST), ("spend", COST), ("release", COST)]
    if end == "left":
        asked.caller_left()
    elif end == "answered":
        desk.client.attempts[0].answer()
    else:
        desk.client.attempts[0].fail(NodeBroke("broke"))
        assert line.task is not None
        await asyncio.gather(line.task, return_exceptions=True)
    assert desk.world.slots.in_use["key_7"] == 0
    assert desk.ask(Line(), b"{", key=SINGLE_KEY) is None
    assert desk.world.slots.in_use["key_7"] == 0
    desk.begin(Line(), key=SINGLE_KEY)


async def test_limits_are_taken_once_and_told() -> None:
    desk, line = Desk(), Line()
    desk.begin(line, key=METERED_KEY)
    assert desk.world.rate_limits.taken == {"requests": 1, "tokens": 5}
    desk.client.attempts[0].answer()
    headers = line.replies[0].headers
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-remaining-tokens"] == "7"
    assert desk.world.rate_limits.taken == {"requests": 1, "tokens": 5}


@pytest.mark.parametrize("headers", [{}, SDK], ids=["plain", "sdk"])
@pytest.mark.parametrize("failure", [NodeBroke("broke"), NodeUnreachable("gone"), NodeBusy("busy"), None], ids=str)
async def test_a_failed_attempt_goes_on_at_another_node(failure: Any, headers: dict[str, str]) -> None:
    desk, line = Desk(count=2), Line()
    desk.begin(line, headers=headers)
    first = desk.client.attempts[0]
    if failure is None:
        first.answer(WRONG)
    else:
        first.fail(failure)
    assert line.task is not None
    await line.task
    assert [node for node, _ in desk.client.asked] == [{"n0": "n1", "n1": "n0"}[first.part.node_id]]
    assert desk.log == [("spend", COST), ("capture", COST)]
    assert len(line.replies) == 1
    assert desk.counts.codes == ["ok"]
    assert sum(desk.world.node(first.part.node_id).failed.values()) == 1
    desk.assert_nothing_left()


async def test_without_another_node_it_is_refused_and_not_charged() -> None:
    desk, line = Desk(), Line()
    desk.begin(line)
    desk.client.attempts[0].fail(WrongAnswer("wrong"))
    assert line.task is not None
    with pytest.raises(BadNodeResponse):
        await line.task
    assert desk.log == [("spend", COST), ("release", COST)]
    assert desk.counts.codes == ["bad_node_response"]
    desk.assert_nothing_left()


def test_a_late_attempt_is_waited_for_where_nobody_else_can_do_it() -> None:
    async def run() -> None:
        desk, line = Desk(), Line()
        desk.begin(line)
        desk.world.clock.now += 10
        await asyncio.sleep(2 * LOOK_EVERY_S)
        assert line.task is not None
        assert not desk.straight.in_flight
        await asyncio.sleep(SOON_S)
        desk.client.attempts[0].answer()
        await line.task
        assert desk.log == [("spend", COST), ("capture", COST)]
        assert not desk.client.attempts[0].cancelled
        desk.assert_nothing_left()

    with asyncio.Runner(loop_factory=lambda: Loop(random.Random(1), disorder=0.0)) as runner:
        runner.run(run())


def test_a_late_attempt_gives_way_to_another_node() -> None:
    async def run() -> None:
        desk, line = Desk(count=2), Line()
        desk.begin(line)
        desk.world.clock.now += 10
        await asyncio.sleep(2 * LOOK_EVERY_S)
        assert line.task is not None
        await line.task
        assert desk.client.attempts[0].cancelled
        assert len(desk.client.asked) == 1
        assert desk.log == [("spend", COST), ("capture", COST)]
        desk.assert_nothing_left()

    with asyncio.Runner(loop_factory=lambda: Loop(random.Random(1), disorder=0.0)) as runner:
        runner.run(run())


async def test_a_caller_that_leaves_pays_nothing_and_the_node_stops() -> None:
    desk, line = Desk(), Line()
    asked = desk.begin(line, key=METERED_KEY)
    asked.caller_left()
    assert desk.client.attempts[0].cancelled
    assert desk.log == [("spend", COST), ("release", COST)]
    assert desk.world.rate_limits.taken == {"requests": 1, "tokens": 5}, "its tokens stay spent"
    assert desk.counts.codes == ["dropped"]
    desk.assert_nothing_left()


async def test_the_retry_of_an_sdk_that_was_cut_off_finds_the_work_and_pays_once() -> None:
    desk, line = Desk(), Line()
    desk.begin(line, headers=SDK).caller_left()
    again = asyncio.create_task(retry(desk))
    await asyncio.sleep(SOON_S)
    assert not desk.client.attempts[0].cancelled
    desk.client.attempts[0].answer()
    reply = await again
    assert json.loads(reply.body)["usage"]["prompt_tokens"] == 5
    assert desk.client.asked == []
    assert desk.log == [("spend", COST), ("capture", COST)]
    desk.assert_nothing_left()


def test_a_retry_that_never_comes_is_not_waited_for_long() -> None:
    async def run() -> None:
        desk = Desk()
        desk.begin(Line(), headers=SDK).caller_left()
        await asyncio.sleep(LINGER_S + 0.1)
        assert desk.client.attempts[0].cancelled
        assert desk.log == [("spend", COST), ("release", COST)]
        desk.assert_nothing_left()

    with asyncio.Runner(loop_factory=lambda: Loop(random.Random(1), disorder=0.0)) as runner:
        runner.run(run())


async def test_work_that_may_not_wait_for_a_retry_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """As when many of an account's connections break together: all that was taken goes back, and the node stops."""
    monkeypatch.setattr("embedmesh.flow.retries.LINGERING_ACCOUNT_MAX", 1)
    desk = Desk()
    for _ in range(2):
        desk.begin(Line(), headers=SDK).caller_left()
    await asyncio.sleep(SOON_S)
    assert [each.cancelled for each in desk.client.attempts] == [False, True]
    assert desk.log == [("spend", COST), ("spend", COST), ("release", COST)]
    await desk.world.single_flight.stop()
    assert desk.client.attempts[0].cancelled
    desk.assert_nothing_left()


@pytest.mark.parametrize("right", [True, False])
async def test_a_node_that_ends_in_the_moment_of_a_cancellation_changes_nothing(*, right: bool) -> None:
    """The attempt was given up, and its coroutine does not know it yet."""
    desk, line = Desk(), Line()
    desk.begin(line).share()
    await asyncio.sleep(SOON_S)
    assert line.task is not None
    line.task.cancel()
    attempt = desk.client.attempts[0]
    attempt.answer() if right else attempt.fail(NodeBroke("broke"))
    with pytest.raises(asyncio.CancelledError):
        await line.task
    assert desk.log == [("spend", COST), ("release", COST)]
    desk.assert_nothing_left()


async def test_a_retry_attaches_to_its_twin() -> None:
    desk, line = Desk(), Line()
    desk.begin(line, headers=SDK)
    again = asyncio.create_task(retry(desk))
    await asyncio.sleep(SOON_S)
    assert line.task is not None
    desk.client.attempts[0].answer()
    reply = await again
    await line.task
    assert reply.body == line.replies[0].body
    assert desk.client.asked == []
    assert sorted(desk.log) == [("capture", COST), ("spend", COST)]
    desk.assert_nothing_left()


async def test_of_two_equal_requests_one_that_ends_hides_not_the_other() -> None:
    desk, first, second = Desk(), Line(), Line()
    desk.begin(first, headers=SDK)
    desk.begin(second, headers=SDK)
    desk.client.attempts[0].answer()
    again = asyncio.create_task(retry(desk))
    await asyncio.sleep(SOON_S)
    assert second.task is not None
    desk.client.attempts[1].answer()
    await asyncio.gather(again, second.task)
    assert [what for what, _ in desk.log].count("capture") == 2
    desk.assert_nothing_left()


async def test_what_the_socket_did_not_take_is_paid_once_it_has() -> None:
    desk, line = Desk(), Line(rest="rest")
    desk.begin(line)
    desk.client.attempts[0].answer()
    assert desk.log == [("spend", COST)]
    assert line.task is not None
    await line.task
    assert desk.log == [("spend", COST), ("capture", COST)]
    assert desk.counts.codes == ["ok"]
    desk.assert_nothing_left()


async def test_a_delivery_that_breaks_off_is_paid_and_its_retry_gets_it_free() -> None:
    desk, line = Desk(), Line(rest="rest", ends=Delivery.BROKEN_OFF)
    desk.begin(line, headers=SDK)
    desk.client.attempts[0].answer()
    assert line.task is not None
    await line.task
    assert (await retry(desk)).headers["idempotent-replayed"] == "true"
    assert desk.log == [("spend", COST), ("capture", COST)]
    assert desk.counts.codes == ["broken_off"]
    desk.assert_nothing_left()


async def test_a_delivery_that_never_began_costs_nothing() -> None:
    desk, line = Desk(), Line(rest="rest", ends=ConnectionResetError())
    desk.begin(line)
    desk.client.attempts[0].answer()
    assert line.task is not None
    with pytest.raises(ConnectionResetError):
        await line.task
    assert desk.log == [("spend", COST), ("release", COST)]
    desk.assert_nothing_left()


@pytest.mark.parametrize("where", ["slots", "fleet", "client"])
async def test_a_bug_while_it_is_asked_for_keeps_nothing(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk()

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    broken_part: dict[str, tuple[object, str]] = {
        "slots": (desk.world.slots, "take_now"),
        "fleet": (desk.world.fleet, "try_now"),
        "client": (desk.client, "ask"),
    }
    monkeypatch.setattr(*broken_part[where], broken)
    with pytest.raises(ZeroDivisionError):
        desk.ask(Line(), key=SINGLE_KEY)
    assert desk.log == [("spend", COST), ("release", COST)]
    assert desk.world.slots.in_use["key_7"] == 0
    desk.assert_nothing_left()


async def test_a_bug_of_ours_is_explained_and_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    desk, line = Desk(), Line()
    asked = desk.begin(line)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(type(asked.call), "render", broken)
    desk.client.attempts[0].answer()
    assert line.task is not None
    with pytest.raises(ZeroDivisionError):
        await line.task
    assert desk.log == [("spend", COST), ("release", COST)]
    desk.assert_nothing_left()
