"""Probes of a node that is slow, or has not loaded its models: it is not called dead, nor a liar. In virtual time."""

import asyncio
import random
from collections.abc import Callable

import msgspec
import pytest

from bench.lives.loop import Loop
from embedmesh.catalogue import Catalogue
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.probe import LATE_PROBE_S, NODE_PROBE_S, THREADS_CHARS_MAX, Prober
from embedmesh.fleet.registry import Node, Registry
from embedmesh.flow.verify import verify
from embedmesh.gateway.models import Models
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModel, ServedModels, numbers_of
from embedmesh.rules.forwarding import Part
from embedmesh.rules.generation import GenerationRequest
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from tests.flow.world import CATALOGUE, MODEL, NATIVE, Clock, LetterTokenizer, NeverAtOnce, right_reply

OFFER = ServedModel(MODEL.id, MODEL.width, MODEL.max_tokens, MODEL.digest, MODEL.tier)


class Starved(NeverAtOnce):
    """A node: what it lists, and how long an embedding takes, in the loop's seconds."""

    def __init__(self, takes_s: float = 0.01, served: ServedModels | None = None) -> None:
        self.takes_s = takes_s
        self.served_now = served or ServedModels([OFFER])

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        await asyncio.sleep(self.takes_s)
        assert counted.ids is not None
        reply = right_reply(ids := [numbers_of(counted.ids[row]) for row in part.rows])
        size = len(reply.data) // len(ids)
        starts = range(0, len(reply.data), size)
        return EmbedVectors(reply.tokens, b"".join(reply.data[at:][: 4 * model.width] for at in starts))

    async def served(self, node_id: str) -> ServedModels:
        return self.served_now

    async def generate(self, part: Part, model: Model, asked: GenerationRequest, request_id: str) -> bytes:
        raise AssertionError("it makes vectors")


class LoopClock(Clock):
    def monotonic(self) -> float:
        return asyncio.get_running_loop().time()


def models_of(*models: Model) -> Models:
    return Models(Catalogue(models), {model.id: LetterTokenizer() for model in models}, ())


def probe_until(
    client: Starved, done: Callable[[Node, float], bool], *, trusted: bool = False, models: Models | None = None
) -> tuple[Node, float]:
    """Let a gateway look after it until then; the node as it is seen, and when that was."""

    async def story() -> tuple[Node, float]:
        registry = Registry(clock := LoopClock())
        node = registry.add(Node("n0", "unix:/nowhere", trusted=trusted))
        has = models or models_of(*CATALOGUE.models)
        prober = Prober(node, Examiner(registry, client, has.known, has.tokenizers, clock, verify))
        running = asyncio.create_task(prober.run())
        while not done(node, clock.monotonic()):
            assert not running.done(), "it ends the gateway"
            await asyncio.sleep(0.05)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        return node, clock.monotonic()

    loop = Loop(random.Random(1), 0.0)
    try:
        return loop.run_until_complete(story())
    finally:
        loop.close()


@pytest.mark.parametrize("takes_s", [0.01, 3 * NODE_PROBE_S, 6 * NODE_PROBE_S])
def test_a_node_that_is_slow_from_the_start_becomes_ready(takes_s: float) -> None:
    """Patience doubles with each probe that was late: nobody knows yet how slow it is."""
    node, at = probe_until(Starved(takes_s), lambda node, now: node.state is NodeState.READY or now > 300.0)
    assert node.state is NodeState.READY
    assert at <= 1.0 + 4 * takes_s + LATE_PROBE_S * (takes_s > NODE_PROBE_S)


def test_a_node_that_becomes_slow_stays_in_work_and_is_known_to_be_slow() -> None:
    client = Starved()

    def done(node: Node, now: float) -> bool:
        if now > 20.0:
            client.takes_s = 6.0
        return now > 120.0

    node, at = probe_until(client, done)
    assert node.state is NodeState.READY
    assert node.last_right_answer is not None and at - node.last_right_answer <= LATE_PROBE_S
    assert node.load.finish_s(12, at) > 1.0


@pytest.mark.parametrize("trusted", [True, False])
def test_a_node_that_has_loaded_nothing_yet_is_no_liar(trusted: bool) -> None:
    """And why it takes so long is known here."""
    client = Starved(served=ServedModels([], shortage="cpu"))
    node, _ = probe_until(client, lambda node, now: now > 10.0, trusted=trusted)
    assert (node.state, node.shortage, node.counts["WrongAnswer"]) == (NodeState.UNPROVEN, "cpu", 0)


@pytest.mark.parametrize(
    ("said", "kept"),
    [("2 threads: 2 cores", "2 threads: 2 cores"), ("\x1b[2Jgone", ""), ("9" * 1_000, "9" * THREADS_CHARS_MAX)],
)
def test_what_a_node_says_of_its_threads_is_kept_as_plain_text(said: str, kept: str) -> None:
    """It is shown to operators, and a node may say anything."""
    client = Starved(served=ServedModels([], threads=said))
    node, _ = probe_until(client, lambda node, now: now > 1.0)
    assert node.threads == kept


def test_a_node_whose_models_are_all_down_gets_no_work_until_one_is_back() -> None:
    client = Starved()
    seen: list[frozenset[str]] = []

    def done(node: Node, now: float) -> bool:
        down = 20.0 < now < 60.0
        client.served_now = ServedModels([] if down else [OFFER])
        if 40.0 < now < 60.0:
            seen.append(node.models)
        return now > 80.0

    node, _ = probe_until(client, done)
    assert set(seen) == {frozenset()}
    assert (node.models, node.state) == (frozenset({MODEL.id}), NodeState.READY)


@pytest.mark.parametrize("reranks", [False, True])
def test_a_model_that_a_reload_has_added_is_probed_and_served(reranks: bool) -> None:
    """The node loads it some time later, and both are served."""
    added = NATIVE if not reranks else msgspec.structs.replace(NATIVE, width=1, modalities=("rerank",))
    client, models = Starved(), models_of(MODEL)

    def done(node: Node, now: float) -> bool:
        if now > 10.0 and models.catalogue.find(added.id) is None:
            models.become(models_of(MODEL, added))
        if now > 20.0 and len(client.served_now.data) == 1:
            offer = ServedModel(added.id, added.width, added.max_tokens, added.digest, added.tier)
            client.served_now = ServedModels([OFFER, offer])
        return now > 40.0

    node, _ = probe_until(client, done, models=models)
    assert (node.state, node.models) == (NodeState.READY, frozenset({MODEL.id, added.id}))
    assert not node.counts["WrongAnswer"]
