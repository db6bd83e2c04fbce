"""The straight way, the fast path and the flow in virtual time: a seed decides who asks, answers, leaves and reads.

In whatever order that happens, each caller gets its own vectors, what was delivered is charged once, and nothing that a
request had taken is left.
"""

import asyncio
import gc
import json
import random
from collections.abc import Callable
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from bench.lives.loop import Loop
from embedmesh.flow import retries
from embedmesh.flow.embed import EmbeddingsCall
from embedmesh.flow.straight import StraightRequest
from embedmesh.gateway.api.embeddings_api import EmbeddingsApi
from embedmesh.gateway.api.metrics import Metrics
from embedmesh.gateway.api.traced_api import TracedEmbeddingsApi
from embedmesh.http.aiohttp_connection import AnyFastExchange
from embedmesh.http.fast_path import FastPath
from embedmesh.http.receive import BodyBudget
from embedmesh.http.straight import StraightPath
from embedmesh.rules.embeddings import Counted, EmbedVectors, numbers_of
from embedmesh.rules.errors import Failure, InternalError, NodeBroke, NodeBusy, NodeUnreachable
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.holds import Charge, Claim, Hold, HoldEnd
from embedmesh.rules.models import Model
from embedmesh.rules.shares import Room
from embedmesh.rules.traces import Sampler, Tracing
from tests.flow.test_traced import traced_with
from tests.flow.world import (
    GOOD_KEY,
    METERED_KEY,
    POOR_KEY,
    SINGLE_KEY,
    MemoryLedger,
    ScriptedNodes,
    make_world,
    right_reply,
    vector_for,
)
from tests.rules.test_traces import KeptTraces

LINE = b"POST /v1/embeddings HTTP/1.1\r\n"
KEYS = [GOOD_KEY] * 6 + [METERED_KEY, SINGLE_KEY, POOR_KEY]
WRONG = EmbedVectors(tokens=5, data=b"\0" * 16)
End = EmbedVectors | Failure | None
ENDS: list[End] = [*[None] * 8, NodeBroke("broke"), NodeBusy("busy"), NodeUnreachable("gone"), WRONG]  # of attempts
TAKES = [10**9, 10**9, 300, 50, 0]  # bytes that a socket takes at once
WORLDS, STEPS = 60, 150
TRACED_WORLDS, HALF = 15, 1 << 63  # half of the requests are traced
WRITE_S = 5.0
REFUSED = {b"402", b"409", b"429", b"502", b"503", b"504"}


class LoopClock:
    def monotonic(self) -> float:
        return asyncio.get_running_loop().time() + 1_000

    def unix_ms(self) -> int:
        return int(self.monotonic() * 1_000)


class Ledger(MemoryLedger):
    """Knows how each hold has ended."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__(tabs=True)
        self.ends: dict[str, list[str]] = {}
        self._dice = dice

    def spend(self, hold: Hold) -> Hold | None:
        spent = super().spend(hold) if self._dice.random() < 0.9 else None
        if spent is not None:
            self._held(hold)
        return spent

    async def hold(self, hold: Hold, claim: Claim | None = None) -> Any:
        prior = await super().hold(hold, claim)
        if prior is None:
            self._held(hold)
        return prior

    def capture(self, hold: Hold, charge: Charge, reply: bytes | None = None) -> None:
        self.ends[hold.hold_id].append("captured")

    def release(self, hold: Hold, why: HoldEnd) -> None:
        self.ends[hold.hold_id].append("released")

    def _held(self, hold: Hold) -> None:
        assert hold.hold_id not in self.ends
        self.ends[hold.hold_id] = []


class Transport:
    """A socket that takes some bytes at once, and the others when its caller reads."""

    def __init__(self, takes: int, connection: "Connection") -> None:
        self.out = self._buffer = b""
        self.closing = False
        self.takes = takes
        self._connection = connection

    def is_closing(self) -> bool:
        return self.closing

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def get_extra_info(self, name: str) -> None:
        return None

    def write(self, data: bytes) -> None:
        if not self.closing:
            now = 0 if self._buffer else self.takes
            self.out += bytes(data[:now])
            self._buffer += bytes(data[now:])

    def abort(self) -> None:
        if not self.closing:
            self.closing, self._buffer = True, b""
            asyncio.get_running_loop().call_soon(self._connection.lost)

    close = abort

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...

    def read_by_caller(self) -> None:
        if self._buffer and not self.closing:
            self.out, self._buffer = self.out + self._buffer, b""
            self._connection.writable()


class Connection:
    """Does what `ServerConnection` does for the fast path."""

    def __init__(self, life: "Life") -> None:
        self.transport = Transport(life.dice.choice(TAKES), self)
        self.asked: list[list[str]] = []
        self.stopped = False
        self._life = life
        self._path = life.path.on(cast(asyncio.Transport, self.transport))
        self._exchange: AnyFastExchange | None = None
        self._lost = False

    def received(self, data: bytes) -> None:
        if self._exchange is not None:
            self._exchange.feed(data)
        elif not self.transport.closing:
            exchange = self._path.begin(cast(asyncio.Transport, self.transport), data, self._life.explain, self._ended)
            assert exchange is not None
            self._exchange = None if exchange.over else exchange

    def writable(self) -> None:
        if self._exchange is not None:
            self._exchange.resume_writing()

    def lost(self) -> None:
        self.transport.closing = True
        if self._exchange is not None and not self._lost:
            self._exchange.lost()
        self._lost = True

    async def stop(self, timeout_s: float) -> None:
        self.stopped = True
        if self._exchange is not None:
            await self._exchange.stopped(timeout_s)

    def _ended(self, after: bytes) -> None:
        self._exchange = None
        if after and not self.transport.closing:
            self.received(after)


class Nodes(ScriptedNodes):
    """What they are asked waits until somebody ends it."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.open: dict[object, Callable[[End], None]] = {}
        self._dice = dice

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Any:
        return Attempt(self, _ids(part, counted), owner) if self._dice.random() < 0.9 else None

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        answer: asyncio.Future[EmbedVectors] = asyncio.get_running_loop().create_future()

        def end(how: End) -> None:
            if answer.done():
                return
            if isinstance(how, Failure):
                answer.set_exception(how)
            else:
                answer.set_result(how or right_reply(_ids(part, counted)))

        self.open[answer] = end
        try:
            return await answer
        finally:
            self.open.pop(answer, None)

    def end_one(self) -> None:
        one = self._dice.choice(list(self.open))
        self.open.pop(one)(self._dice.choice(ENDS))


