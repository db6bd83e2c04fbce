"""Are vectors and scores the model's? Some answers are repeated by another node, and compared.

The node cannot tell which: the second request is like any other, and comes after the first was answered. Where two
nodes disagree, a trusted node decides, and the node that differs from it is quarantined. A quarantined node gets
questions that are compared in the same way; a long run of right answers readmits it.

Comparisons never delay a caller: they begin after the answer. Canaries are at the operator's cost.
"""

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

import numpy as np

from embedmesh.fleet.examiner import Examiner, only
from embedmesh.fleet.registry import UPSTREAM, Node
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.fleet.second_opinion import Matrix, Opinion, SecondOpinions, rows_of
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX, cut
from embedmesh.rules.deadlines import attempt_s
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model, Tier
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Dice

log = logging.getLogger("embedmesh.fleet")

FIRST_ANSWERS = 500  # of a node, since it was admitted or readmitted: they are checked more often
FIRST_SHARE, LATER_SHARE = 0.10, 0.01  # of a node's answers that are repeated
SEVERAL_SHARE = 0.25  # of the first answers with several inputs: they are rarer, and as cheap to repeat
TRUSTED_SHARE = 0.5  # of canaries that ask a trusted node: many nodes that lie alike would confirm each other
COMPARISONS_MAX = 8  # at one time; more are not begun, so that canaries never become a load of their own
COMPARED_INPUTS_MAX = 8  # of one part: a node that lies about some of them is found a little later
PROBATION_EVERY_S = 15.0
PROBATION_REST_S = 60.0  # of an upstream that was wrong again: each question may cost money
PROBATION_RUN = 20  # right answers in a row that end a quarantine: five minutes
PROVE_INPUTS = 12  # enough to show a wrong order of rows

COSINE_MIN: dict[Tier, float] = {"exact": 0.995, "fast": 0.995, "int8": 0.96}
"""How alike two honest answers are at least. Honest bfloat16 and float32 differ by less than 0.001 (docs/choosing.md);
int8 kernels differ by the CPU; noise of a twentieth of a component's size is already at 0.7."""

SCORE_OFF_MAX: dict[Tier, float] = {"exact": 0.1, "fast": 0.1, "int8": 0.5}
LOGIT_OFF_MAX: dict[Tier, float] = {"exact": 1.0, "fast": 1.0, "int8": 6.0}
"""How far apart two honest scores of a pair are at most: as sigmoids, and as logits. In bfloat16 they are by 0.03 and
0.2 (docs/decisions/0060). Sigmoids alone would hardly tell documents apart that are all beside the point; logits alone
would, where one is large, condemn mere rounding."""
LOGITS_COMPARED = (-12.0, 5.0)
"""Further out all are alike: a server may tell sigmoids in 16 bits, and these have no more digits there."""


