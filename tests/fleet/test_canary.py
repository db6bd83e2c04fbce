"""A node that gives other vectors than the model's is found out; an honest one never is."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from embedmesh.fleet.canary import COSINE_MIN, FIRST_ANSWERS, PROBATION_EVERY_S, PROBATION_RUN, Canaries
from embedmesh.fleet.examiner import Examiner
from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.flow.verify import verify
from embedmesh.rules.embeddings import Counted, EmbedVectors, numbers_of
from embedmesh.rules.errors import NodeBroke, NodeBusy, NodeFailure, NodeTooSlow
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from tests.flow.world import CATALOGUE, MODEL, Clock, LetterTokenizer, NeverAtOnce

WIDE = Model(id="acme/wide", folder="/nowhere", width=64, max_tokens=99, price=1, digest="2" * 64)
Vectors = Callable[[list[int]], np.ndarray]


def right(ids: list[int]) -> np.ndarray:
    vector = np.random.default_rng(sum((at + 1) * token for at, token in enumerate(ids))).standard_normal(64)
    return (vector / np.linalg.norm(vector)).astype("<f4")


def tilted(cosine: float) -> Vectors:
    """Vectors that point a little beside the right ones."""

    def vectors(ids: list[int]) -> np.ndarray:
        vector = right(ids).astype(np.float64)
        aside = np.random.default_rng(len(ids)).standard_normal(64)
        aside -= aside @ vector * vector
        tilt: np.ndarray = (cosine * vector + np.sqrt(1 - cosine**2) * aside / np.linalg.norm(aside)).astype("<f4")
        return tilt

    return vectors


def constant(ids: list[int]) -> np.ndarray:
    return np.full(64, 0.125, "<f4")


class Rig(NeverAtOnce):
    """Nodes that answer by rule, behind the real scheduler; every answer is repeated."""

    def __init__(self, trusted: str = "", **nodes: Vectors) -> None:
        self.nodes = nodes
        self.asked: list[str] = []
        self.clock = clock = Clock()
        self.registry = Registry(clock)
        scheduler = Scheduler(
            self.registry, clock, random.Random(1), lambda s, f: asyncio.get_running_loop().call_later(s, f)
        )
        self.readmitted: list[str] = []
        self.share = 0.0  # of the dice: below every share
        self.shares: list[float] = []  # what it throws first
        tokenizers = {WIDE.id: LetterTokenizer(), MODEL.id: LetterTokenizer()}
        client: Any = self  # is never asked what it serves
        examiner = Examiner(self.registry, client, CATALOGUE, tokenizers, clock, verify)
        self.canaries = Canaries(examiner, scheduler, self)
        self.registry.on_readmit.append(lambda node: self.readmitted.append(node.node_id))
        for name in nodes:
            node = self.registry.add(Node(name, "", trusted=name in trusted.split()))
            self.registry.answered_right(node, [WIDE.id])

    def only_wide(self) -> None:
        """Leave one model in the catalogue."""
        one = type("One", (), {"models": (WIDE,)})()
        self.canaries._examiner = replace(self.canaries._examiner, catalogue=one)

    def random(self) -> float:
        if self.shares:
            return self.shares.pop(0)
        return self.share

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        self.asked.append(part.node_id)
        assert request_id.startswith("req_"), "it looks like any other"
        assert counted.ids is not None
        rows = [self.nodes[part.node_id](numbers_of(counted.ids[place])) for place in part.rows]
        return EmbedVectors(part.tokens, b"".join(row.astype("<f4").tobytes() for row in rows))

    async def answer(self, name: str, *inputs: list[int]) -> None:
        """A caller gets this from that node; what follows from it is waited for."""
        many = list(inputs) or [[1, 2, 3]]
        counted = Counted(lengths=[len(ids) + 2 for ids in many], ids=many)
        part = Part(name, tuple(range(len(many))), counted.tokens, 0.1)
        self.canaries.answered(WIDE, counted, part, await self.embed(part, WIDE, counted, "req_1"))
        await asyncio.gather(*self.canaries._tasks)

    def state(self, name: str) -> NodeState:
        return self.node(name).state

    def node(self, name: str) -> Node:
        node = self.registry.find(name)
        assert node is not None
        return node


LIARS = {
    "constant": constant,
    "noise": tilted(0.7),
    "a little noise": tilted(0.99),
    "another model": lambda ids: right([*ids, 7]),
}


@pytest.mark.parametrize("lie", LIARS.values(), ids=LIARS)
@pytest.mark.parametrize("asked", ["liar", "honest"])
async def test_the_liar_is_quarantined_whoever_of_the_two_was_asked_first(lie: Vectors, asked: str) -> None:
    rig = Rig("judge", liar=lie, honest=right, judge=right)
    for number in range(20):
        await rig.answer(asked, [1, 2, number])
    assert rig.state("liar") is NodeState.QUARANTINED
    assert rig.state("honest") is rig.state("judge") is NodeState.READY
    assert rig.node("liar").counts["canaries_failed"] > 0
    assert rig.node("honest").counts["canaries_failed"] == 0


async def test_a_trusted_second_node_decides_by_itself() -> None:
    rig = Rig("judge", liar=constant, judge=right)
    await rig.answer("liar")
    assert rig.state("liar") is NodeState.QUARANTINED


async def test_without_a_trusted_node_a_dispute_is_counted_and_nobody_is_condemned() -> None:
    rig = Rig("", one=constant, other=right)
    await rig.answer("one")
    assert rig.state("one") is rig.state("other") is NodeState.READY
    assert rig.node("one").counts["canaries_disputed"] == rig.node("other").counts["canaries_disputed"] == 1


async def test_two_liars_that_agree_are_found_out_by_the_judge_once_one_of_them_is_compared_with_it() -> None:
    rig = Rig("judge", one=constant, two=constant, judge=right)
    for number in range(40):
        await rig.answer("one" if number % 2 else "two", [1, 2, number])
    assert rig.state("one") is rig.state("two") is NodeState.QUARANTINED


async def test_many_that_lie_alike_do_not_vouch_for_each_other_for_long() -> None:
    """For every second canary a trusted node is asked, however few of them there are."""
    rig = Rig("judge", judge=right, **{f"n{number}": constant for number in range(20)})
    rig.shares = [0.0, 0.5]
    await rig.answer("n3")
    assert rig.state("n3") is NodeState.QUARANTINED
    assert rig.asked == ["n3", "judge"]


async def test_answers_to_several_inputs_are_looked_at_more_closely() -> None:
    rig = Rig("judge", one=right, judge=right)
    rig.share = 0.2
    await rig.answer("one", [1])
    assert rig.node("one").counts["canaries_passed"] == 0
    await rig.answer("one", [1], [2])
    assert rig.node("one").counts["canaries_passed"] == 1


@pytest.mark.parametrize("cosine", [0.996, 0.9999])
async def test_honest_nodes_of_another_arithmetic_are_alike(cosine: float) -> None:
    rig = Rig("judge", one=right, other=tilted(cosine), judge=right)
    for number in range(50):
        await rig.answer("other", [1, number])
    assert rig.state("other") is NodeState.READY
    assert rig.node("other").counts["canaries_passed"] == 50
    assert COSINE_MIN["exact"] < 0.996


async def test_a_node_that_lies_about_one_input_of_many_is_found_when_that_is_compared() -> None:
    rig = Rig("judge", liar=lambda ids: constant(ids) if ids == [9] else right(ids), judge=right)
    await rig.answer("liar", [1], [2], [9], [3])
    assert rig.state("liar") is NodeState.QUARANTINED


async def test_the_first_answers_are_looked_at_ten_times_as_closely() -> None:
    rig = Rig("", one=right, other=right)
    rig.share = 0.05
    for _ in range(FIRST_ANSWERS):
        await rig.answer("one")
    looked_at = rig.node("one").counts["canaries_passed"]
    for _ in range(20):
        await rig.answer("one")
    assert looked_at == FIRST_ANSWERS
    assert rig.node("one").counts["canaries_passed"] == looked_at


async def test_a_second_node_that_fails_condemns_nobody() -> None:
    def broken(ids: list[int]) -> np.ndarray:
        raise NodeBroke("x")

    rig = Rig("judge", one=right, judge=broken)
    await rig.answer("one")
    assert rig.state("one") is NodeState.READY
    assert [node.load.parts for node in rig.registry] == [0, 0]


async def test_alone_or_trusted_nobody_is_repeated() -> None:
    alone = Rig("", one=constant)
    await alone.answer("one")
    trusted = Rig("one", one=constant, other=right)
    await trusted.answer("one")
    assert alone.asked == trusted.asked == ["one"]


@pytest.fixture
async def quarantined() -> AsyncIterator[Rig]:
    rig = Rig("judge", liar=constant, judge=right)
    await rig.answer("liar")
    rig.node("liar").models = rig.node("judge").models = frozenset({WIDE.id})
    rig.only_wide()
    yield rig
    await rig.canaries.stop()


async def test_a_run_of_right_answers_readmits_and_a_wrong_one_begins_it_anew(quarantined: Rig) -> None:
    rig = quarantined
    quarantined.share = 0.3
    rig.nodes["liar"] = right
    for _ in range(PROBATION_RUN - 1):
        await rig.canaries._probe(rig.node("liar"))
    rig.nodes["liar"] = constant
    await rig.canaries._probe(rig.node("liar"))
    rig.nodes["liar"] = right
    for _ in range(PROBATION_RUN - 1):
        await rig.canaries._probe(rig.node("liar"))
    assert rig.readmitted == []
    await rig.canaries._probe(rig.node("liar"))
    assert rig.readmitted == ["liar"]
    assert rig.state("liar") is NodeState.UNPROVEN, "it proves itself as a new node does"
    assert rig.node("liar").fresh_answers == 0, "and is looked at as closely"


@pytest.mark.parametrize("lie", LIARS.values(), ids=LIARS)
async def test_a_newcomer_that_lies_gets_no_work(lie: Vectors) -> None:
    """A trusted node is asked the same before anybody gets a vector of it."""
    rig = Rig("judge", newcomer=lie, judge=right)
    rig.node("newcomer").state = NodeState.UNPROVEN
    rig.only_wide()
    rig.share = 0.3
    assert not await rig.canaries.prove(rig.node("newcomer"))
    assert rig.state("newcomer") is NodeState.QUARANTINED


@pytest.mark.parametrize("failure", [NodeTooSlow("x"), NodeBusy("x"), NodeBroke("x")])
async def test_a_newcomer_that_says_nothing_is_asked_again_and_called_no_liar(failure: NodeFailure) -> None:
    """It may be starved: slow is not wrong."""

    class Mute(Rig):
        async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
            if part.node_id == "newcomer" and mute:
                raise failure
            return await super().embed(part, model, counted, request_id)

    mute = True
    rig = Mute("judge", newcomer=right, judge=right)
    rig.only_wide()
    rig.share = 0.3
    newcomer = rig.node("newcomer")
    newcomer.state = NodeState.UNPROVEN
    assert not await rig.canaries.prove(newcomer)
    assert (newcomer.state, newcomer.counts["canaries_failed"]) == (NodeState.UNPROVEN, 0)
    mute = False
    assert await rig.canaries.prove(newcomer)


async def test_a_newcomer_that_is_right_or_cannot_be_compared_gets_work() -> None:
    rig = Rig("judge", newcomer=right, judge=right)
    rig.only_wide()
    rig.share = 0.3
    assert await rig.canaries.prove(rig.node("newcomer"))
    assert rig.node("newcomer").counts["canaries_passed"] == 1
    alone = Rig("", newcomer=constant)
    alone.only_wide()
    alone.share = 0.3
    assert await alone.canaries.prove(alone.node("newcomer"))


@pytest.mark.parametrize(("vectors", "gets_work"), [(right, True), (constant, False)])
async def test_who_reads_texts_only_is_asked_in_texts(vectors: Vectors, gets_work: bool) -> None:
    """A server of another make, as a newcomer and from quarantine; the trusted node is asked the same in token ids."""

    class Reads(Rig):
        async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
            if part.node_id == "newcomer":
                assert counted.texts is not None
                counted = Counted(lengths=counted.lengths, ids=LetterTokenizer().ids(counted.texts))
            return await super().embed(part, model, counted, request_id)

    rig = Reads("judge", newcomer=vectors, judge=right)
    rig.only_wide()
    rig.shares = [random.Random(2).random() for _ in range(2_000)]
    newcomer = rig.node("newcomer")
    newcomer.reads_ids = False
    assert await rig.canaries.prove(newcomer) is gets_work
    rig.registry.quarantine(newcomer, "of a test")
    for _ in range(PROBATION_RUN):
        await rig.canaries._probe(newcomer)
    assert (newcomer.state is NodeState.UNPROVEN) is gets_work


@pytest.mark.parametrize(("kind", "asked"), [(UPSTREAM, 5), ("remote", 20)])
async def test_a_quarantined_server_of_another_make_that_is_wrong_again_is_asked_once_a_minute(
    kind: str, asked: int
) -> None:
    """Each question may cost money there. One of our make is asked at every turn."""
    rig = Rig("judge", newcomer=constant, judge=right)
    rig.only_wide()
    rig.share = 0.3
    rig.node("newcomer").kind = kind
    rig.registry.quarantine(rig.node("newcomer"), "of a test")
    for _ in range(20):
        rig.canaries._probe_all()
        await asyncio.gather(*rig.canaries._tasks)
        rig.clock.now += PROBATION_EVERY_S
    assert rig.asked.count("newcomer") == asked


async def test_a_comparison_that_breaks_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """By its kind alone; callers do not notice."""
    rig = Rig("judge", honest=right, judge=right)

    def broken(ids: list[int]) -> np.ndarray:
        raise LookupError("a caller's words")

    rig.nodes["judge"] = broken
    with pytest.raises(LookupError):
        await rig.answer("honest")
    await asyncio.sleep(0)
    assert "a comparison ended (LookupError)" in caplog.text
    assert "words" not in caplog.messages[-1]
    assert not rig.canaries._tasks
