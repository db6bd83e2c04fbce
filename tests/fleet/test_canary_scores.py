"""A node that tells other scores than the model's is found out, soon; an honest one of another arithmetic never is."""

import random
from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec
import numpy as np
import pytest

from embedmesh.catalogue import Catalogue
from embedmesh.fleet.canary import LOGIT_OFF_MAX, PROBATION_RUN, PROVE_INPUTS, SCORE_OFF_MAX, scores_alike
from embedmesh.fleet.examiner import FAR_TEXT, PROBE_QUERY, PROBE_TEXT
from embedmesh.fleet.probe import Prober
from embedmesh.fleet.registry import Node
from embedmesh.fleet.second_opinion import SecondOpinions
from embedmesh.rules.embeddings import ENDS_FIRST, Counted, EmbedVectors, Ids, ServedModel, ServedModels, numbers_of
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model, Tier
from embedmesh.rules.nodes import NodeState
from tests.fleet.test_canary import WIDE, Rig, constant, right
from tests.flow.world import LetterTokenizer

JUDGES = Model(
    id="acme/judge", folder="/nowhere", width=1, max_tokens=99, price=1, digest="3" * 64, modalities=("rerank",)
)
FOREIGN = Model(id="acme/foreign-judge", width=1, max_tokens=99, price=1, modalities=("rerank",))
DOCUMENTS = 20  # of a caller's request
Scores = Callable[[Sequence[list[int]]], list[float]]


def honest(pair: list[int]) -> float:
    """As of a trained model: most documents are far beside the point, those that have the query's tokens are not."""
    ends = next(at for at, token in enumerate(pair) if token & ENDS_FIRST)
    query, document = pair[:ends], pair[ends + 1 :]
    share = len(set(query) & set(document)) / len(set(query))
    return 16.0 * share - 11.0 + random.Random(str(pair)).gauss(0, 0.6)


def by_pair(score: Callable[[list[int]], float]) -> Scores:
    return lambda pairs: [score(each) for each in pairs]


def off(by: float, share: float = 0.0) -> Scores:
    """Honest, but for its arithmetic: noise of this size, and in proportion to the score."""
    dice = random.Random(5)
    return by_pair(lambda pair: honest(pair) * (1 + dice.gauss(0, share)) + dice.gauss(0, by))


def at_random() -> Scores:
    dice = random.Random(6)
    return by_pair(lambda pair: 16.0 * dice.random() - 11.0)


def shuffled(pairs: Sequence[list[int]]) -> list[float]:
    return [honest(each) for each in (*pairs[1:], pairs[0])]


LIARS: dict[str, Scores] = {
    "zeros": by_pair(lambda pair: 0.0),
    "what most documents have": by_pair(lambda pair: -11.0),
    "at random": at_random(),
    "shuffled": shuffled,
    "sigmoids for logits": by_pair(lambda pair: 1.0 / (1.0 + np.exp(-honest(pair)))),
    "upside down": by_pair(lambda pair: -honest(pair)),
    "three for each": by_pair(lambda pair: honest(pair) + 3.0),
}


class Bench(Rig):
    """Nodes that score by rule. Each serves a reranker, and those named in `embed` a model that embeds, too."""

    def __init__(self, trusted: str = "judge", embed: str = "", model: Model = JUDGES, **nodes: Scores) -> None:
        super().__init__(trusted, **dict.fromkeys(nodes, right))
        self.scores, self.model, self.embeds = nodes, model, embed.split()
        tokenizers = {WIDE.id: LetterTokenizer(), JUDGES.id: LetterTokenizer()}
        catalogue = Catalogue((WIDE, model))
        examiner = replace(self.canaries._examiner, tokenizers=tokenizers, catalogue=catalogue)
        opinions = SecondOpinions(examiner, self.canaries._opinions._scheduler)
        self.canaries._examiner, self.canaries._opinions = examiner, opinions
        for node in self.registry:
            self.registry.serves(node, [model.id, WIDE.id] if node.node_id in self.embeds else [model.id])
        self.questions: list[tuple[str, Counted]] = []

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors:
        if not model.reranks:
            return await super().embed(part, model, counted, request_id)
        self.asked.append(part.node_id)
        self.questions.append((part.node_id, counted))
        assert counted.query is not None
        if counted.ids is None or not self.node(part.node_id).reads_ids:
            assert counted.texts is not None
            query, *texts = LetterTokenizer().ids([counted.query, *counted.texts])
            ids: Sequence[Ids] = [LetterTokenizer().pair(query, each) for each in texts]
        else:
            ids = counted.ids
        pairs = [numbers_of(ids[row]) for row in part.rows]
        return EmbedVectors(part.tokens, np.array(self.scores[part.node_id](pairs), "<f4").tobytes())

    async def served(self, node_id: str) -> ServedModels:
        models = (WIDE, self.model) if node_id in self.embeds else (self.model,)
        return ServedModels(
            [ServedModel(each.id, each.width, each.max_tokens, each.digest, each.tier) for each in models]
        )

    async def search(self, name: str, number: int) -> None:
        """A caller's request of that number: one document answers it, one halfway, the others do not."""
        dice = random.Random(number)
        query = [1 + int(dice.random() * 29) for _ in range(4)]
        beside = [each for each in range(1, 30) if each not in query]
        texts = [[dice.choice(beside) for _ in range(8)] for _ in range(DOCUMENTS - 2)] + [[*query, 5], [*query[:2], 7]]
        dice.shuffle(texts)
        letters = ["".join(chr(96 + token) for token in each) for each in (query, *texts)]
        ids = [LetterTokenizer().pair(query, each) for each in texts]
        counted = Counted([len(numbers_of(each)) + 2 for each in ids], ids, letters[1:], query=letters[0])
        part = Part(name, tuple(range(DOCUMENTS)), counted.tokens, 0.1)
        self.canaries.answered(self.model, counted, part, await self.embed(part, self.model, counted, "req_1"))
        for task in list(self.canaries._tasks):
            await task

    def roll(self, seed: int) -> None:
        """Real dice from now on."""
        self.random = random.Random(seed).random  # type: ignore[method-assign]