class Canaries:
    """Implements the port `Observer`."""

    def __init__(self, examiner: Examiner, scheduler: Scheduler, dice: Dice) -> None:
        self._examiner = examiner
        self._registry = examiner.registry
        self._opinions = SecondOpinions(examiner, scheduler)
        self._dice = dice
        self._tasks: set[asyncio.Task[None]] = set()
        self._right_in_a_row: dict[str, int] = {}  # of quarantined nodes

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None:
        """A caller gets this answer. Perhaps another node repeats it."""
        node = self._registry.find(part.node_id)
        if node is None or node.trusted or len(self._tasks) >= COMPARISONS_MAX:
            return
        node.fresh_answers += 1
        first_share = SEVERAL_SHARE if len(part.rows) > 1 else FIRST_SHARE
        share = first_share if node.fresh_answers <= FIRST_ANSWERS else LATER_SHARE
        if self._dice.random() >= share or len(ready := self._registry.ready(model.id)) < 2:
            return
        ask_trusted = self._dice.random() >= 1.0 - TRUSTED_SHARE
        chosen = self._some(counted, part, min(each.inputs_max for each in ready))
        question = only(counted, [part.rows[at] for at in chosen])
        first = Opinion(node, rows_of(reply, model)[chosen])
        self._spawn(self._compare(model, question, first, ask_trusted=ask_trusted))

    async def run(self) -> None:
        """Question quarantined nodes for ever."""
        while True:
            await asyncio.sleep(PROBATION_EVERY_S)
            self._probe_all()

    def _probe_all(self) -> None:
        for node in self._registry:
            if node.state is NodeState.QUARANTINED and self._examiner.clock.monotonic() >= node.leave_alone_until:
                self._spawn(self._probe(node))

    async def stop(self) -> None:
        """Cancel all comparisons."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, model: Model, question: Counted, first: Opinion, *, ask_trusted: bool) -> None:
        """Compare an answer with a second node's; if they differ, a trusted node's decides."""
        second = await self._opinions.of_trusted(model, question, first.node) if ask_trusted else None
        if second is None:  # there is no trusted one, or it does not answer
            second = await self._opinions.of_any(model, question, {first.node.node_id})
        if second is None:
            return
        both = (first, second)
        if _alike(first.vectors, second.vectors, model):
            for each in both:
                each.node.counts["canaries_passed"] += 1
            return
        truth = second
        if not second.node.trusted:
            third = await self._opinions.of_trusted(model, question, first.node, second.node)
            if third is None:
                for each in both:
                    each.node.counts["canaries_disputed"] += 1
                names = first.node.node_id, second.node.node_id
                words = "nodes %s and %s disagree, and no trusted node can tell"
                log.warning(words, *names, extra={"node": ",".join(names)})
                return
            truth = third
        for node, vectors in both:
            if _alike(vectors, truth.vectors, model):
                node.counts["canaries_passed"] += 1
            elif not node.trusted:
                node.counts["canaries_failed"] += 1
                self._registry.quarantine(node, f"its {_answers_of(model)} are not the model's", Check.CANARY)

    async def _probe(self, node: Node) -> None:
        """Ask a quarantined node and a trusted one the same question."""
        models = self._examiner.models_of(node)
        if not models:
            return
        model = models[0] if len(models) == 1 else models[int(self._dice.random() * len(models))]
        question = self._examiner.random_question(model, node, self._dice)
        truth = await self._opinions.of_trusted(model, question, node)
        if truth is None:
            return
        right = await self._agrees(node, model, question, truth.vectors, attempt_s(1.0))
        if right is None:
            return
        if not right and node.kind == UPSTREAM:
            node.leave_alone_until = self._examiner.clock.monotonic() + PROBATION_REST_S
        run = self._right_in_a_row[node.node_id] = self._right_in_a_row.get(node.node_id, 0) + 1 if right else 0
        if run >= PROBATION_RUN:
            del self._right_in_a_row[node.node_id]
            known = {"node": node.node_id}
            log.info("node %s is readmitted: its answers have been right for a while", node.node_id, extra=known)
            self._registry.readmit(node)

    async def prove(self, node: Node) -> bool:
        """Whether a new node may get callers' work: it answers some questions as a trusted node does, if there is one.

        A node that answers wrongly is quarantined. This finds other weights and a wrong order of rows before any caller
        gets such a vector; a node that means to deceive is left to the canaries.
        """
        if node.trusted:
            return True
        for model in self._examiner.models_of(node):
            if not await self._prove(node, model):
                return False
        return True

    async def _prove(self, node: Node, model: Model) -> bool:
        """The same for one of its models."""
        question = self._examiner.random_question(model, node, self._dice, PROVE_INPUTS)
        inputs_max = min(each.inputs_max for each in (node, *self._registry.ready(model.id)))
        inputs = range(len(question.lengths))
        question = only(question, inputs[: cut(question.lengths, inputs, WHOLE_TOKENS_MAX, inputs_max).inputs])
        truth = await self._opinions.of_trusted(model, question, node)
        if truth is None:
            return True
        right = await self._agrees(node, model, question, truth.vectors, REQUEST_MIN_S)
        if right is False:
            self._registry.quarantine(node, f"its first {_answers_of(model)} are not the model's", Check.CANARY)
        return right is True

    async def _agrees(self, node: Node, model: Model, question: Counted, truth: Matrix, within_s: float) -> bool | None:
        """Whether a node gives these vectors, which is counted. None where it gives no answer: that is no lie."""
        part = Part(node.node_id, tuple(range(len(question.lengths))), question.tokens, 1.0)
        try:
            async with asyncio.timeout(within_s):
                reply = await self._examiner.embed(part, model, question)
            right = _alike(rows_of(reply, model), truth, model)
        except WrongAnswer:
            right = False
        except (NodeFailure, TimeoutError):
            return None
        node.counts["canaries_passed" if right else "canaries_failed"] += 1
        return right

    def _some(self, counted: Counted, part: Part, inputs_max: int) -> list[int]:
        """Random inputs of a part to compare: as many as any node gets whole."""
        left = list(range(len(part.rows)))
        some: list[int] = []
        tokens = 0
        while left and len(some) < min(COMPARED_INPUTS_MAX, inputs_max):
            at = left.pop(int(self._dice.random() * len(left)))
            tokens += counted.lengths[part.rows[at]]
            if some and tokens > WHOLE_TOKENS_MAX:
                break
            some.append(at)
        return some

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.critical("a comparison ended (%s)", type(bug).__name__)  # no words: they may quote a text


def _answers_of(model: Model) -> str:
    return "scores" if model.reranks else "vectors"


def _alike(one: Matrix, other: Matrix, model: Model) -> bool:
    """Whether all pairs of rows point the same way, or are about the same score. Both have the same shape."""
    if model.reranks:
        return scores_alike(one, other, model.tier)
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosines = np.einsum("ij,ij->i", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return bool((cosines >= COSINE_MIN[model.tier]).all())


def scores_alike(one: Matrix, other: Matrix, tier: Tier) -> bool:
    """Whether all pairs of logits are about the same score; see SCORE_OFF_MAX."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    score_off, logit_off = SCORE_OFF_MAX[tier], LOGIT_OFF_MAX[tier]
    told = np.abs(_sigmoid(a) - _sigmoid(b)) <= score_off
    ranked = np.abs(np.clip(a, *LOGITS_COMPARED) - np.clip(b, *LOGITS_COMPARED)) <= logit_off
    return bool((told & ranked).all())


def _sigmoid(logits: "np.ndarray[Any, np.dtype[np.float64]]") -> "np.ndarray[Any, np.dtype[np.float64]]":
    return 0.5 * (1.0 + np.tanh(0.5 * logits))  # of any number, without an overflow