class Attempt:
    def __init__(self, nodes: Nodes, ids: list[list[int]], owner: AttemptOwner) -> None:
        self._nodes, self._ids, self._owner = nodes, ids, owner
        nodes.open[self] = self._end

    def cancel(self) -> None:
        self._nodes.open.pop(self, None)

    def _end(self, how: End) -> None:
        if isinstance(how, NodeBroke | NodeBusy | NodeUnreachable):
            self._owner.failed(how)
        else:
            assert not isinstance(how, Failure)
            self._owner.answered(how or right_reply(self._ids))


def asked_for(texts: list[str], headers: dict[str, str]) -> bytes:
    body = json.dumps({"model": "tiny", "input": texts}).encode()
    headers |= {"host": "a", "content-type": "application/json", "content-length": str(len(body))}
    return LINE + "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode() + b"\r\n" + body


def _ids(part: Part, counted: Counted) -> list[list[int]]:
    assert counted.ids is not None
    return [numbers_of(counted.ids[row]) for row in part.rows]


class Life:
    """One world, from its first request to its judgement."""

    def __init__(self, seed: int, *, traced: bool = False) -> None:
        self.dice = dice = random.Random(seed)
        self.nodes, self.ledger, self.room = Nodes(dice), Ledger(dice), Room(30, "full")
        world = make_world(self.nodes, nodes=dice.choice([1, 2, 3]))
        self.clock = world.clock
        self.world = msgspec.structs.replace(world, ledger=self.ledger)
        self.bodies = BodyBudget(10**6)
        self.traces = KeptTraces()
        parts = self.world, Metrics(dict), self.room, self.bodies, WRITE_S
        if traced:
            tracing = Tracing(Sampler(HALF, True), self.traces, 10**6)
            self.api: EmbeddingsApi = TracedEmbeddingsApi(*parts, traced_with(tracing, self.world))
        else:
            self.api = EmbeddingsApi(*parts)
        fast_path = FastPath(LINE, self.api.answer, self.bodies, write_s=WRITE_S)
        self.path = StraightPath(fast_path, self.api.straight)
        self.connections: list[Connection] = []

    def explain(self, error: Exception, request_id: str) -> Failure:
        assert isinstance(error, Failure | InternalError), repr(error)
        return error

    async def live(self) -> None:
        stops = []
        for _ in range(STEPS):
            some, roll = self.dice.choice(self.connections or [Connection(self)]), self.dice.random()
            if roll < 0.4:
                self._ask(some)
            elif roll < 0.7:
                if self.nodes.open:
                    self.nodes.end_one()
            elif roll < 0.8:
                self.dice.choice([some.transport.abort, some.lost])()
                await self._pass(0)
                while self.nodes.open and self.dice.random() < 0.7:
                    self.nodes.end_one()
            elif roll < 0.86:
                await self._pass(0)
                some.transport.read_by_caller()
            elif roll < 0.88:
                stops.append(asyncio.ensure_future(some.stop(self.dice.choice([0.001, 1.0]))))
            else:
                await self._pass(self.dice.choice([0, 0.01, 0.01, 0.01, 0.7, 4]))
        for _ in range(STEPS):
            while self.nodes.open:
                self.nodes.end_one()
            await self._pass(0.01)
        for each in self.connections:
            each.transport.abort()
        await self._pass(90)
        await self.world.single_flight.stop()
        await asyncio.gather(*stops)

    async def _pass(self, seconds: float) -> None:
        await asyncio.sleep(seconds)
        self.clock.now = LoopClock().monotonic()

    def _ask(self, some: Connection) -> None:
        dice = self.dice
        if some.transport.closing or dice.random() < 0.4:
            some = Connection(self)
        if some not in self.connections:
            self.connections.append(some)
        texts = ["".join(dice.choices("abcdefg", k=3)) for _ in range(dice.choice([1, 1, 2, 3]))]
        texts = ["abc"] if dice.random() < 0.3 else texts
        headers = {"authorization": f"Bearer {dice.choice(KEYS)}"}
        if dice.random() < 0.5:
            headers["x-stainless-retry-count"] = dice.choice(["0", "0", "1"])
        if dice.random() < 0.05:
            headers["idempotency-key"] = dice.choice("xy")
        some.asked.append(texts)
        some.received(asked_for(texts, headers))

    def judge(self) -> None:
        world = self.world
        assert not self.api.straight.in_flight
        assert (self.room.taken, world.replies.taken, self.bodies.taken, self.bodies.awaited.taken) == (0, 0, 0, 0)
        assert not any(world.slots.in_use.values())
        assert not self.nodes.open
        assert not world.fleet._running.parts
        for node in world.fleet.registry:
            assert (node.load.parts, node.load.tokens) == (0, 0)
        assert {tuple(ends) for ends in self.ledger.ends.values()} <= {("captured",), ("released",)}
        self._judge_traces()
        for each in self.connections:
            self._judge_replies(each)

    def _judge_traces(self) -> None:
        """Each is told once, as the ledger has it."""
        traces = self.traces.traces
        assert len({id(trace) for trace in traces}) == len(traces)
        for trace in traces:
            captured = [mark.name for mark in trace.marks].count("capture")
            assert captured <= (self.ledger.ends.get(str(trace.attributes.get("embedmesh.request_id"))) == ["captured"])
            if not trace.error and captured:
                assert {"count", "hold", "queue", "attempt", "verify"} <= {mark.name for mark in trace.marks}

    def _judge_replies(self, connection: Connection) -> None:
        left = connection.transport.out
        for texts in connection.asked:
            head, found, left = left.partition(b"\r\n\r\n")
            if not found:
                return
            status, *lines = head.split(b"\r\n")
            headers = dict(line.lower().split(b": ", 1) for line in lines)
            size = int(headers[b"content-length"])
            body, left = left[:size], left[size:]
            if b" 200 " not in status:
                assert status.split()[1] in REFUSED
                continue
            if body and not connection.stopped:
                assert self.ledger.ends[headers[b"x-embedmesh-request"].decode()] == ["captured"] or (
                    b"idempotent-replayed" in headers
                )
            if len(body) == size:
                vectors = [each["embedding"] for each in json.loads(body)["data"]]
                for text, vector in zip(texts, vectors, strict=True):
                    assert np.allclose(vector, vector_for([ord(letter) % 31 for letter in text]))