@pytest.mark.parametrize("lie", LIARS.values(), ids=LIARS)
async def test_a_liar_is_found_within_thirty_requests_in_each_of_twenty_lives(lie: Scores) -> None:
    """A quarter of the first answers is repeated, so that this is some seven comparisons; half of the lives take four
    requests or less, those with the constant that most documents have ten."""
    took = []
    for life in range(20):
        rig = Bench(liar=lie, judge=by_pair(honest))
        rig.roll(life)
        number = 0
        while rig.state("liar") is NodeState.READY:
            await rig.search("liar", number := number + 1)
            assert number <= 30
        took.append(number)
        assert rig.state("judge") is NodeState.READY
    assert sorted(took)[10] <= 10


HONEST: dict[str, tuple[Tier, Scores]] = {
    "float32 of another kernel": ("exact", off(1e-5)),
    "bfloat16": ("fast", off(0.1)),
    "bfloat16 in proportion": ("exact", off(0.02, 0.02)),
    "int8": ("int8", off(0.8, 0.05)),
}


@pytest.mark.parametrize(("tier", "scores"), HONEST.values(), ids=HONEST)
async def test_an_honest_node_of_another_arithmetic_stays(tier: Tier, scores: Scores) -> None:
    """Every answer is repeated."""
    rig = Bench(other=scores, judge=by_pair(honest), model=replace_tier(tier))
    for number in range(200):
        rig.shares = [0.0, 0.0, *np.random.default_rng(number).random(8)]
        await rig.search("other", number)
    assert rig.state("other") is NodeState.READY
    assert rig.node("other").counts["canaries_passed"] == 200


def replace_tier(tier: Tier) -> Model:
    return Model(
        id=JUDGES.id, folder="/x", width=1, max_tokens=99, price=1, digest="3" * 64, tier=tier, modalities=("rerank",)
    )


ALIKE = [
    # two logits, whether they are the same score: exact, int8
    (0.0, 0.3, True, True),
    (0.0, 0.5, False, True),
    (-2.0, 2.0, False, False),
    (-8.0, -7.2, True, True),
    (-8.0, -6.9, False, True),
    (-9.0, -2.0, False, False),
    (9.0, 36.0, True, True),  # a sigmoid in 16 bits: 1
    (3.5, 36.0, False, True),
    (-13.0, -36.0, True, True),
    (-5.0, -36.0, False, False),
    (1e18, 5.0, True, True),
    (-1e18, 1e18, False, False),
    (-0.0, 0.0, True, True),
    (1e-45, -1e-45, True, True),
]


@pytest.mark.parametrize(("one", "other", "exact", "int8"), ALIKE)
def test_when_two_logits_are_the_same_score(one: float, other: float, exact: bool, int8: bool) -> None:
    a, b = (np.array([[2.0], [each]], "<f4") for each in (one, other))
    assert scores_alike(a, b, "exact") is scores_alike(b, a, "fast") is exact
    assert scores_alike(a, b, "int8") is int8
    assert SCORE_OFF_MAX["exact"] < LOGIT_OFF_MAX["exact"] / 4 * 1.6, "the sigmoid decides in the middle"


@pytest.mark.parametrize("lie", [name for name in LIARS if name != "shuffled"])
@pytest.mark.parametrize("texts_only", [False, True])
async def test_a_newcomer_that_lies_gets_no_work_and_one_question_has_one_query(lie: str, texts_only: bool) -> None:
    rig = Bench(newcomer=LIARS[lie], judge=by_pair(honest))
    newcomer = rig.node("newcomer")
    newcomer.state, newcomer.reads_ids = NodeState.UNPROVEN, not texts_only
    rig.roll(3)
    assert not await rig.canaries.prove(newcomer)
    assert rig.state("newcomer") is NodeState.QUARANTINED
    assert str(newcomer.last_failure) == "canary: its first scores are not the model's"
    (_, asked), (_, same) = rig.questions
    assert asked is same
    assert (len(asked.lengths), bool(asked.query)) == (PROVE_INPUTS, True)
    assert max(asked.lengths) <= JUDGES.max_tokens
    rig.scores["newcomer"] = by_pair(honest)
    for _ in range(PROBATION_RUN):
        await rig.canaries._probe(newcomer)
    assert rig.state("newcomer") is NodeState.UNPROVEN
    assert await rig.canaries.prove(newcomer)


