"""Health is a verified embedding or score, or a token that is made. One task a node asks for one: rarely while callers'
own requests show that it works, often while it is out. Upstream servers are probed at their own pace (see pace)."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from embedmesh.fleet.examiner import PROBE_WORDS, Examiner
from embedmesh.fleet.pace import ProbePace
from embedmesh.fleet.registry import Node
from embedmesh.rules.deadlines import attempt_s
from embedmesh.rules.embeddings import Counted, ServedModels
from embedmesh.rules.errors import NodeBusy, NodeFailure, NodeTooSlow, WrongAnswer
from embedmesh.rules.forwarding import Part
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import PROBE_EVERY_S, Check, NodeState

log = logging.getLogger("embedmesh.fleet")

BY_CALLERS_S = 1.0  # a right answer this young will do: the next probe ends before it is too old (see Registry.proven)
OUT_EVERY_S = 0.25  # a node that is out, or has just failed, should not wait for us
NODE_PROBE_S = 2.0  # a dozen tokens; a node that needs longer is as good as out
PACED_PROBE_S = 10.0  # of an upstream: it may be far away, or load its model at the first request
LATE_PROBE_S = 15.0  # at most, after probes that were late: a node short of CPU is slow, not gone
MEASURE_S = 10.0  # a thousand tokens
MEASURE_EVERY_S = 30.0  # of a node without work: a fifth of a per cent of a slow node's time
THREADS_CHARS_MAX = 200  # of what a node says of its threads, which operators are shown
FIRST_ANSWER_S = 5.0  # a node that starts together with us is ready in one
SPEED_INPUTS, SPEED_TOKENS = 16, 64  # of the one large probe of a node that has become ready: a batch of our engine


class Prober:
    """Keeps one node's state true. `run` never returns; cancel it."""

    def __init__(
        self,
        node: Node,
        examiner: Examiner,
        prove: Callable[[Node], Awaitable[bool]] | None = None,
        pace: ProbePace | None = None,
    ) -> None:
        """`prove` decides whether a new node that embeds may get callers' work; without it, it may. An upstream has a
        `pace`.
        """
        self._pace = pace
        self._node = node
        self._prove = prove
        self._examiner = examiner
        self._registry = examiner.registry
        self._clock = examiner.clock
        self._probes: dict[str, Counted] = {}  # by model, once it is asked for: a reload may add models
        self._logged_models: set[str] = set()
        self._logged_unproven = self._logged_quiet = False
        self._began = self._clock.monotonic()
        self._probed_at = float("-inf")
        self._measured_at = self._began
        self._answers_seen = 0
        self._late = 0  # probes in a row
        self._measuring: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Probe for ever."""
        try:
            await self._run()
        finally:
            if self._measuring is not None:
                self._measuring.cancel()

    async def _run(self) -> None:
        while True:
            before = self._node.state
            if before is NodeState.QUARANTINED:
                await self._learn_models()  # canary questions it, and compares its answers with another node's
                if self._pace is not None:
                    self._pace.begin()  # once it is readmitted
            elif self._pace is not None:
                if self._pace.due(self._node, self._clock.monotonic()):
                    await self.probe()
                    self._pace.probed(self._node, self._clock.monotonic())
            elif before is not NodeState.READY or self._node.doubt:
                await self.probe()
            elif self._clock.monotonic() - self._probed_at >= PROBE_EVERY_S:
                await self.probe(only_new=self._quiet_s() < BY_CALLERS_S)
            self._log(before)
            if self._node.state is NodeState.READY and self._wants_measuring(before):
                self._measuring = asyncio.create_task(self.measure())  # a node that hangs in it must be probed, too
            await asyncio.sleep(PROBE_EVERY_S / 5 if before is NodeState.QUARANTINED else OUT_EVERY_S)

    def _log(self, before: NodeState) -> None:
        """Log a change of state, and once why a new node gets no work."""
        now = self._node.state
        known = {"node": self._node.node_id}
        quiet = now is NodeState.READY and not self._registry.proven(self._node)
        if quiet and not self._logged_quiet:  # it may be the only one, and still get work
            words = "node %s has given no right answer of late: %s"
            log.warning(words, self._node.node_id, self._node.last_failure, extra=known)
        self._logged_quiet = quiet
        if now is before and (now is not NodeState.UNPROVEN or self._logged_unproven):
            return
        if now is NodeState.READY:
            log.info("node %s is ready", self._node.node_id, extra=known)
        elif now is NodeState.UNPROVEN and self._clock.monotonic() - self._began > FIRST_ANSWER_S:
            self._logged_unproven = True
            log.warning("node %s is unproven: %s", self._node.node_id, self._node.last_failure, extra=known)

    def _wants_measuring(self, before: NodeState) -> bool:
        """Whether its speed is unknown, or was learned too long ago since it gets no work."""
        if self._node.counts["answers"] != self._answers_seen:
            self._answers_seen = self._node.counts["answers"]
            self._measured_at = self._clock.monotonic()  # callers' requests measure it
        if self._pace is not None:  # once, before callers' large requests measure it: it may cost money
            return before is not NodeState.READY and not self._node.load.measured
        return before is not NodeState.READY or self._clock.monotonic() - self._measured_at >= MEASURE_EVERY_S

    async def _learn_models(self) -> None:
        """Learn what a quarantined node serves, if that is not known."""
        if not self._node.models:
            with contextlib.suppress(NodeFailure, TimeoutError):
                async with asyncio.timeout(NODE_PROBE_S):
                    models = self._known(await self._examiner.client.served(self._node.node_id))
                    self._node.models = frozenset(model.id for model in models)

    async def probe(self, *, only_new: bool = False) -> None:
        """One probe: what does the node serve, and does each of these models work?

        `only_new` leaves out the models that answers to callers prove already: a busy node has better to do.
        """
        self._probed_at = self._clock.monotonic()
        embedded = False
        try:
            async with asyncio.timeout(self._deadline_s()):
                served = await self._examiner.client.served(self._node.node_id)
                self._node.shortage, self._node.keys = served.shortage, served.keys or None
                self._node.threads = served.threads[:THREADS_CHARS_MAX] if served.threads.isprintable() else ""
                if not served.data:
                    self._registry.serves(self._node, ())
                    raise NodeBusy("none of its models is loaded now")
                models = self._known(served)
                if not models:
                    raise WrongAnswer("the node serves no model of the catalogue", check=Check.MODELS)
                for model in models:
                    if only_new and model.id in self._node.models:
                        continue
                    if model.encodes:
                        await self._embed(model, self._probe_of(model))
                    else:
                        await self._examiner.generate(self._node, model)
                    embedded = True
        except NodeFailure as failure:
            self._registry.failed(self._node, failure, by_probe=True)
        except TimeoutError:
            self._late += 1
            self._registry.failed(self._node, NodeTooSlow("the probe's deadline passed"), by_probe=True)
        else:
            self._late = 0
            ids = [model.id for model in models]
            if self._node.state is NodeState.UNPROVEN:
                self._node.models = frozenset(ids)  # it gets no work yet
                if self._prove is not None and not await self._prove(self._node):
                    return
            if embedded:
                self._registry.answered_right(self._node, ids)
            else:
                self._registry.serves(self._node, ids)

    def _probe_of(self, model: Model) -> Counted:
        counted = self._probes.get(model.id)
        if counted is None:
            counted = self._probes[model.id] = self._examiner.probe(model)
        return counted

    def _deadline_s(self) -> float:
        """As much as callers' requests get, once the node's speed is known; doubled after each late probe."""
        if self._pace is not None:
            return PACED_PROBE_S
        deadline_s = NODE_PROBE_S
        if self._node.state is not NodeState.UNPROVEN:
            load, tokens = self._node.load, max((each.tokens for each in self._probes.values()), default=0)
            deadline_s = min(NODE_PROBE_S, attempt_s(load.fixed_s + tokens / load.tokens_per_s))
        return float(min(deadline_s * 2**self._late, LATE_PROBE_S))

    async def measure(self) -> None:
        """One larger question for each kind of model, which shows a new node's speed before callers' large requests."""
        self._measured_at = self._clock.monotonic()
        with contextlib.suppress(NodeFailure, TimeoutError):  # it is proven already
            async with asyncio.timeout(MEASURE_S):
                for model in self._examiner.models_of(self._node):
                    await self._embed(model, self._large_probe(model))

    def _large_probe(self, model: Model) -> Counted:
        words = PROBE_WORDS
        repeats = min(SPEED_TOKENS, model.max_tokens) // (2 * len(words))  # a word may be two tokens
        texts = [" ".join(words[at:] + each * repeats) for each in (words, words[::-1]) for at in range(len(words))]
        return self._examiner.count(texts[:SPEED_INPUTS], model)

    async def _embed(self, model: Model, counted: Counted) -> None:
        """A verified answer. Raises a NodeFailure.

        It teaches the node's speed, except while the node is out: then it includes a connection, or the node's start.
        """
        learns = self._node.state is NodeState.READY
        rows = tuple(range(min(len(counted.lengths), self._node.inputs_max)))
        part = Part(self._node.node_id, rows, sum(counted.lengths[row] for row in rows), NODE_PROBE_S)
        load, well, late = self._node.load, False, False
        load.began(part.tokens, self._clock.monotonic())
        try:
            await self._examiner.embed(part, model, counted)
            well = True
        except asyncio.CancelledError:
            late = True  # it is at least this slow
            raise
        finally:
            load.ended(part.tokens, self._clock.monotonic(), well=well and learns, late=late and learns)

    def _known(self, served: ServedModels) -> list[Model]:
        """The catalogue's models among the offers. An offer with another digest is another model."""
        models = []
        for offer in served.data:
            model = self._examiner.catalogue.find(offer.id)
            if model is not None and model.digest == offer.digest and model.width == offer.width:
                models.append(model)
            elif offer.id not in self._logged_models:
                self._logged_models.add(offer.id)
                words = "node %s offers a model that is not the catalogue's: ignored"
                log.warning(words, self._node.node_id, extra={"node": self._node.node_id})
        return models

    def _quiet_s(self) -> float:
        last = self._node.last_right_answer
        return float("inf") if last is None else self._clock.monotonic() - last
