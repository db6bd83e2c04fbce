"""Health is a verified embedding. One task a node asks for one: rarely while callers' own requests show that it works,
often while it is out. Servers of other makes are asked at their own pace (see pace)."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Protocol

from embedmesh.fleet.pace import Pace
from embedmesh.fleet.registry import PROBE_EVERY_S, Node, Registry
from embedmesh.rules.deadlines import attempt_s
from embedmesh.rules.embeddings import Counted, EmbedVectors, ServedModels
from embedmesh.rules.errors import NodeBusy, NodeFailure, NodeTooSlow, WrongAnswer
from embedmesh.rules.forwarding import Part, Verify
from embedmesh.rules.ids import new_id
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import Check, NodeState
from embedmesh.rules.ports import Catalogue, Clock, Tokenizer

log = logging.getLogger("embedmesh.fleet")

BY_CALLERS_S = 4.0  # a right answer so young was to a caller: our own last question was before that
OUT_EVERY_S = 0.25  # a node that is out, or has just failed, should not wait for us
PROBE_S = 2.0  # a dozen tokens; a node that needs longer is as good as out
PACED_PROBE_S = 10.0  # of a server of another make: it may be far away, or load its model when it is asked first
LATE_PROBE_S = 15.0  # at most, after some that were late: one that is starved is slow, not gone
MEASURE_S = 10.0  # a thousand tokens
MEASURE_EVERY_S = 30.0  # of a node that gets no work: a fifth of a per cent of a slow node's time
FIRST_ANSWER_S = 5.0  # a node that starts together with us is ready in one
SPEED_INPUTS, SPEED_TOKENS = 16, 64  # of the one large probe that a node gets when it is ready: a batch of our engine
SPECIALS_MAX = 8  # that a model may add to a text: of one whose tokenizer is not here
PROBE_TEXT = "The quick brown fox jumped over the lazy dog."


class ProbeClient(Protocol):
    """What a probe needs of the node client."""

    async def embed(self, part: Part, model: Model, counted: Counted, request_id: str) -> EmbedVectors: ...

    async def served(self, node_id: str) -> ServedModels: ...


async def _by_itself(node: Node) -> bool:
    return True


class Prober:
    """Keeps one node's state true. `run` never returns; cancel it."""

    def __init__(
        self,
        node: Node,
        registry: Registry,
        catalogue: Catalogue,
        tokenizers: dict[str, Tokenizer],
        client: ProbeClient,
        clock: Clock,
        verify: Verify,
        prove: Callable[[Node], Awaitable[bool]] = _by_itself,
        pace: Pace | None = None,
    ) -> None:
        """`prove` says of a new node, once it embeds, whether it may get callers' work. One of another make has a
        `pace`.
        """
        self._pace = pace
        self._node = node
        self._vouch = prove
        self._registry = registry
        self._catalogue = catalogue
        self._client = client
        self._clock = clock
        self._verify = verify
        self._probes = {model.id: count([PROBE_TEXT], model, tokenizers.get(model.id)) for model in catalogue.models}
        self._tokenizers = tokenizers
        self._told: set[str] = set()
        self._told_unproven = self._told_quiet = False
        self._began = clock.monotonic()
        self._probed_at = float("-inf")
        self._measured_at = clock.monotonic()
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
                await self._look()  # its probes are compared with another node's answers: see canary
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
            self._tell(before)
            if self._node.state is NodeState.READY and self._wants_measuring(before):
                self._measuring = asyncio.create_task(self.measure())  # a node that hangs in it must be probed, too
            await asyncio.sleep(PROBE_EVERY_S / 5 if before is NodeState.QUARANTINED else OUT_EVERY_S)

    def _tell(self, before: NodeState) -> None:
        """Say when the state has changed, and once why a new node gets no work."""
        now = self._node.state
        quiet = now is NodeState.READY and not self._registry.proven(self._node)
        if quiet and not self._told_quiet:  # it may be the only one, and get work for want of another
            log.warning("node %s has answered nothing rightly of late: %s", self._node.node_id, self._node.last_failure)
        self._told_quiet = quiet
        if now is before and (now is not NodeState.UNPROVEN or self._told_unproven):
            return
        if now is NodeState.READY:
            log.info("node %s is ready", self._node.node_id)
        elif now is NodeState.UNPROVEN and self._clock.monotonic() - self._began > FIRST_ANSWER_S:
            self._told_unproven = True
            log.warning("node %s is unproven: %s", self._node.node_id, self._node.last_failure)

    def _wants_measuring(self, before: NodeState) -> bool:
        """A new node's speed is not known, and what was learned of one that gets no work may not be true any more."""
        if self._node.counts["answers"] != self._answers_seen:
            self._answers_seen = self._node.counts["answers"]
            self._measured_at = self._clock.monotonic()  # by callers' requests
        if self._pace is not None:  # once, before callers' large requests come: they tell, and it may cost money
            return before is not NodeState.READY and not self._node.load.measured
        return before is not NodeState.READY or self._clock.monotonic() - self._measured_at >= MEASURE_EVERY_S

    async def _look(self) -> None:
        """Learn what a quarantined node serves, where that is not known from before."""
        if not self._node.models:
            with contextlib.suppress(NodeFailure, TimeoutError):
                async with asyncio.timeout(PROBE_S):
                    models = self._known(await self._client.served(self._node.node_id))
                    self._node.models = frozenset(model.id for model in models)

    async def probe(self, *, only_new: bool = False) -> None:
        """One probe: what does it serve, and does each such model really embed?

        `only_new` leaves out the models whose answers to callers prove them already: a busy node has better to do.
        """
        self._probed_at = self._clock.monotonic()
        embedded = False
        try:
            async with asyncio.timeout(self._patience_s()):
                served = await self._client.served(self._node.node_id)
                self._node.shortage = served.shortage
                if not served.data:
                    self._registry.serves(self._node, ())
                    raise NodeBusy("none of its models is loaded now")
                models = self._known(served)
                if not models:
                    raise WrongAnswer("the node serves no model of the catalogue", check=Check.MODELS)
                for model in models:
                    if not (only_new and model.id in self._node.models):
                        await self._embed(model, self._probes[model.id])
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
                self._node.models = frozenset(ids)  # it gets no work by that yet
                if not await self._vouch(self._node):
                    return
            if embedded:
                self._registry.answered_right(self._node, ids)
            else:
                self._registry.serves(self._node, ids)  # it says so, and no more

    def _patience_s(self) -> float:
        """As much as callers have, where it is known how fast the node is; after each that was late, twice as much."""
        if self._pace is not None:
            return PACED_PROBE_S
        patience_s = PROBE_S
        if self._node.state is not NodeState.UNPROVEN:
            load, tokens = self._node.load, max(counted.tokens for counted in self._probes.values())
            patience_s = min(PROBE_S, attempt_s(load.fixed_s + tokens / load.tokens_per_s))
        return float(min(patience_s * 2**self._late, LATE_PROBE_S))

    async def measure(self) -> None:
        """One larger embedding, so that a new node's speed is known before callers' large requests come."""
        self._measured_at = self._clock.monotonic()
        model = next((model for model in self._catalogue.models if model.id in self._node.models), None)
        if model is None:
            return
        words = PROBE_TEXT.split()
        repeats = min(SPEED_TOKENS, model.max_tokens) // (2 * len(words))  # a word may be two tokens
        texts = [" ".join(words[at:] + each * repeats) for each in (words, words[::-1]) for at in range(len(words))]
        counted = count(texts[:SPEED_INPUTS], model, self._tokenizers.get(model.id))
        with contextlib.suppress(NodeFailure, TimeoutError):  # it is proven already; callers' requests will tell
            async with asyncio.timeout(MEASURE_S):
                await self._embed(model, counted)

    async def _embed(self, model: Model, counted: Counted) -> None:
        """A verified embedding, from which the node's speed is learned. Raises a NodeFailure.

        Not while it is out: then a connection has to be made first, and the node may have just begun.
        """
        learns = self._node.state is NodeState.READY
        part = Part(self._node.node_id, tuple(range(len(counted.lengths))), counted.tokens, PROBE_S)
        load, well, late = self._node.load, False, False
        load.began(part.tokens, self._clock.monotonic())
        try:
            reply = await self._client.embed(part, model, counted, new_id("req", self._clock))
            self._verify(reply, model, part, counted.exact)
            well = True
        except asyncio.CancelledError:
            late = True  # so slow it is at least
            raise
        finally:
            load.ended(part.tokens, self._clock.monotonic(), well=well and learns, late=late and learns)

    def _known(self, served: ServedModels) -> list[Model]:
        """The catalogue's models among those offered; an offer with another digest is another model."""
        models = []
        for offer in served.data:
            model = self._catalogue.find(offer.id)
            if model is not None and model.digest == offer.digest and model.width == offer.width:
                models.append(model)
            elif offer.id not in self._told:
                self._told.add(offer.id)
                log.warning("node %s offers a model that is not the catalogue's: ignored", self._node.node_id)
        return models

    def _quiet_s(self) -> float:
        last = self._node.last_right_answer
        return float("inf") if last is None else self._clock.monotonic() - last


def count(texts: list[str], model: Model, tokenizer: Tokenizer | None) -> Counted:
    """What callers' texts would be counted as; see flow.count."""
    if tokenizer is None:
        return Counted(lengths=[len(text) + SPECIALS_MAX for text in texts], texts=texts, exact=False)
    ids = tokenizer.ids(texts)
    return Counted(lengths=[len(each) + tokenizer.specials for each in ids], ids=ids, texts=texts)
