"""Are the vectors the model's? Some answers are asked for again, of another node, and compared.

The node cannot tell which: the second request is like any other, and comes after the first was answered. Where two
nodes disagree, a node that the operator trusts decides, and whoever differs from it is quarantined. A quarantined node
gets probes that are compared in the same way; a long enough run of right ones readmits it.

Nothing here delays a caller: it happens after the answer. Canaries are at the operator's cost.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any

import numpy as np

from embedmesh.deadline import within
from embedmesh.fleet.probe import PROBE_TEXT, count
from embedmesh.fleet.registry import UPSTREAM, Node, Registry
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX
from embedmesh.rules.deadlines import LOOK_AGAIN_S, attempt_s
from embedmesh.rules.embeddings import Counted, EmbedVectors
from embedmesh.rules.errors import NodeFailure, NodeTooSlow, Overloaded, WrongAnswer
from embedmesh.rules.forwarding import NodeClient, Part, Ticket, Verify
from embedmesh.rules.ids import new_id
from embedmesh.rules.limits import REQUEST_MIN_S
from embedmesh.rules.models import Model, Tier
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Catalogue, Clock, Dice, Tokenizer

log = logging.getLogger("embedmesh.fleet")

FIRST_ANSWERS = 500  # of a node, since it was admitted or readmitted: looked at more closely (contract section 5)
FIRST_SHARE, SHARE = 0.10, 0.01
SEVERAL_SHARE = 0.25  # of the first ones with more than one input: rarer, more is at stake, and no more is asked again
TRUSTED_SHARE = 0.5  # of canaries for which a trusted node is asked: many that lie alike would prove for each other
AT_ONE_TIME_MAX = 8  # canaries; more are not begun, so that they never become a load of their own
INPUTS_MAX = 8  # of a part that are compared: a node that lies about some of them is found a little later
PROBATION_EVERY_S = 15.0
PROBATION_REST_S = 60.0  # of a server of another make that was wrong again: each question may cost money
PROBATION_RUN = 20  # right answers in a row that end a quarantine: five minutes
VOUCH_INPUTS = 12  # so many that an order shows, and that they are no small request
PROBE_WORDS = PROBE_TEXT.split()
PROBE_TOKENS = (4, 40)  # of a probe, at least and at most

Matrix = np.ndarray[Any, np.dtype[np.float32]]

COSINE_MIN: dict[Tier, float] = {"exact": 0.995, "fast": 0.995, "int8": 0.96}
"""How alike two honest answers are at least. Honest bfloat16 and float32 differ by less than 0.001 (docs/choosing.md);
int8 kernels differ by the CPU; noise of a twentieth of a component's size is already at 0.7."""


