"""Where requests wait for nodes. A part is bound to a node as late as possible: when that node has room for it.

While a node has work enough, what else there is stays here, where plans can still change: short work goes first, every
account gets its share (see waiting), a node that turns slow or dies has little to give back, and a large request goes
to whichever nodes are free.

Nothing here waits: parts are handed to callbacks, time and dice are arguments.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace

from embedmesh.fleet.admission import check_admission
from embedmesh.fleet.budget import RetryBudget
from embedmesh.fleet.candidates import Candidate, candidates_of
from embedmesh.fleet.choose import TIE, Option, Policy, fastest
from embedmesh.fleet.fair_queue import FairQueue, Rest, Work, size_of
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX, cut, in_order, part_tokens_max, stays_whole
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import (
    InvalidValue,
    NodeBusy,
    NodeFailure,
    NodeTooSlow,
    NodeUnreachable,
    Overloaded,
    UpstreamRefused,
)
from embedmesh.rules.forwarding import Asker, Part
from embedmesh.rules.limits import ATTEMPTS_MAX
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Clock, Dice

SOON_S = 1.0  # a request may take thirty at least: sooner is as good
LOOK_AHEAD = 4  # requests that are tried in vain before those behind them have to wait, too
SKIP_MAX = 64  # and so many more that would be tried in vain, since too little is ahead of them for a slow node
WAITING_TOKENS_MAX = 20_000_000  # of one model: 80 MB of ids, and ten minutes of thirty thousand tokens a second
OURS = ""  # in place of an account: work that nobody asked for
REFUSALS_MAX = 8  # of one part, by nodes that are full or gone: each is told of by one request or a few, not by all
HEDGE_TOKENS_MAX = 256  # larger work is not done twice
HEDGE_BUDGET = 0.5  # of what may be retried: when many are late, those that fail still have to be asked elsewhere
HEDGE_LATE, HEDGE_AFTER_S = 2.0, 0.02  # a short request is late after so many times what it should take, and so long
LOOK_AGAIN_MIN_S, LOOK_AGAIN_MAX_S = 0.001, 0.02  # a node that is about to be free, or one that says nothing

CallLater = Callable[[float, Callable[[], None]], object]
"""Seconds from now, what to do. The loop's `call_later`, or a simulator's."""


class Scheduler:
    """Implements the port `Fleet`. One line a model."""

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
        """With `hedge` an idle node is asked, too, where a short request is late."""
        self._hedge = hedge
        self.registry = registry
        self._clock = clock
        self._dice = dice
        self._call_later = call_later
        self._policy = policy
        self._budget = RetryBudget(clock)
        self._waiting: dict[str, FairQueue] = {}
        self._running: dict[Part, tuple[Node, bool]] = {}  # where, and whether it is of a request that was cut
        self._numbers = itertools.count()
        self._assigning = False
        self._look_again_at = float("inf")
        registry.on_change = self.assign

    # -- the port Fleet

    def serves(self, model: Model) -> bool:
        return bool(self.registry.ready(model.id))

    def may_come(self, model: Model) -> bool:
        return self.registry.may_come(model.id)

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        nodes, waiting = self.registry.ready(model.id), self._waiting.get(model.id)
        if waiting is not None and nodes:
            candidates = candidates_of(nodes, None, self._clock.monotonic(), self._dice)
            check_admission(waiting, account_id, tokens, candidates, len(nodes))

    def expected_s(self, model: Model, tokens: int) -> float | None:
        nodes = self.registry.ready(model.id)
        if not nodes:
            return None
        now = self._clock.monotonic()
        waiting = self._waiting.get(model.id)
        if waiting is None and tokens <= WHOLE_TOKENS_MAX:
            any_s = Candidate(nodes[0], now).finish_s(tokens, True)
            if any_s <= SOON_S:
                return any_s  # no other node's answer would make a difference to anybody
        candidates = candidates_of(nodes, None, now, self._dice)
        alone_s = min(candidate.finish_s(tokens, tokens <= WHOLE_TOKENS_MAX) for candidate in candidates)
        if waiting is None:
            return alone_s
        all_tokens_per_s = sum(candidate.tokens_per_s for candidate in candidates) * len(nodes) / len(candidates)
        return max(alone_s, (waiting.tokens + tokens) / all_tokens_per_s)

    def enter(self, model: Model, counted: Counted, account_id: str, asker: Asker) -> Work:
        self._budget.request()
        return self._enter(model, counted, account_id, asker, frozenset())

    def repeat(self, model: Model, counted: Counted, asker: Asker, avoid: frozenset[str]) -> Work:
        """Stand in line for work of our own, with a share like an account's, and never on the nodes to `avoid`."""
        return self._enter(model, counted, OURS, asker, avoid)

    def leave(self, work: Work) -> None:
        """It wants no more parts."""
        work.left = True
        waiting = self._waiting.get(work.model_id)
        if work.rests and waiting is not None:
            waiting.remove(work, work.tokens, len(work.rests))
            work.rests.clear()

    def ended(self, work: Work, part: Part, failure: NodeFailure | None) -> bool:
        """A part of it was answered right, or failed. Whether what failed waits again."""
        node = self._end(part, well=failure is None, late=isinstance(failure, NodeTooSlow))
        rest = work.taken.pop(part)
        if failure is None:
            node.counts["answers"] += 1
            node.counts["tokens"] += part.tokens
            self.registry.answered_right(node)
            self.assign(node)
            return False
        self.registry.failed(node, failure)
        if any(other.places == part.places for other in work.taken):
            return True  # another node was asked the same, and still works on it
        again = not work.left and self._may_try_again(work, part, rest, failure)
        if again:
            waiting = self._waiting.setdefault(work.model_id, FairQueue())
            waiting.add(work, part.tokens)
            begun = _had_begun(failure)
            tried = Rest(
                part.places,
                part.tokens,
                rest.tried | {part.node_id},
                rest.attempts + begun,
                rest.refusals + (not begun),
            )
            waits = bool(work.rests)
            work.rests.insert(0, tried)
            if not waits:
                work.start_tag = work.finish_tag = 0.0  # it had its turn: now it is first
                waiting.push(work)
        self.assign(node)
        return again

    def hedge_after_s(self, part: Part) -> float | None:
        """How long to wait for a part before another node is asked, too; None to wait for this one only."""
        if not self._hedge or part.tokens > HEDGE_TOKENS_MAX:
            return None
        return HEDGE_LATE * part.expected_s + HEDGE_AFTER_S

    def hedge(self, work: Work, part: Part) -> None:
        """A part is late: an idle node gets it, too, if there is one and the budget allows it."""
        rest = work.taken.get(part)
        if rest is None or work.left:
            return
        tried = Rest(part.places, part.tokens, rest.tried | {part.node_id}, rest.attempts, rest.refusals)
        now = self._clock.monotonic()
        idle = [
            node
            for node in self.registry.ready(work.model_id)
            if not node.load.parts and node.room(0.0, now, small=True) and work.can(node, tried)
        ]
        if not idle or not self._budget.take(HEDGE_BUDGET):
            return
        candidate = min(
            (Candidate(node, now) for node in idle), key=lambda candidate: candidate.finish_s(part.tokens, True)
        )
        candidate.node.counts["hedges"] += 1
        work.asker.take(self._bind(work, tried, candidate, part.tokens, now))

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        """A part was given up for a reason that says no ill of the node; with `late`, that it is slow."""
        self.assign(self._end(part, well=False, late=late))

    def may_ask_another(self, work: Work, part: Part) -> bool:
        """Whether a late part would get another try elsewhere. Where it would not, it is waited for."""
        rest = work.taken.get(part)
        if rest is None or work.left or rest.attempts + 1 >= ATTEMPTS_MAX:
            return False
        return self._another_can(work, part, rest) and self._budget.left()

    @property
    def waiting_tokens(self) -> int:
        """Of all requests, that nobody is asked for now."""
        return sum(waiting.tokens for waiting in self._waiting.values())

    # -- who gets what

    def assign(self, freed: Node | None = None) -> None:
        """Give out whatever can be given. Called whenever something has changed that may matter: a node is `freed`."""
        if self._assigning or not self._waiting:
            return  # an asker that leaves or gives up frees no node
        self._assigning = True
        try:
            for model_id, waiting in list(self._waiting.items()):
                if waiting.heap:
                    self._assign(model_id, waiting, freed)
                if not waiting.heap:
                    del self._waiting[model_id]  # and with it the tags: an idle line starts from zero
        finally:
            self._assigning = False

    def _enter(self, model: Model, counted: Counted, account_id: str, asker: Asker, avoid: frozenset[str]) -> Work:
        nodes = self.registry.ready(model.id)
        inputs_max = max([node.inputs_max for node in nodes], default=1)
        if counted.texts is None and nodes and not any(node.reads_ids for node in nodes):
            raise InvalidValue(
                "The servers that run this model take no token ids. Send the text itself.", param="input"
            )
        lengths, tokens = counted.lengths, counted.tokens
        waiting = self._waiting.get(model.id)
        if waiting is not None and waiting.tokens + tokens > WAITING_TOKENS_MAX and waiting.heap:
            raise Overloaded("More text is waiting here than may wait. Try again shortly.", retry_after_s=5.0)
        work = Work(
            line=self,
            model_id=model.id,
            account_id=account_id,
            size=size_of(tokens),
            lengths=lengths,
            asker=asker,
            whole=stays_whole(tokens, len(lengths), inputs_max),
            needs_texts=counted.ids is None,
            needs_ids=counted.texts is None,
            rests=[Rest(tuple(in_order(lengths, inputs_max)), tokens, avoid)],
            number=next(self._numbers),
        )
        if waiting is None and not self._assigning and self._place_at_once(work, nodes):
            return work
        waiting = self._waiting.setdefault(model.id, FairQueue())
        for rest in work.rests:
            waiting.add(work, rest.tokens)
        waiting.tag(work, tokens)
        waiting.push(work)
        self.assign()
        return work

    def _place_at_once(self, work: Work, nodes: Sequence[Node]) -> bool:
        """Where nobody waits there is no order to keep. Whether all of it could be given out."""
        now = self._clock.monotonic()
        self._assigning = True
        try:
            self._place(work, candidates_of(nodes, None, now, self._dice), 0, now, None, small=work.whole)
        finally:
            self._assigning = False
        return not work.rests

    def _assign(self, model_id: str, waiting: FairQueue, freed: Node | None) -> None:
        now = self._clock.monotonic()
        candidates = candidates_of(self.registry.ready(model_id), freed, now, self._dice)
        aside: list[Work] = []
        ahead = vain = 0
        needed = 0.0  # tokens that have to be ahead of a short request before a free node is worth its slowness
        large_waits = False  # then what comes after it does not fill up the nodes that it waits for
        while waiting.heap and vain < LOOK_AHEAD and len(aside) < SKIP_MAX:
            if needed > waiting.tokens or not any(candidate.room(not large_waits) for candidate in candidates):
                break
            work = waiting.pop()
            if not work.rests:
                continue  # it left
            if not work.whole or ahead >= needed:
                needed = self._place(work, candidates, ahead, now, waiting, small=work.whole and not large_waits)
                vain += bool(work.rests)
            if work.rests:
                aside.append(work)
                ahead += work.tokens
                large_waits = large_waits or not work.whole
        if not candidates:
            self._give_up_all(waiting)
        for work in aside:
            waiting.push(work)
        if waiting.heap and candidates:
            self._look_again(candidates, model_id)

    def _place(
        self, work: Work, candidates: list[Candidate], ahead: int, now: float, waiting: FairQueue | None, *, small: bool
    ) -> float:
        """Give out as much of one request as should be given now. It is `waiting`, or has just come.

        Returns how many tokens would have to be ahead of one like it for a free node to be used.
        """
        while work.rests:
            rest = work.rests[0]
            able = [candidate for candidate in candidates if work.can(candidate.node, rest)]
            if not able:
                if not any(work.can(node, rest) for node in self.registry.ready(work.model_id)):
                    self._give_up(work, waiting)
                return 0.0
            candidate, tokens_max, needed = self._choose(work, rest, able, ahead, small)
            if candidate is None:
                return needed if work.whole else 0.0
            part = self._bind(work, rest, candidate, tokens_max, now)
            left = rest.places[len(part.places) :]
            work.rests[:1] = [replace(rest, places=left, tokens=rest.tokens - part.tokens)] if left else []
            if waiting is not None:
                waiting.remove(work, part.tokens, not left)
                waiting.now = max(waiting.now, work.start_tag)
            work.asker.take(part)
        return 0.0

    def _choose(
        self, work: Work, rest: Rest, candidates: list[Candidate], ahead: int, small: bool
    ) -> tuple[Candidate | None, int, float]:
        """Which node, and at most how many tokens of the rest it gets; if none, how many had to be ahead for one."""
        if len(candidates) == 1 and work.whole and candidates[0].room(small):
            return candidates[0], rest.tokens, 0.0
        speed = free_speed = 0.0
        outstanding = 0
        for candidate in candidates:
            speed += candidate.tokens_per_s
            outstanding += candidate.node.load.tokens
            free_speed += candidate.tokens_per_s if candidate.room(small) else 0.0
        if not free_speed:
            return None, 0, 0.0
        options, limits = [], []
        for candidate in candidates:
            limit = rest.tokens if work.whole else part_tokens_max(rest.tokens, candidate.tokens_per_s, free_speed)
            limits.append(limit)
            finish_s = candidate.finish_s(min(limit, rest.tokens), work.whole)
            options.append(
                Option(candidate.node, finish_s, candidate.room(small), candidate.node.asks.get(work.model_id, 0))
            )
        horizon_s = (outstanding + ahead + (0 if work.whole else rest.tokens)) / speed
        chosen = self._policy(options, horizon_s, self._dice)
        if chosen is None:
            free_s = min(option.finish_s for option in options if option.room)
            return None, 0, free_s / TIE * speed - outstanding
        at = options.index(chosen)
        return candidates[at], limits[at], 0.0

    def _bind(self, work: Work, rest: Rest, candidate: Candidate, tokens_max: int, now: float) -> Part:
        node = candidate.node
        taken = cut(work.lengths, rest.places, tokens_max, node.inputs_max)
        part = Part(
            node_id=node.node_id,
            places=rest.places[: taken.inputs],
            tokens=taken.tokens,
            expected_s=candidate.finish_s(taken.tokens, work.whole),
            ask=node.asks.get(work.model_id, 0),
        )
        work.taken[part] = rest
        self._running[part] = node, not work.whole
        node.load.began(taken.tokens, now, bulk=not work.whole)
        candidate.look(now)
        return part

    def _end(self, part: Part, *, well: bool, late: bool = False) -> Node:
        node, bulk = self._running.pop(part)
        node.load.ended(part.tokens, self._clock.monotonic(), well=well, bulk=bulk, late=late)
        return node

    def _may_try_again(self, work: Work, part: Part, rest: Rest, failure: NodeFailure) -> bool:
        """Whether another node may be asked for what a part asked. Remembers why this one failed."""
        work.last = failure
        if not self._another_can(work, part, rest):
            return False
        if not _had_begun(failure):
            return rest.refusals + 1 < REFUSALS_MAX
        if rest.attempts + 1 >= ATTEMPTS_MAX:
            return False
        node = self.registry.find(part.node_id)
        lost = node is None or node.state is not NodeState.READY  # with its node: no more than that had in flight
        refused = isinstance(failure, UpstreamRefused)  # before it began: who sends such texts uses up nobody's budget
        return lost or refused or self._budget.take()

    def _another_can(self, work: Work, part: Part, rest: Rest) -> bool:
        """Whether a node that was not tried could do what a part asked."""
        tried = Rest(part.places, part.tokens, rest.tried | {part.node_id})
        return any(work.can(node, tried) for node in self.registry.ready(work.model_id))

    def _give_up(self, work: Work, waiting: FairQueue | None) -> None:
        if waiting is not None:
            waiting.remove(work, work.tokens, len(work.rests))
        work.rests.clear()
        work.asker.give_up(work.last)

    def _give_up_all(self, waiting: FairQueue) -> None:
        while waiting.heap:
            work = waiting.pop()
            if work.rests:
                self._give_up(work, waiting)

    def _look_again(self, candidates: list[Candidate], model_id: str) -> None:
        """Nothing may happen when a node is about to be free, or says nothing: look again by the clock."""
        now = self._clock.monotonic()
        full = [
            candidate.room_in_s for candidate in candidates if not candidate.room(False)
        ]  # an idle slow node's time does not come
        soonest_s = min(full, default=LOOK_AGAIN_MAX_S)
        if len(candidates) < len(self.registry.ready(model_id)):
            soonest_s = 0.0  # others, that were not looked at, may be idle
        at = now + min(max(soonest_s, LOOK_AGAIN_MIN_S), LOOK_AGAIN_MAX_S)
        if at >= self._look_again_at > now:
            return
        self._look_again_at = at

        def look() -> None:
            if self._look_again_at == at:
                self._look_again_at = float("inf")
                self.assign()

        self._call_later(at - now, look)


def _had_begun(failure: NodeFailure) -> bool:
    """Whether the node may have worked on it."""
    return not isinstance(failure, NodeBusy | NodeUnreachable)
