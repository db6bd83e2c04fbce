"""What is marked of a traced request: each step of it once, however it goes; nothing of its text."""

import asyncio
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest

from embedmesh.dialects.openai.chat import Chat
from embedmesh.flow.bill import Bill
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.expected import ExpectedOutput
from embedmesh.flow.generate import Generation
from embedmesh.flow.leases import Leases
from embedmesh.flow.operation import Operation
from embedmesh.flow.paid import serve
from embedmesh.flow.traced import TracedBatchOperation, TracedOperation
from embedmesh.flow.traced_nodes import RequestTracing, TracedAttempts, TracedNode
from embedmesh.flow.traced_straight import TracedStraight
from embedmesh.http.failures import envelope
from embedmesh.node.traced import NodeTraces
from embedmesh.rules.caching import CachePolicy
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import Failure, InsufficientQuota, InvalidApiKey, NodeBroke, NodeBusy
from embedmesh.rules.exchange import Delivery, Reply, RequestHead, StreamedReply
from embedmesh.rules.forwarding import AttemptOwner, Part
from embedmesh.rules.holds import Hold
from embedmesh.rules.models import Modality, Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.traces import Sampler, Trace, Tracing, asking_as, traceparent_line, traceparent_of
from tests.flow.reranking import BY_SEARCHES, SPECIALS, ranking_world
from tests.flow.reranking import PLAIN as RANKING
from tests.flow.reranking import body as ranking_body
from tests.flow.sealed import envelope as sealed_envelope
from tests.flow.speaking import HELLO, WORDS, Reader, Speakers, answer, speaking_world, usage_event
from tests.flow.test_confidential import Scene
from tests.flow.test_straight import Desk, Line, Nodes
from tests.flow.world import EMBEDDINGS, GOOD_KEY, MODEL, POOR_KEY, ScriptedWorld
from tests.rules.test_traces import ALL, KeptTraces

SENTINEL = "jackdaw"
BODY = msgspec.json.encode({"model": "tiny", "input": SENTINEL[:6], "user": "magpie"})
PLAIN = msgspec.json.encode({"model": "tiny", "input": SENTINEL[:6]})
STEPS = ["count", "hold", "queue", "attempt", "verify", "capture"]
WRONG = EmbedVectors(tokens=8, data=b"\0" * 16)
ASKS = traceparent_of(0xABC, 0xDEF)


class TellingNodes(Nodes):
    """Notes with which `traceparent` each was asked."""

    def __init__(self, *script: Any) -> None:
        super().__init__(*script)
        self.told: list[bytes] = []

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        self.told.append(traceparent_line(request_id))
        return await super().embed(part, model, counted, request_id)

    def ask(self, part: Part, model: Model, counted: Counted, request_id: str, owner: AttemptOwner) -> Any:
        self.told.append(traceparent_line(request_id))
        return super().ask(part, model, counted, request_id, owner)


class TracedDesk(Desk):
    """A straight path that traces, and the hard way beside it; n0 is trusted, others are not."""

    def __init__(self, *script: Any, count: int = 1, a_second: int = 100, below: int = ALL) -> None:
        self.nodes = TellingNodes(*script)
        super().__init__(self.nodes, count=count)
        self.kept = KeptTraces()
        self.tracing = Tracing(Sampler(below, True), self.kept, a_second)
        self.traced = traced_with(self.tracing, self.world)
        self.straight = TracedStraight(self.world, EMBEDDINGS, self.room, self.counts, self._observe, self.traced)

    async def serve(self, key: str = GOOD_KEY, body: bytes = BODY, asks: str | None = None, **head: Any) -> None:
        one = TracedOperation(EMBEDDINGS, self.traced, asks)

        async def receive(account_id: str) -> bytes:
            return body

        async def deliver(reply: Reply | StreamedReply) -> Delivery:
            return Delivery.WHOLE

        told = RequestHead(f"Bearer {key}", **head)
        await one.ending(serve(self.world, cast(Operation, one), told, receive, deliver))

    @property
    def trace(self) -> Trace:
        """The only one."""
        (trace,) = self.kept.traces
        assert trace.over
        return trace

    def assert_told_nothing_of_the_text(self) -> None:
        told = repr([(trace, trace.marks) for trace in self.kept.traces])
        assert "jackd" not in told and "magpie" not in told and "em_" not in told


def traced_with(tracing: Tracing, world: ScriptedWorld) -> RequestTracing:
    def node_of(node_id: str) -> TracedNode:
        return TracedNode(node_id == "n0", f"http://{node_id}.example:80")

    return RequestTracing(tracing, node_of, world.clock.monotonic)


def steps(trace: Trace) -> list[str]:
    """With their errors."""
    return [f"{mark.name} {mark.error}".strip() for mark in trace.marks]