async def test_a_node_is_questioned_for_each_kind_of_model_that_it_serves() -> None:
    """Right vectors buy no quarantine of scores off, and right scores none of vectors."""
    rig = Bench(embed="both judge", both=by_pair(lambda pair: 0.0), judge=by_pair(honest))
    both = rig.node("both")
    both.state = NodeState.UNPROVEN
    rig.roll(1)
    assert not await rig.canaries.prove(both)
    for _ in range(10 * PROBATION_RUN):
        await rig.canaries._probe(both)
    assert rig.state("both") is NodeState.QUARANTINED
    rig.scores["both"], rig.nodes["both"] = by_pair(honest), constant
    for _ in range(10 * PROBATION_RUN):
        await rig.canaries._probe(both)
    assert rig.state("both") is NodeState.QUARANTINED
    rig.nodes["both"] = right
    for _ in range(PROBATION_RUN):
        await rig.canaries._probe(both)
    assert rig.state("both") is NodeState.UNPROVEN
    assert await rig.canaries.prove(both)


@pytest.mark.parametrize("inputs_max", [1, 5, 2_048])
@pytest.mark.parametrize("whose", ["newcomer", "judge"])
async def test_a_question_is_as_small_as_the_smallest_node_wants_it(whose: str, inputs_max: int) -> None:
    """Also where nobody here can count its tokens: what is split would be two nodes' answers."""
    rig = Bench(newcomer=by_pair(honest), judge=by_pair(honest), third=by_pair(honest), model=FOREIGN)
    for name in ("newcomer", "judge", "third"):
        rig.node(name).reads_ids = False
    rig.node(whose).inputs_max = inputs_max
    rig.node("newcomer").state = NodeState.UNPROVEN
    rig.roll(2)
    assert await rig.canaries.prove(rig.node("newcomer"))
    assert rig.node("newcomer").counts["canaries_passed"] == 1
    assert {len(counted.lengths) for _, counted in rig.questions} <= set(range(1, inputs_max + 1))
    rig.node("newcomer").state = NodeState.READY
    rig.registry.on_change[0]()
    rig.registry.last_ready.clear()
    for number in range(30):
        await rig.search("third", number)
    assert rig.node("third").counts["canaries_passed"] > 0
    assert all(isinstance(each, Node) and each.state is NodeState.READY for each in rig.registry)


async def test_a_probe_fits_a_model_that_takes_few_tokens() -> None:
    """Or its node, which refuses it, would never be ready."""
    rig = Bench()
    few = msgspec.structs.replace(rig.model, max_tokens=len(PROBE_QUERY) + 9)
    assert rig.canaries._examiner.probe(few).lengths[0] == few.max_tokens
    assert rig.canaries._examiner.probe(rig.model).texts == [PROBE_TEXT, FAR_TEXT]


async def test_health_is_a_right_answer_of_each_model_also_of_those_that_rerank() -> None:
    """By a probe: one query with two documents, of which one answers it."""
    rig = Bench(embed="both judge", both=by_pair(honest), judge=by_pair(honest))
    both = rig.node("both")
    both.state, both.models = NodeState.UNPROVEN, frozenset()
    rig.roll(4)
    prober = Prober(both, rig.canaries._examiner, rig.canaries.prove)
    rig.scores["both"] = lambda pairs: [1.0] * (len(pairs) - 1) + [float("nan")]
    await prober.probe()
    assert rig.state("both") is NodeState.UNPROVEN
    assert str(both.last_failure) == "finite: a component or a score is not finite"
    rig.scores["both"] = by_pair(honest)
    rig.questions.clear()
    await prober.probe()
    assert rig.state("both") is NodeState.READY
    assert both.models == {WIDE.id, JUDGES.id}
    (_, probe), *_ = rig.questions
    assert (probe.query, probe.texts) == (PROBE_QUERY, [PROBE_TEXT, FAR_TEXT])
    both.inputs_max = 1
    await prober.probe()
    assert both.failures_in_a_row == 0


async def test_a_node_that_takes_one_pair_at_a_time_is_measured_all_the_same() -> None:
    rig = Bench(embed="both", both=by_pair(honest), judge=by_pair(honest))
    both = rig.node("both")
    rig.model = JUDGES
    for both.inputs_max in (1, 2_048):
        rig.asked.clear()
        await Prober(both, rig.canaries._examiner).measure()
        assert rig.asked == ["both"] * 2, "one question for each kind of model"
