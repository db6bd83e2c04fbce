"""Confidential chat, completions and images through the spine: a lock pays what a sidecar has signed for."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.flow.confidential_generation import ConfidentialGeneration
from embedmesh.flow.deliver import Outcome
from embedmesh.flow.leases import Leases
from embedmesh.flow.lock import lock_node
from embedmesh.flow.paid import serve
from embedmesh.gateway.api.confidential_generation_api import GenerationEnvelopeForm
from embedmesh.rules.confidential import SDK_SCHEME, FoundLock, LockTerms, Scheme, SealedAnswer, SealedCall, SealingNode
from embedmesh.rules.errors import Failure, NodeBroke, NodeBusy
from embedmesh.rules.exchange import Delivery, RequestHead
from embedmesh.rules.generation import Generating, StreamEnd
from embedmesh.rules.holds import Hold, Meter, PriorRequest
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Caller
from embedmesh.rules.sealed_generation import CheckedEvent, GenerationStatement, SealedBounds
from tests.flow.sealed import DictLocks, SealedNode, envelope
from tests.flow.speaking import CHAT, PAINTER, Reader
from tests.flow.world import CATALOGUE, GOOD_KEY, ScriptedWorld, make_world

TEXT = json.dumps({"model": CHAT.id, "messages": [{"role": "user", "content": "Say something."}]}).encode()
Step = GenerationStatement | BaseException | Callable[[], Awaitable[Any]]
UNITS = 200
HELD = UNITS * 3  # at the dearer price


def said(number: int = 0, output: int = 0, *, final: bool = False, **more: Any) -> GenerationStatement:
    """What a sidecar signs: nine tokens of input."""
    members: dict[str, Any] = {
        "version": 1,
        "node_id": "n",
        "lock": 1,
        "request_digest": bytes(32),
        "reply_digest": bytes(32),
        "modality": "chat",
        "stream": True,
        "number": number,
        "final": final,
        "status": 200,
        "input": 9,
        "cached": 0,
        "output": output,
        "images": 0,
        "size": "",
        "estimated": not final,
        "time_ms": 1,
    }
    return GenerationStatement(**members | more)


def stream(words: int = 3) -> list[Step]:
    """A stream's statements: a token an event, and the end."""
    return [*(said(number, number + 1) for number in range(words)), said(words, words, final=True)]


def event_of(statement: GenerationStatement) -> CheckedEvent:
    return CheckedEvent(SealedAnswer(b"{}", bytes(64), b"sealed %d" % statement.number), statement)


class ScriptedEvents:
    """Implements `SealedStream`."""

    def __init__(self, steps: list[Step]) -> None:
        self._steps = list(steps)
        self.end: StreamEnd | None = None
        self.closed = asyncio.Event()
        self.read = 0

    async def next(self) -> CheckedEvent | None:
        while self._steps:
            step = self._steps.pop(0)
            if isinstance(step, BaseException):
                raise step
            if isinstance(step, GenerationStatement):
                self.read += 1
                return event_of(step)
            waiting = asyncio.ensure_future(step())
            closing = asyncio.ensure_future(self.closed.wait())
            await asyncio.wait({waiting, closing}, return_when=asyncio.FIRST_COMPLETED)
            waiting.cancel()
            if self.closed.is_set():
                raise NodeBroke("closed")
        self.end = "whole"
        return None

    def close(self) -> None:
        self.closed.set()