async def test_a_straight_request_has_each_step_once() -> None:
    desk, line = TracedDesk(), Line()
    asked = desk.begin(line, PLAIN, headers={"traceparent": ASKS})
    desk.world.clock.now += 0.25
    desk.client.attempts[0].answer()
    trace = desk.trace
    assert steps(trace) == STEPS
    assert (trace.name, trace.trace_id, trace.parent_id, trace.error) == ("embeddings acme/tiny", 0xABC, 0xDEF, "")
    assert (trace.began, trace.ended) == (1_000.0, 1_000.25)
    attempt = trace.marks[3]
    assert (attempt.began, attempt.ended, attempt.attributes["embedmesh.node_id"]) == (1_000.0, 1_000.25, "n0")
    assert desk.nodes.told == [f"Traceparent: {traceparent_of(0xABC, attempt.span_id)}\r\n".encode()]
    assert trace.attributes == {
        "embedmesh.account_id": "acct",
        "embedmesh.cost_nanousd": 12,
        "embedmesh.request_id": asked.request_id,
        "gen_ai.operation.name": "embeddings",
        "gen_ai.request.model": "acme/tiny",
        "gen_ai.usage.input_tokens": 8,
    }
    assert desk.counts.codes == ["ok"]
    desk.assert_nothing_left()
    desk.assert_told_nothing_of_the_text()


async def test_what_is_not_ordinary_goes_on_in_the_same_trace() -> None:
    """A node fails, the next one answers wrongly, and the third rightly: three attempts, each with its end."""
    desk, line = TracedDesk(WRONG, None, count=3), Line()
    desk.begin(line, PLAIN)
    desk.client.attempts[0].fail(NodeBroke("it broke"))
    assert line.task is not None
    await line.task
    assert steps(desk.trace) == [
        "count", "hold", "queue", "attempt closed", "queue", "attempt", "verify zero", "queue", "attempt", "verify",
        "capture",
    ]  # fmt: skip
    assert desk.trace.error == ""
    nodes = [mark.attributes["embedmesh.node_id"] for mark in desk.trace.marks if mark.name == "attempt"]
    assert sorted(map(str, nodes)) == ["n0", "n1", "n2"]
    told = {node: bool(line) for node, line in zip(nodes, desk.nodes.told, strict=True)}
    assert told == {"n0": True, "n1": False, "n2": False}, "only a trusted node is told of the trace"
    desk.assert_nothing_left()
    desk.assert_told_nothing_of_the_text()


async def test_a_caller_that_leaves() -> None:
    desk, line = TracedDesk(), Line()
    desk.begin(line, PLAIN).caller_left()
    assert (steps(desk.trace), desk.trace.error) == (["count", "hold", "queue", "attempt cancelled"], "dropped")
    desk.assert_nothing_left()


async def test_what_does_not_go_straight_takes_no_share_of_the_rate_for_that() -> None:
    desk = TracedDesk(a_second=1)
    assert desk.ask(Line(), BODY) is None  # it has a user
    await desk.serve()
    assert steps(desk.trace) == STEPS
    assert desk.tracing.over_rate == 0


@pytest.mark.parametrize(
    ("script", "found", "error"),
    [
        ([], STEPS, ""),
        ([NodeBusy("full")], ["count", "hold", "queue", "attempt busy", *STEPS[2:]], ""),
        ([WRONG], ["count", "hold", "queue", "attempt", "verify zero", *STEPS[2:]], ""),
        ([NodeBroke("")] * 9, ["count", "hold", *["queue", "attempt closed"] * 3], "no_node_available"),
    ],
)
async def test_the_hard_way(script: list[Any], found: list[str], error: str) -> None:
    desk = TracedDesk(*script, count=4)
    try:
        await desk.serve(asks=ASKS)
    except Failure as failure:
        assert failure.code == error
    assert (steps(desk.trace), desk.trace.error, desk.trace.parent_id) == (found, error, 0xDEF)
    desk.assert_nothing_left()
    desk.assert_told_nothing_of_the_text()


async def test_who_is_refused() -> None:
    """A stranger leaves no trace; a caller without money one that says so; wrong requests none: they are cheap."""
    desk = TracedDesk()
    with pytest.raises(InvalidApiKey):
        await desk.serve("em_nobody", asks=ASKS)
    with pytest.raises(Failure):
        await desk.serve(body=b'{"model":"tiny"}', asks=ASKS)
    assert desk.kept.traces == []
    with pytest.raises(InsufficientQuota):
        await desk.serve(POOR_KEY, asks=ASKS)
    assert desk.trace.error == "insufficient_quota"
    assert desk.trace.attributes["embedmesh.account_id"] == "poor"