class Canaries:
    """Implements the port `Observer`."""

    def __init__(
        self,
        registry: Registry,
        line: Scheduler,
        client: NodeClient,
        catalogue: Catalogue,
        tokenizers: dict[str, Tokenizer],
        clock: Clock,
        dice: Dice,
        verify: Verify,
        on_readmit: Callable[[Node], None] = lambda node: None,
    ) -> None:
        """`on_readmit` is told of each node whose quarantine has ended by right answers."""
        self._registry = registry
        self._line = line
        self._client = client
        self._catalogue = catalogue
        self._tokenizers = tokenizers
        self._clock = clock
        self._dice = dice
        self._verify = verify
        self._on_readmit = on_readmit
        self._tasks: set[asyncio.Task[None]] = set()
        self._right_in_a_row: dict[str, int] = {}  # of quarantined nodes

    def answered(self, model: Model, counted: Counted, part: Part, reply: EmbedVectors) -> None:
        """A caller gets this answer. Perhaps another node is asked the same."""
        node = self._registry.find(part.node_id)
        if node is None or node.trusted or len(self._tasks) >= AT_ONE_TIME_MAX:
            return
        node.fresh_answers += 1
        first_share = SEVERAL_SHARE if len(part.places) > 1 else FIRST_SHARE
        share = first_share if node.fresh_answers <= FIRST_ANSWERS else SHARE
        if self._dice.random() >= share or len(self._registry.ready(model.id)) < 2:
            return
        ask_trusted = self._dice.random() >= 1.0 - TRUSTED_SHARE
        places = self._some(counted, part)
        rows = _rows(reply, model.width)[places]
        asked = _only(counted, [part.places[at] for at in places])
        self._spawn(self._compare(model, asked, node, rows, ask_trusted=ask_trusted))

    async def run(self) -> None:
        """Probe quarantined nodes for ever."""
        while True:
            await asyncio.sleep(PROBATION_EVERY_S)
            self._probe_all()

    def _probe_all(self) -> None:
        for node in self._registry:
            if node.state is NodeState.QUARANTINED and self._clock.monotonic() >= node.leave_alone_until:
                self._spawn(self._probe(node))

    async def stop(self) -> None:
        """Compare no more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _compare(self, model: Model, asked: Counted, first: Node, said: Matrix, *, ask_trusted: bool) -> None:
        """What a second node says, and whom a trusted one believes if they differ."""
        second, again = await self._ask_trusted(model, asked, first) if ask_trusted else (None, None)
        if second is None:  # there is no trusted one, or it does not answer
            second, again = await self._ask(model, asked, avoid={first.node_id})
        if second is None or again is None:
            return
        if _alike(said, again, model.tier):
            for node in (first, second):
                node.counts["canaries_passed"] += 1
            return
        third, truth = (second, again) if second.trusted else await self._ask_trusted(model, asked, first, second)
        if third is None or truth is None:
            for node in (first, second):
                node.counts["canaries_disputed"] += 1
            log.warning("nodes %s and %s disagree, and no trusted node can tell", first.node_id, second.node_id)
            return
        for node, vectors in ((first, said), (second, again)):
            if _alike(vectors, truth, model.tier):
                node.counts["canaries_passed"] += 1
            elif not node.trusted:
                node.counts["canaries_failed"] += 1
                self._registry.quarantine(node, "its vectors are not the model's", Check.CANARY)

    async def _probe(self, node: Node) -> None:
        """One question to a quarantined node and to a trusted one."""
        model = next((model for model in self._catalogue.models if model.id in node.models), None)
        if model is None:
            return
        asked = self._question(model, node)
        truth_of, truth = await self._ask_trusted(model, asked, node)
        if truth_of is None or truth is None:
            return
        right = await self._agrees(node, model, asked, truth, attempt_s(1.0))
        if right is None:
            return
        if not right and node.kind == UPSTREAM:
            node.leave_alone_until = self._clock.monotonic() + PROBATION_REST_S
        run = self._right_in_a_row[node.node_id] = self._right_in_a_row.get(node.node_id, 0) + 1 if right else 0
        if run >= PROBATION_RUN:
            del self._right_in_a_row[node.node_id]
            self._registry.readmit(node)
            self._on_readmit(node)

    async def prove(self, node: Node) -> bool:
        """Whether a newcomer may get callers' work: a trusted node, if there is one, says the same to some questions.

        One that does not is quarantined. A node with other weights, or another order of rows, is found here, before
        anybody gets a vector of it; one that means to deceive is left to the canaries.
        """
        model = next((model for model in self._catalogue.models if model.id in node.models), None)
        if node.trusted or model is None:
            return True
        asked = _together([self._question(model, node) for _ in range(VOUCH_INPUTS)])
        truth_of, truth = await self._ask_trusted(model, asked, node)
        if truth_of is None or truth is None:
            return True
        right = await self._agrees(node, model, asked, truth, REQUEST_MIN_S)
        if right is False:
            self._registry.quarantine(node, "its first vectors are not the model's", Check.CANARY)
        return right is True

    async def _agrees(self, node: Node, model: Model, asked: Counted, truth: Matrix, within_s: float) -> bool | None:
        """Whether a node answers some inputs as it should. Counted. None where it gives no answer: that is no lie."""
        part = Part(node.node_id, tuple(range(len(asked.lengths))), asked.tokens, 1.0)
        try:
            async with asyncio.timeout(within_s):
                reply = await self._client.embed(part, model, asked, new_id("req", self._clock))
            self._verify(reply, model, part, asked.exact)
            right = _alike(_rows(reply, model.width), truth, model.tier)
        except WrongAnswer:
            right = False
        except (NodeFailure, TimeoutError):
            return None
        node.counts["canaries_passed" if right else "canaries_failed"] += 1
        return right

    async def _ask_trusted(self, model: Model, asked: Counted, *but: Node) -> tuple[Node, Matrix] | tuple[None, None]:
        ready = self._registry.ready(model.id)
        avoid = {node.node_id for node in (*ready, *but) if not node.trusted or node in but}
        if all(node.node_id in avoid for node in ready):
            return None, None
        return await self._ask(model, asked, avoid=avoid)

    async def _ask(self, model: Model, asked: Counted, avoid: set[str]) -> tuple[Node, Matrix] | tuple[None, None]:
        """Who answered, and what; nobody where nobody could."""
        asking = _Asking()
        try:
            async with asyncio.timeout(REQUEST_MIN_S):
                ticket = self._line.repeat(model, asked, asking, frozenset(avoid))
                try:
                    return await self._attempt(ticket, asking, model, asked)
                finally:
                    ticket.leave()
                    asking.stop(ticket)
        except (TimeoutError, Overloaded):
            return None, None

    async def _attempt(
        self, ticket: Ticket, asking: "_Asking", model: Model, asked: Counted
    ) -> tuple[Node, Matrix] | tuple[None, None]:
        while (part := await asking.next()) is not None:
            try:
                try:
                    with within(attempt_s(part.expected_s), partial(_more_s, ticket, part)):
                        reply = await self._client.embed(part, model, asked, new_id("req", self._clock))
                except TimeoutError:
                    raise NodeTooSlow("the attempt's deadline passed") from None
                self._verify(reply, model, part, asked.exact)
            except NodeFailure as failure:
                if not ticket.ended(part, failure):
                    break
            except BaseException:
                ticket.abandoned(part)
                raise
            else:
                ticket.ended(part, None)
                node = self._registry.find(part.node_id)
                return (node, _rows(reply, model.width)) if node is not None else (None, None)
        return None, None

    def _some(self, counted: Counted, part: Part) -> list[int]:
        """Which of a part's inputs are compared: some, by dice, as much as one node gets whole."""
        left = list(range(len(part.places)))
        some: list[int] = []
        tokens = 0
        while left and len(some) < INPUTS_MAX:
            at = left.pop(int(self._dice.random() * len(left)))
            tokens += counted.lengths[part.places[at]]
            if some and tokens > WHOLE_TOKENS_MAX:
                break
            some.append(at)
        return some

    def _question(self, model: Model, node: Node) -> Counted:
        """Something that nobody has asked before: random words of the vocabulary, or of a text for who reads no ids."""
        tokenizer = self._tokenizers.get(model.id)
        words = PROBE_TOKENS[0] + int(self._dice.random() * (PROBE_TOKENS[1] - PROBE_TOKENS[0]))
        if tokenizer is None or not node.reads_ids:
            text = " ".join(self._word() for _ in range(words))
            if tokenizer is not None:  # all questions together have to stay whole, whatever a word is in tokens
                text = tokenizer.clip(text, min(words, model.max_tokens - tokenizer.specials), end=False)
            return count([text], model, tokenizer)
        ids: list[int] = []
        while len(ids) < min(words, model.max_tokens - tokenizer.specials):
            token = int(self._dice.random() * tokenizer.vocab_size)
            if token not in tokenizer.special_ids:
                ids.append(token)
        return Counted(lengths=[len(ids) + tokenizer.specials], ids=[ids])

    def _word(self) -> str:
        at = int(self._dice.random() * 2 * len(PROBE_WORDS))
        return PROBE_WORDS[at] if at < len(PROBE_WORDS) else str(int(self._dice.random() * 10_000))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (bug := task.exception()) is not None:
            log.critical("a comparison ended (%s)", type(bug).__name__)  # no words: they may quote a text