@dataclass
class ScriptedSidecar(SealedNode):
    """The node `n0`: each request takes the next of the script."""

    answers: list[Any] = field(default_factory=list)
    bounds: list[SealedBounds] = field(default_factory=list)
    streams: list[ScriptedEvents] = field(default_factory=list)

    def choose_sealing(self, model: Model, scheme: Scheme, among: frozenset[str] | None = None) -> SealingNode | None:
        return SealingNode("n0", 7, self.signed, self.document)

    async def generate(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> CheckedEvent:
        self.asked.append(call)
        self.bounds.append(bounds)
        step = self.answers.pop(0)
        if isinstance(step, BaseException):
            raise step
        return event_of(step)

    async def stream(
        self, terms: LockTerms, call: SealedCall, modality: Generating, bounds: SealedBounds, request_id: str
    ) -> ScriptedEvents:
        self.asked.append(call)
        self.bounds.append(bounds)
        self.streams.append(ScriptedEvents(self.answers.pop(0)))
        return self.streams[-1]


class HeldLocks(DictLocks):
    """Their holds are as large as they were opened."""

    async def open(self, terms: LockTerms, hold: Hold) -> None:
        await super().open(terms, hold)
        self.amount = hold.amount_nanousd

    async def redeem(self, found: FoundLock, body_hash: bytes, deadline_ms: int) -> Hold | PriorRequest:
        got = await super().redeem(found, body_hash, deadline_ms)
        return msgspec.structs.replace(got, amount_nanousd=self.amount) if isinstance(got, Hold) else got


class Scene:
    """A world with one sidecar."""

    def __init__(self, *answers: Any, model: Model = CHAT) -> None:
        world = make_world()
        world.fleet.registry.answered_right(world.node("n0"), [CHAT.id, PAINTER.id])
        models = (*CATALOGUE.models, model, *(each for each in (CHAT, PAINTER) if each.id != model.id))
        self.world: ScriptedWorld = msgspec.structs.replace(world, catalogue=Catalogue(models))
        self.node = ScriptedSidecar(self.world, answers=list(answers))
        self.locks = HeldLocks(self.world)
        self.leases = Leases(self.world.ledger, self.world.clock)

    async def lock(self, model: Model = CHAT, units: int = UNITS) -> LockTerms:
        caller = self.world.keys.known(GOOD_KEY, self.world.clock.monotonic())
        assert isinstance(caller, Caller)
        terms, _ = await lock_node(self.world, self.locks, self.node, caller, model.id, units, 30, SDK_SCHEME)
        return terms

    async def body(self, model: Model = CHAT, *, stream: bool = False, text: bytes = TEXT, units: int = UNITS) -> bytes:
        """A request, and a lock for it."""
        terms = await self.lock(model, units)
        body, _ = envelope(text, terms.node_key, terms.lock_id, model_name=model.id, stream=stream)
        return body

    async def send(self, body: bytes, reader: Reader, modality: Generating = "chat") -> Outcome:
        operation = ConfidentialGeneration(modality, GenerationEnvelopeForm(), self.locks, self.node, self.leases)

        async def receive(account_id: str) -> bytes:
            return body

        return await serve(self.world, operation, RequestHead(f"Bearer {GOOD_KEY}"), receive, reader)

    async def refused(self, body: bytes, modality: Generating = "chat") -> str:
        with pytest.raises(Failure) as failure:
            await self.send(body, Reader(), modality)
        return failure.value.code

    @property
    def log(self) -> list[tuple[str, int]]:
        return self.world.ledger.log

    def metered(self) -> dict[Meter, int]:
        (charge,) = self.world.ledger.charges
        return {each.meter: each.quantity for each in charge.meters if each.quantity}


async def test_a_whole_answer_is_charged_by_its_signed_counts_at_two_prices() -> None:
    scene, reader = Scene(said(0, 5, final=True, stream=False, cached=4)), Reader()
    await scene.send(await scene.body(), reader)
    assert scene.log == [("hold", HELD), ("capture", 5 * 1 + 4 // 2 + 5 * 3)]
    assert scene.metered() == {Meter.INPUT: 5, Meter.CACHED: 4, Meter.OUTPUT: 5}
    reply = json.loads(reader.body)
    assert reply["usage"]["total_tokens"] == 14 and reply["usage"]["completion_tokens"] == 5
    assert scene.node.asked[0].units == UNITS and scene.node.bounds[0].tokens == UNITS


async def test_the_same_body_again_gets_the_same_ciphertext_and_no_second_charge() -> None:
    scene, first, second = Scene(said(0, 5, final=True, stream=False)), Reader(), Reader()
    body = await scene.body()
    await scene.send(body, first)
    await scene.send(body, second)
    assert first.body == second.body and len(scene.node.asked) == 1
    assert [what for what, _ in scene.log] == ["hold", "capture"]


async def test_a_stream_is_charged_by_its_last_event() -> None:
    """No `[DONE]`; usage is told once it is known."""
    scene, reader = Scene(stream()), Reader()
    outcome = await scene.send(await scene.body(stream=True), reader)
    assert [("usage" in event, event["ciphertext"] != "") for event in reader.events] == [(False, True)] * 3 + [
        (True, True)
    ]
    assert outcome.delivery is Delivery.WHOLE and scene.node.streams[0].closed.is_set()
    assert scene.log == [("hold", HELD), ("capture", 9 + 3 * 3)]


async def test_a_stream_s_body_again_is_refused_at_once() -> None:
    """Also while the first is under way: there will be no reply to wait for."""
    scene, reader = Scene([*stream()[:2], asyncio.Event().wait]), Reader()
    body = await scene.body(stream=True)
    asking = asyncio.create_task(scene.send(body, reader))
    while len(reader.parts) < 2:
        await asyncio.sleep(0)
    assert await asyncio.wait_for(scene.refused(body), 1) == "lock_used"
    assert reader.reply is not None
    reader.reply.left()
    await asking
    assert await scene.refused(body) == "lock_used"
    assert len(scene.node.asked) == 1 and [what for what, _ in scene.log] == ["hold", "capture"]


@pytest.mark.parametrize("read", range(1, 5))
async def test_who_leaves_pays_the_input_and_what_was_handed_over(read: int) -> None:
    scene = Scene(stream(10))
    outcome = await scene.send(await scene.body(stream=True), Reader(parts_max=read))
    assert outcome.delivery is Delivery.BROKEN_OFF and scene.node.streams[0].closed.is_set()
    assert scene.metered() == {Meter.INPUT: 9, Meter.OUTPUT: read}
    assert scene.world.node("n0").load.parts == 0


async def test_who_leaves_while_the_node_is_silent_stops_it() -> None:
    scene, reader = Scene([said(0, 1), asyncio.Event().wait]), Reader()
    asking = asyncio.create_task(scene.send(await scene.body(stream=True), reader))
    while not reader.parts:
        await asyncio.sleep(0)
    assert reader.reply is not None
    reader.reply.left()
    await asking
    assert scene.node.streams[0].closed.is_set() and scene.metered() == {Meter.INPUT: 9, Meter.OUTPUT: 1}


@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("ending", [[NodeBroke("cut")], []], ids=["broken", "ended"])
async def test_a_node_that_breaks_off_ends_the_stream_with_an_error(partial: bool, ending: list[Step]) -> None:
    """And costs nothing, unless the operator charges for a part. The reader finds no final statement either way."""
    scene = Scene([said(0, 1), *ending], model=msgspec.structs.replace(CHAT, charge_partial=partial))
    reader = Reader()
    await scene.send(await scene.body(stream=True), reader)
    assert reader.events[-1]["error"]["code"] and len(reader.events) == 2
    assert [what for what, _ in scene.log] == ["hold", "capture" if partial else "release"]


@pytest.mark.parametrize(
    ("failure", "code"), [(NodeBroke("broke"), "no_node_available"), (NodeBusy("b"), "overloaded")]
)
@pytest.mark.parametrize("streams", [False, True])
async def test_no_second_node_is_asked(failure: BaseException, code: str, streams: bool) -> None:
    scene = Scene([failure] if streams else failure)
    assert await scene.refused(await scene.body(stream=streams)) == code
    assert len(scene.node.asked) == 1 and scene.log == [("hold", HELD), ("release", HELD)]
    assert scene.world.node("n0").load.parts == 0


@pytest.mark.parametrize("streams", [False, True])
async def test_what_the_node_refuses_is_free_and_why_is_sealed(streams: bool) -> None:
    no = said(0, 0, final=True, status=400, input=0, stream=streams)
    scene = Scene([no] if streams else no)
    with pytest.raises(Failure) as failure:
        await scene.send(await scene.body(stream=streams), Reader())
    assert failure.value.envelope is not None
    assert json.loads(failure.value.envelope(failure.value))["error"]["sealed"]["ciphertext"]
    assert scene.log == [("hold", HELD), ("release", HELD)]


async def test_a_count_below_what_the_length_allows_is_charged_as_the_least() -> None:
    scene = Scene(said(0, 5, final=True, stream=False, input=1))
    await scene.send(await scene.body(text=b"x" * 10_000, units=5_000), Reader())
    assert scene.metered()[Meter.INPUT] == (10_000 - 256) // 128


async def test_the_bound_of_the_input_is_that_of_its_length_and_of_the_lock() -> None:
    for text, units, most in ((b"x" * 100, 5_000, 100 + 10 * (1 + 100 // 28)), (b"x" * 3_000, 500, 500)):
        scene = Scene(said(0, 5, final=True, stream=False))
        await scene.send(await scene.body(text=text, units=units), Reader())
        assert scene.node.bounds[0].input == most


async def test_an_image_costs_what_its_size_does_and_the_lock_holds_the_dearest() -> None:
    picture = said(0, final=True, stream=False, modality="images", input=0, images=1, size="1x1", estimated=False)
    scene, reader = Scene(picture), Reader()
    await scene.send(await scene.body(PAINTER, text=b"{}", units=8_192), reader, "images")
    assert scene.log == [("hold", 90), ("capture", 70)]
    assert scene.metered() == {Meter.IMAGES: 1} and "usage" not in json.loads(reader.body)
    assert scene.node.bounds[0].sizes == ("1x1", "2x2")


async def test_a_price_that_has_risen_since_the_lock_does_not_count() -> None:
    scene = Scene(stream())
    body = await scene.body(stream=True)
    dearer = msgspec.structs.replace(CHAT, price=10**9, output_price=10**9)
    scene.world = msgspec.structs.replace(scene.world, catalogue=Catalogue((*CATALOGUE.models, dearer, PAINTER)))
    await scene.send(body, Reader())
    assert scene.log == [("hold", HELD), ("capture", (9 + 3) * 3)]


@pytest.mark.parametrize(("modality", "model"), [("images", CHAT), ("chat", PAINTER)])
async def test_a_model_does_what_it_does(modality: Generating, model: Model) -> None:
    scene = Scene()
    assert await scene.refused(await scene.body(model), modality) == "unsupported_modality"
    assert not scene.node.asked


async def test_a_stream_extends_its_hold_and_notes_what_it_owes() -> None:
    scene, reader = Scene([said(0, 1), said(1, 2), asyncio.Event().wait]), Reader()
    asking = asyncio.create_task(scene.send(await scene.body(stream=True), reader))
    while len(reader.parts) < 2:
        await asyncio.sleep(0)
    await scene.leases.extend()
    (note,) = scene.world.ledger.notes
    assert note.charge.cost_nanousd == 9 + 2 * 3
    assert reader.reply is not None
    reader.reply.left()
    await asking
    await scene.leases.extend()
    assert len(scene.world.ledger.notes) == 1, "it has ended"