async def test_who_asks_not_to_be_traced_is_not_and_a_rate_is_one() -> None:
    desk = TracedDesk(a_second=1)
    await desk.serve(asks=ASKS[:-2] + "00")
    assert desk.kept.traces == []
    for _ in range(5):
        await desk.serve(asks=ASKS)
        line = Line()
        desk.begin(line, PLAIN, headers={"traceparent": ASKS})
        desk.client.attempts[-1].answer()
    assert steps(desk.trace) == STEPS
    assert desk.tracing.over_rate == 9
    assert desk.counts.codes == ["ok"] * 5


async def test_an_answer_from_the_cache_and_one_that_another_request_made() -> None:
    desk = TracedDesk()
    caller = Caller("acct", "key_1", frozenset({"embeddings"}), cache=CachePolicy.FREE)

    class Keys:
        async def find(self, token: str) -> Caller:
            return caller

    desk.world = msgspec.structs.replace(desk.world, keys=Keys())
    await desk.serve()
    await desk.serve()
    made, cached = desk.kept.traces
    assert (steps(made), steps(cached)) == (STEPS, ["count"])
    assert cached.attributes["embedmesh.cached"] is True
    desk.kept.traces.clear()
    caller = Caller("acct", "key_1", frozenset({"embeddings"}))
    await asyncio.gather(desk.serve(retries=0), desk.serve(retries=1))
    first, second = sorted(desk.kept.traces, key=lambda trace: -len(trace.marks))
    assert (steps(first), steps(second)) == (STEPS, ["count"])


async def test_a_hedge() -> None:
    """Two nodes have the same part: the slower one is cancelled, which is no fault."""
    desk = TracedDesk(count=2)
    scheduler: Any = desk.world.fleet
    scheduler.retries._hedge = True
    answers = desk.nodes.embed

    async def first_hangs(*given: Any) -> EmbedVectors:
        if not desk.nodes.told:
            desk.nodes.told.append(b"")
            await asyncio.sleep(3_600)
        return await answers(*given)

    desk.nodes.embed = first_hangs  # type: ignore[method-assign, assignment]
    await desk.serve()
    assert steps(desk.trace) == [
        "count", "hold", "queue", "queue", "attempt", "verify", "attempt cancelled", "capture",
    ]  # fmt: skip
    assert len({mark.attributes["embedmesh.node_id"] for mark in desk.trace.marks if mark.name == "attempt"}) == 2
    assert desk.trace.error == ""


async def test_inputs_that_several_nodes_share() -> None:
    """Each part is an attempt."""
    desk = TracedDesk(count=2)
    body = msgspec.json.encode({"model": "tiny", "input": ["abc"] * 2_000, "user": "u"})
    await desk.serve(body=body)
    trace = desk.trace
    assert trace.error == ""
    rows = [mark.attributes["embedmesh.inputs"] for mark in trace.marks if mark.name == "attempt"]
    assert sum(map(int, rows)) == 2_000
    assert len(rows) > 1
    assert trace.omitted == 0


async def test_a_batchs_lines_have_a_share_of_their_own() -> None:
    """What they take of the rate is not taken from their account's requests; a line names its batch, once a try."""
    desk = TracedDesk(NodeBroke(""), a_second=10)
    lines = cast(Operation, TracedBatchOperation(EMBEDDINGS, desk.traced, "batch_7"))
    caller = Caller("acct", "key_1", frozenset({"embeddings"}))
    call = lines.parse(desk.world, RequestHead(), BODY)
    assert await call.count(desk.world, caller, nobody_asks) == 8
    assert desk.kept.traces == [], "it is counted for its batch's validation, too"
    call.bound(desk.world, caller, claimed=True)
    for _ in range(9):
        hold = Hold("req_1", "acct", 100, 10**15, "key_1")
        with suppress(Failure), Bill(desk.world.ledger, hold, desk.world.clock.monotonic() + 10) as bill:
            await call.work(desk.world, bill)
    failed, *others = desk.kept.traces
    assert (steps(failed), failed.error) == (["queue", "attempt closed"], "no_node_available")
    assert [steps(each) for each in others] == [["queue", "attempt", "verify"]] * 7
    assert others[0].attributes["embedmesh.batch_id"] == "batch_7"
    assert others[0].attributes["gen_ai.usage.input_tokens"] == 8
    await desk.serve()
    assert steps(desk.kept.traces[-1]) == STEPS