@pytest.mark.parametrize(
    ("seed", "traced"), [(seed, False) for seed in range(WORLDS)] + [(seed, True) for seed in range(TRACED_WORLDS)]
)
def test_nothing_is_left_and_nobody_gets_what_is_anothers(
    seed: int, traced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retries, "LINGERING_ACCOUNT_MAX", 2)
    complaints: list[dict[str, Any]] = []

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        life = Life(seed, traced=traced)
        await life.live()
        life.judge()
        assert bool(life.traces.traces) == traced

    with asyncio.Runner(loop_factory=lambda: Loop(random.Random(seed), disorder=0.0)) as runner:
        runner.run(run())
    assert complaints == []


def of_requests() -> set[int]:
    kinds = (StraightRequest, EmbeddingsCall, Attempt)
    return {id(each) for each in gc.get_objects() if isinstance(each, kinds)}


@pytest.mark.parametrize("retries", [{}, {"x-stainless-retry-count": "0"}], ids=["plain", "sdk"])
def test_an_ordinary_request_that_has_ended_is_no_garbage(retries: dict[str, str]) -> None:
    """What is under way while garbage is collected would else stay with its texts for a hundred thousand requests."""

    async def run() -> None:
        life = Life(1)
        life.dice.random = lambda: 0.5  # type: ignore[method-assign]  # nothing is out of the ordinary
        connection = Connection(life)
        connection.transport.takes = TAKES[0]
        raw = asked_for(["abc"], {"authorization": f"Bearer {GOOD_KEY}", **retries})
        gc.collect()
        gc.disable()
        before = of_requests()  # of other tests, if they are kept
        try:
            for _ in range(10):
                connection.received(raw)
                assert life.api.straight.in_flight
                life.nodes.open.popitem()[1](None)
            after = of_requests()
        finally:
            gc.enable()
        assert after == before

    with asyncio.Runner(loop_factory=lambda: Loop(random.Random(1), disorder=0.0)) as runner:
        runner.run(run())