def _more_s(ticket: Ticket, part: Part) -> float:
    """As for callers: a late node is left where another one may be asked. `_ask` bounds the whole."""
    return 0.0 if ticket.may_ask_another(part) else LOOK_AGAIN_S


class _Asking:
    """One question's place in line. Implements the port `Asker`."""

    def __init__(self) -> None:
        self._parts: asyncio.Queue[Part | None] = asyncio.Queue()

    def take(self, part: Part) -> None:
        self._parts.put_nowait(part)

    def give_up(self, last: NodeFailure | None) -> None:
        self._parts.put_nowait(None)

    async def next(self) -> Part | None:
        """The part to ask, or None when no node is left."""
        return await self._parts.get()

    def stop(self, ticket: Ticket) -> None:
        """Parts that came too late."""
        while not self._parts.empty():
            if (part := self._parts.get_nowait()) is not None:
                ticket.abandoned(part)


def _rows(reply: EmbedVectors, width: int) -> Matrix:
    return np.frombuffer(reply.data, "<f4").reshape(-1, width)


def _together(questions: Sequence[Counted]) -> Counted:
    """Several questions of one input as one."""
    ids = [each for one in questions for each in one.ids or ()]
    texts = [each for one in questions for each in one.texts or ()]
    lengths = [length for one in questions for length in one.lengths]
    return Counted(lengths=lengths, ids=ids or None, texts=texts or None, exact=questions[0].exact)


def _only(counted: Counted, places: Sequence[int]) -> Counted:
    """Some inputs of what was counted."""
    return Counted(
        lengths=[counted.lengths[at] for at in places],
        ids=None if counted.ids is None else [counted.ids[at] for at in places],
        texts=None if counted.texts is None else [counted.texts[at] for at in places],
        exact=counted.exact,
    )


def _alike(one: Matrix, other: Matrix, tier: Tier) -> bool:
    """Whether every vector points where its fellow does. Shape (n, width) each; none is zero."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    cosines = np.einsum("ij,ij->i", a, b) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return bool((cosines >= COSINE_MIN[tier]).all())