async def nobody_asks(model: Model) -> None:
    return None


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
async def test_chat(stream: bool) -> None:
    """A node fails before its first event; of the other the attempt lasts as long as its stream."""
    words = [*WORDS, usage_event(30, 6)] if stream else answer("Well, this is.", prompt_tokens=30, completion_tokens=6)
    world, client, reader = speaking_world(2), Speakers(NodeBroke("gone"), words), Reader()
    kept = KeptTraces()
    traced = traced_with(Tracing(Sampler(ALL, True), kept, 10), world)
    operation = Generation(Chat(), client, Leases(world.ledger, world.clock), ExpectedOutput(), envelope)
    one = TracedOperation(operation, traced, ASKS)

    async def receive(account_id: str) -> bytes:
        return msgspec.json.encode({**HELLO, "stream": stream})

    await one.ending(serve(world, cast(Operation, one), RequestHead(f"Bearer {GOOD_KEY}"), receive, reader))
    (trace,) = kept.traces
    assert (steps(trace), trace.error) == (
        ["count", "hold", "queue", "attempt closed", "queue", "attempt", "capture"],
        "",
    )
    assert trace.name == "chat acme/chat"
    assert trace.attributes["gen_ai.request.stream"] is stream
    assert trace.attributes["gen_ai.usage.input_tokens"] == 30
    assert trace.attributes["gen_ai.usage.output_tokens"] == 6
    assert "something" not in repr(trace.marks) + repr(trace)


async def test_rerank() -> None:
    """By its own name, with the tokens of its pairs, though searches are paid; and none of its texts."""
    world, kept = ranking_world(), KeptTraces()
    one = TracedOperation(RANKING, traced_with(Tracing(Sampler(ALL, True), kept, 10), world), None)

    async def receive(account_id: str) -> bytes:
        return ranking_body([SENTINEL[:6]], model=BY_SEARCHES)

    async def deliver(reply: Reply | StreamedReply) -> Delivery:
        return Delivery.WHOLE

    await one.ending(serve(world, cast(Operation, one), RequestHead(f"Bearer {GOOD_KEY}"), receive, deliver))
    (trace,) = kept.traces
    assert (trace.name, steps(trace)) == (f"rerank {BY_SEARCHES.id}", STEPS)
    told = trace.attributes
    assert (told["gen_ai.usage.input_tokens"], told["embedmesh.cost_nanousd"]) == (3 + 6 + SPECIALS, 2_000)
    assert SENTINEL[:6] not in repr(trace.marks) + repr(trace)


async def test_a_confidential_request() -> None:
    """Its steps and its node; of its text there was nothing to tell, and its end is the call's."""
    scene, kept = Scene(), KeptTraces()
    traced = traced_with(Tracing(Sampler(ALL, True), kept, 10), scene.world)
    real = scene.operation
    for script in ([], [NodeBroke("gone")]):
        terms = await scene.lock()
        scene.node.script = list(script)
        one = TracedOperation(real, traced, None)
        scene.operation = cast(Any, one)
        body, _ = sealed_envelope(b'{"input":"abc","model":"tiny"}', terms.node_key, terms.lock_id)

        async def sent(body: bytes = body) -> Outcome:
            await scene.send(body)
            return Outcome(MODEL.id, 0, 0, Delivery.WHOLE)

        with suppress(Failure):
            await one.ending(sent())
    good, bad = kept.traces
    assert steps(good) == ["count", "hold", "queue", "attempt", "capture"]
    assert good.attributes["embedmesh.confidential"] is True
    assert good.marks[3].attributes["embedmesh.node_id"] == "n0"
    assert (steps(bad), bad.error) == (["count", "hold", "queue", "attempt closed"], "no_node_available")


def test_a_node_that_is_not_trusted_is_told_of_no_trace_whatever_runs_around() -> None:
    desk = TracedDesk()
    trace = desk.tracing.begin(None, "a", 0.0)
    assert trace is not None
    attempts = TracedAttempts(trace, desk.traced)
    for node_id in ("n0", "n1"):
        part = Part(node_id, (0,), 1, 0.1)
        attempts.given(part)
        with asking_as("req_0", ASKS), attempts.asking(part, "req_1"):
            assert bool(traceparent_line()) is bool(traceparent_line("req_1")) is (node_id == "n0")


@pytest.mark.parametrize("modality", ["embeddings", "rerank"])
def test_a_node_names_its_span_as_its_gateway_does(modality: Modality) -> None:
    kept = KeptTraces()
    served = SimpleNamespace(
        model=Model(id="acme/one", width=1, max_tokens=8, price=1, modalities=(modality,)), batch_began=0.0
    )
    ended = NodeTraces(Tracing(Sampler(ALL, True), kept, 10)).around(lambda outcome: None, ASKS, 1.0, served, 8)  # type: ignore[arg-type]
    ended([b"1234"])
    (trace,) = kept.traces
    assert (trace.name, trace.attributes["gen_ai.operation.name"]) == (f"{modality} acme/one", modality)
