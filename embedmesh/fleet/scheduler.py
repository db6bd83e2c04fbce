"""Where requests wait for nodes. A part is bound to a node as late as possible: when that node has room for it.

While the nodes have enough work, the rest waits here, where plans can still change: short requests go first, every
account gets its share (see fair_queue), a node that turns slow or dies holds few parts, and a large request goes to
whichever nodes are free.

This code never waits: it hands parts to callbacks, and takes time and dice as arguments.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace

from embedmesh.fleet.admission import check_admission
from embedmesh.fleet.at_once import AtOnce
from embedmesh.fleet.candidates import Candidate, candidates_of, expected_s
from embedmesh.fleet.choose import Policy, choose_candidate, fastest
from embedmesh.fleet.fair_queue import FairQueue, size_of
from embedmesh.fleet.look_again import CallLater, LookAgain
from embedmesh.fleet.queued import QueuedRequest, Remainder
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.retries import Retries, had_begun
from embedmesh.fleet.running import Running
from embedmesh.fleet.spread import cut, in_order, stays_whole
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import InvalidValue, NodeFailure, NodeTooSlow, Overloaded
from embedmesh.rules.forwarding import Asker, Part
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock, Dice

LOOK_AHEAD = 4  # requests that found no node, after which those behind them wait, too
SKIP_MAX = 64  # the same, counting those for which too little is ahead to use a slow node
QUEUED_TOKENS_MAX = 20_000_000  # of one model: 80 MB of ids, and ten minutes at thirty thousand tokens a second
OWN_ACCOUNT = ""  # stands for the account of the gateway's own questions


class Scheduler:
    """Implements the port `Fleet`. One queue a model."""

    def __init__(
        self,
        registry: Registry,
        clock: Clock,
        dice: Dice,
        call_later: CallLater,
        *,
        policy: Policy = fastest,
        hedge: bool = False,
    ) -> None:
        """With `hedge`, an idle node also gets a short request that is late."""
        self.registry, self.retries = registry, Retries(registry, clock, hedge=hedge)
        self._clock, self._dice, self._policy = clock, dice, policy
        self._queues: dict[str, FairQueue] = {}  # by model; none that is empty
        self._running = Running(registry, clock, self._queues, self.assign)
        self._at_once = at_once = AtOnce(registry, self._running, self.retries.budget, self._queues, dice, policy)
        self.try_now, self.answered_now = at_once.try_now, self._running.answered_now  # without a call of its own
        self._numbers, self._assigning = itertools.count(), False
        self._later = LookAgain(clock, call_later, self.assign)
        registry.on_change.append(self.assign)

    def use(self, policy: Policy, *, hedge: bool) -> None:
        """For parts that are given out from now on."""
        self._policy = policy
        self._at_once.use(policy)
        self.retries.use(hedge=hedge)

    # -- the port Fleet

    def serves(self, model: Model) -> bool:
        return bool(self.registry.ready(model.id))

    def may_come(self, model: Model) -> bool:
        return self.registry.may_come(model.id)

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        nodes, queue = self.registry.ready(model.id), self._queues.get(model.id)
        if queue is not None and nodes:
            candidates = candidates_of(nodes, None, self._clock.monotonic(), self._dice)
            check_admission(queue, account_id, tokens, candidates, len(nodes))

    def others_wait(self, model: Model, account_id: str) -> bool:
        queue = self._queues.get(model.id)
        return queue is not None and queue.accounts_with(account_id) > 1

    def expected_s(self, model: Model, tokens: int) -> float | None:
        nodes = self.registry.ready(model.id)
        if not nodes:
            return None
        queue = self._queues.get(model.id)
        return expected_s(nodes, None if queue is None else queue.tokens, tokens, self._clock.monotonic(), self._dice)

    def enter(
        self,
        model: Model,
        counted: Counted,
        account_id: str,
        asker: Asker,
        only: str | None = None,
        beginning: bytes | None = None,
    ) -> QueuedRequest:
        self.retries.budget.request(self._clock.monotonic())
        return self._enter(model, counted, account_id, asker, frozenset(), only, beginning)

    def adopt(self, model: Model, counted: Counted, account_id: str, asker: Asker, part: Part) -> QueuedRequest:
        request = self._request(model, counted, account_id, asker, frozenset())
        request.taken[part] = request.remainders.pop()
        asker.take(part)
        return request

    def open(self, model: Model, counted: Counted, account_id: str, asker: Asker) -> QueuedRequest:
        """A request of which nothing is given out yet: take its inputs from it, and give out some `more` each time."""
        self.retries.budget.request(self._clock.monotonic())
        return self._request(model, counted, account_id, asker, frozenset())

    def more(self, request: QueuedRequest, rows: tuple[int, ...], tokens: int) -> None:
        """Give out some inputs of an open request, too."""
        request.remainders.append(Remainder(rows, tokens))
        if len(request.remainders) > 1:  # it waits already
            self._queues[request.model_id].add(request, tokens)
            self.assign()
        else:
            self._give_out_or_queue(request, tokens, self.registry.ready(request.model_id))

    def repeat(self, model: Model, counted: Counted, asker: Asker, avoid: frozenset[str]) -> QueuedRequest:
        """Enter a question of our own, with a share like an account's. It never goes to the nodes to `avoid`."""
        return self._enter(model, counted, OWN_ACCOUNT, asker, avoid, None)

    @property
    def queued_tokens(self) -> int:
        """Of all requests, tokens that no node works on."""
        return sum(queue.tokens for queue in self._queues.values())

    # -- for tickets

    def leave(self, request: QueuedRequest) -> None:
        """It wants no more parts."""
        request.left = True
        queue = self._queues.get(request.model_id)
        if request.remainders and queue is not None:
            queue.remove(request, request.tokens, len(request.remainders))
            request.remainders.clear()

    def ended(self, request: QueuedRequest, part: Part, failure: NodeFailure | None) -> bool:
        """A part of it was answered right, or failed. Returns whether the inputs of a failed one wait again."""
        remainder = request.taken.pop(part)
        if failure is None:
            self._running.answered_now(part, self._clock.monotonic())
            return False
        node = self._running.end(part, late=isinstance(failure, NodeTooSlow))
        self.registry.failed(node, failure)
        if any(other.rows == part.rows for other in request.taken):
            return True  # a hedge: the other node still works on it
        request.last = failure
        again = not request.left and self.retries.may_retry(request, part, remainder, failure)
        if again:
            begun = had_begun(failure)
            self._return(request, remainder.after(part, attempts=begun, refusals=not begun))
        self.assign(node)
        return again

    def _return(self, request: QueuedRequest, remainder: Remainder) -> None:
        queue = self._queues.setdefault(request.model_id, FairQueue())
        queue.add(request, remainder.tokens)
        waits = bool(request.remainders)
        request.remainders.insert(0, remainder)
        if not waits:
            request.start_tag = request.finish_tag = 0.0  # it had its turn: now it is first
            queue.push(request)

    def hedge(self, request: QueuedRequest, part: Part) -> None:
        """A part is late: an idle node gets it, too, if there is one and the budget allows it."""
        if (found := self.retries.hedge(request, part)) is not None:
            remainder, candidate = found
            candidate.node.counts["hedges"] += 1
            request.asker.take(self._bind(request, remainder, candidate, part.tokens, self._clock.monotonic()))

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up through no fault of the node; with `late`, because the node is slow."""
        self.assign(self._running.end(part, late=late))

    # -- who gets what

    def assign(self, freed: Node | None = None) -> None:
        """Give out all that can be given. Called after every change that may matter, such as a node being `freed`."""
        if self._assigning or not self._queues:
            return  # an asker that leaves or gives up frees no node
        self._assigning = True
        try:
            for model_id, queue in list(self._queues.items()):
                if queue.heap:
                    self._assign(model_id, queue, freed)
                if not queue.heap:
                    del self._queues[model_id]  # and with it the tags: the next queue starts from zero
        finally:
            self._assigning = False

    def _enter(
        self,
        model: Model,
        counted: Counted,
        account_id: str,
        asker: Asker,
        avoid: frozenset[str],
        only: str | None,
        beginning: bytes | None = None,
    ) -> QueuedRequest:
        nodes = self.registry.ready(model.id)
        if counted.texts is None and nodes and not any(node.reads_ids for node in nodes):
            raise InvalidValue(
                "The servers that run this model take no token ids. Send the text itself.", param="input"
            )
        tokens = counted.tokens
        queue = self._queues.get(model.id)
        if queue is not None and queue.tokens + tokens > QUEUED_TOKENS_MAX and queue.heap:
            raise Overloaded("The queue for this model is full. Try again shortly.", retry_after_s=5.0)
        request = self._request(model, counted, account_id, asker, avoid)
        request.only, request.beginning = only, beginning
        self._give_out_or_queue(request, tokens, nodes)
        return request

    def _give_out_or_queue(self, request: QueuedRequest, tokens: int, nodes: Sequence[Node]) -> None:
        model_id = request.model_id
        if model_id not in self._queues and not self._assigning and self._assign_at_once(request, nodes):
            return
        queue = self._queues.setdefault(model_id, FairQueue())
        for remainder in request.remainders:
            queue.add(request, remainder.tokens)
        queue.tag(request, tokens)
        queue.push(request)
        self.assign()

    def _request(
        self, model: Model, counted: Counted, account_id: str, asker: Asker, avoid: frozenset[str]
    ) -> QueuedRequest:
        lengths, tokens = counted.lengths, counted.tokens
        inputs_max = max([node.inputs_max for node in self.registry.ready(model.id)], default=1)
        return QueuedRequest(
            scheduler=self,
            model_id=model.id,
            account_id=account_id,
            size=size_of(tokens),
            lengths=lengths,
            asker=asker,
            whole=stays_whole(tokens, len(lengths), inputs_max),
            needs_texts=counted.ids is None,
            needs_ids=counted.texts is None,
            remainders=[Remainder(tuple(in_order(lengths, inputs_max)), tokens, avoid)],
            number=next(self._numbers),
        )

    def _assign_at_once(self, request: QueuedRequest, nodes: Sequence[Node]) -> bool:
        """Where the queue is empty there is no order to keep. Returns whether all of the request was given out."""
        now = self._clock.monotonic()
        self._assigning = True
        try:
            candidates = candidates_of(nodes, None, now, self._dice)
            self._give_out(request, candidates, 0, now, None, small=request.whole)
        finally:
            self._assigning = False
        return not request.remainders

    def _assign(self, model_id: str, queue: FairQueue, freed: Node | None) -> None:
        now = self._clock.monotonic()
        candidates = candidates_of(self.registry.ready(model_id), freed, now, self._dice)
        skipped: list[QueuedRequest] = []
        ahead = vain = 0
        needed = 0.0  # tokens that must be ahead of a short request before a free slow node is worth using
        large_waits = False  # then later requests do not fill the nodes that it waits for
        while queue.heap and vain < LOOK_AHEAD and len(skipped) < SKIP_MAX:
            if needed > queue.tokens or not any(candidate.room(not large_waits) for candidate in candidates):
                break
            request = queue.pop()
            if not request.remainders:
                continue  # it left
            if not request.whole or ahead >= needed:
                small = request.whole and not large_waits
                needed = self._give_out(request, candidates, ahead, now, queue, small=small)
                vain += bool(request.remainders)
            if request.remainders:
                skipped.append(request)
                ahead += request.tokens
                large_waits = large_waits or not request.whole
        while not candidates and queue.heap:
            if (request := queue.pop()).remainders:
                self._give_up(request, queue)
        for request in skipped:
            queue.push(request)
        if queue.heap and candidates:
            self._later.look(candidates, some_hidden=len(candidates) < len(self.registry.ready(model_id)))

    def _give_out(
        self,
        request: QueuedRequest,
        candidates: list[Candidate],
        ahead: int,
        now: float,
        queue: FairQueue | None,
        *,
        small: bool,
    ) -> float:
        """Give out as much of one request as should be given now. It is in the `queue`, or new where that is None.

        Returns how many tokens must be ahead of a request like it before a free node is used.
        """
        while request.remainders:
            remainder = request.remainders[0]
            able = [candidate for candidate in candidates if request.can(candidate.node, remainder)]
            if not able:
                if not any(request.can(node, remainder) for node in self.registry.ready(request.model_id)):
                    self._give_up(request, queue)
                return 0.0
            candidate, tokens_max, needed = choose_candidate(
                self._policy, self._dice, able, request, remainder.tokens, ahead, small=small
            )
            if candidate is None:
                return needed if request.whole else 0.0
            part = self._bind(request, remainder, candidate, tokens_max, now)
            left = remainder.rows[len(part.rows) :]
            request.remainders[:1] = (
                [replace(remainder, rows=left, tokens=remainder.tokens - part.tokens)] if left else []
            )
            if queue is not None:
                queue.remove(request, part.tokens, not left)
                queue.now = max(queue.now, request.start_tag)
            request.asker.take(part)
        return 0.0

    def _bind(
        self, request: QueuedRequest, remainder: Remainder, candidate: Candidate, tokens_max: int, now: float
    ) -> Part:
        node = candidate.node
        taken = cut(request.lengths, remainder.rows, tokens_max, node.inputs_max)
        part = Part(
            node_id=node.node_id,
            rows=remainder.rows[: taken.inputs],
            tokens=taken.tokens,
            expected_s=candidate.finish_s(taken.tokens, request.whole),
            ask=node.asks.get(request.model_id, 0),
        )
        request.taken[part] = remainder
        self._running.parts[part] = node, not request.whole
        node.load.began(part.tokens, now, not request.whole)
        candidate.look(now)
        return part

    def _give_up(self, request: QueuedRequest, queue: FairQueue | None) -> None:
        if queue is not None:
            queue.remove(request, request.tokens, len(request.remainders))
        request.remainders.clear()
        request.asker.give_up(request.last)
