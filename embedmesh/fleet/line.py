"""Where requests wait for nodes. A part is bound to a node as late as possible: when that node has room for it.

While a node has work enough, what else there is stays here, where plans can still change: short work goes first, every
account gets its share, a node that turns slow or dies has little to give back, and a large request goes to whichever
nodes are free.

The order is start-time fair queueing (Goyal, Vin and Cheng, 1996), served by finish tags. A *flow* is one account's
requests of like size. A request's start tag is where its flow stands, or where the line stands if the flow was idle;
its finish tag lies its tokens further on. The smallest finish tag is served first, so that short work passes long work
and nobody's many requests keep out another's few; and since the line moves on with all that is served, what has waited
long enough comes first, however large it is.

Nothing here waits: parts are handed to callbacks, time and dice are arguments.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from embedmesh.fleet.budget import RetryBudget
from embedmesh.fleet.choose import FULL_SCAN_NODES_MAX, Option, Policy, fastest
from embedmesh.fleet.registry import Node, Registry
from embedmesh.fleet.spread import WHOLE_TOKENS_MAX, cut, in_order, part_tokens_max, stays_whole
from embedmesh.rules.deadlines import ATTEMPTS_MAX
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.errors import NodeBusy, NodeFailure, NodeUnreachable, Overloaded
from embedmesh.rules.models import Model
from embedmesh.rules.nodes import NodeState
from embedmesh.rules.ports import Asker, Clock, Dice, Part

LOOK_AHEAD = 32  # requests that are tried in vain before those behind them have to wait, too
REQUEST_TOKENS = 16  # what a request costs besides its tokens, in tokens, so that tiny ones are not free
WAITING_TOKENS_MAX = 20_000_000  # of one model: 80 MB of ids, and ten minutes of thirty thousand tokens a second
FLOW_BASE = 8  # requests are of like size when their tokens have as many digits to this base
OURS = ""  # in place of an account: work that nobody asked for
REFUSALS_MAX = 8  # of one part, by nodes that are full or gone: each is told of by one request or a few, not by all
HEDGE_TOKENS_MAX = 256  # larger work is not done twice
HEDGE_LATE, HEDGE_AFTER_S = 2.0, 0.02  # a short request is late after so many times what it should take, and so long
LOOK_AGAIN_MIN_S, LOOK_AGAIN_MAX_S = 0.001, 0.02  # a node that is about to be free, or one that says nothing

CallLater = Callable[[float, Callable[[], None]], object]
"""Seconds from now, what to do. The loop's `call_later`, or a simulator's."""


@dataclass(eq=False)
class Rest:
    """Inputs of a request that nobody is asked for now; `tried` nodes shall not be asked."""

    places: tuple[int, ...]
    tokens: int
    tried: frozenset[str] = frozenset()
    attempts: int = 0
    refusals: int = 0  # by nodes that had not begun: no attempts


@dataclass(eq=False)
class Work:
    """One request in line. Implements the port `Place`."""

    line: "Line"
    model_id: str
    lengths: Sequence[int]
    asker: Asker
    whole: bool  # whether one node gets all of it
    needs_texts: bool  # whether only servers that take texts can do it
    needs_ids: bool
    rests: list[Rest]
    start_tag: float = 0.0
    finish_tag: float = 0.0
    number: int = 0  # of those that entered: who came first where tags are equal
    left: bool = False
    last: NodeFailure | None = None
    taken: dict[Part, Rest] = field(default_factory=dict)  # what each running part was cut from

    @property
    def tokens(self) -> int:
        """Of all inputs that nobody is asked for now."""
        return sum(rest.tokens for rest in self.rests)

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        return self.line.ended(self, part, failure)

    def abandoned(self, part: Part) -> None:
        self.taken.pop(part, None)
        self.line.abandoned(part)

    def hedge_after_s(self, part: Part) -> float | None:
        return self.line.hedge_after_s(part)

    def hedge(self, part: Part) -> None:
        self.line.hedge(self, part)

    def leave(self) -> None:
        self.line.leave(self)


class Line:
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
        self._waiting: dict[str, _Waiting] = {}
        self._running: dict[Part, tuple[Node, bool]] = {}  # where, and whether it is of a request that was cut
        self._numbers = itertools.count()
        self._assigning = False
        self._look_again_at = float("inf")
        registry.on_change = self.assign

    # -- the port Fleet

    def serves(self, model: Model) -> bool:
        return bool(self.registry.ready(model.id))

    def expected_s(self, model: Model, tokens: int) -> float | None:
        nodes = self.registry.ready(model.id)
        if not nodes:
            return None
        now = self._clock.monotonic()
        waiting = self._waiting[model.id].tokens if model.id in self._waiting else 0
        small = tokens <= WHOLE_TOKENS_MAX
        alone_s = min(node.load.finish_s(tokens, now, small=small) + node.penalty_s for node in nodes)
        if not waiting:
            return alone_s
        return max(alone_s, (waiting + tokens) / sum(node.load.tokens_per_s for node in nodes))

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
            waiting.tokens -= work.tokens
            work.rests.clear()

    def ended(self, work: Work, part: Part, failure: NodeFailure | None) -> bool:
        """A part of it was answered right, or failed. Whether what failed waits again."""
        node = self._end(part, well=failure is None)
        rest = work.taken.pop(part)
        if failure is None:
            node.counts["answers"] += 1
            node.counts["tokens"] += part.tokens
            self.registry.answered_right(node)
            self.assign()
            return False
        self.registry.failed(node, failure)
        if any(other.places == part.places for other in work.taken):
            return True  # another node was asked the same, and still works on it
        again = not work.left and self._may_try_again(work, part, rest, failure)
        if again:
            waiting = self._waiting.setdefault(work.model_id, _Waiting())
            waiting.tokens += part.tokens
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
        self.assign()
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
            if not node.load.parts and node.room(0.0, now, small=True) and _can(node, work, tried)
        ]
        if not idle or not self._budget.take():
            return
        spot = min((_Spot(node, now) for node in idle), key=lambda spot: spot.finish_s(part.tokens, True))
        spot.node.counts["hedges"] += 1
        work.asker.take(self._bind(work, tried, spot, part.tokens, now))

    def abandoned(self, part: Part) -> None:
        """A part was given up for a reason that says nothing about the node."""
        self._end(part, well=False)
        self.assign()

    @property
    def waiting_tokens(self) -> int:
        """Of all requests, that nobody is asked for now."""
        return sum(waiting.tokens for waiting in self._waiting.values())

    # -- who gets what

    def assign(self) -> None:
        """Give out whatever can be given. Called whenever something has changed that may matter."""
        if self._assigning:
            return  # an asker that leaves or gives up frees no node
        self._assigning = True
        try:
            for model_id, waiting in list(self._waiting.items()):
                if waiting.heap:
                    self._assign(model_id, waiting)
                if not waiting.heap:
                    del self._waiting[model_id]  # and with it the tags: an idle line starts from zero
        finally:
            self._assigning = False

    def _enter(self, model: Model, counted: Counted, account_id: str, asker: Asker, avoid: frozenset[str]) -> Work:
        nodes = self.registry.ready(model.id)
        inputs_max = max((node.inputs_max for node in nodes), default=1)
        lengths, tokens = counted.lengths, counted.tokens
        waiting = self._waiting.setdefault(model.id, _Waiting())
        if waiting.tokens + tokens > WAITING_TOKENS_MAX and waiting.heap:
            raise Overloaded("More text is waiting here than may wait. Try again shortly.", retry_after_s=5.0)
        work = Work(
            line=self,
            model_id=model.id,
            lengths=lengths,
            asker=asker,
            whole=stays_whole(tokens, len(lengths), inputs_max),
            needs_texts=counted.ids is None,
            needs_ids=counted.texts is None,
            rests=[Rest(tuple(in_order(lengths, inputs_max)), tokens, avoid)],
            number=next(self._numbers),
        )
        waiting.tag(work, account_id, tokens)
        waiting.push(work)
        waiting.tokens += tokens
        self.assign()
        return work

    def _assign(self, model_id: str, waiting: "_Waiting") -> None:
        now = self._clock.monotonic()
        nodes = self.registry.ready(model_id)
        if len(nodes) > FULL_SCAN_NODES_MAX:
            spots = [_Spot(node, now) for node in self._two_of(nodes)]
            if not any(spot.room(now, False) for spot in spots):
                spots = [_Spot(node, now) for node in nodes]
        else:
            spots = [_Spot(node, now) for node in nodes]
        aside: list[Work] = []
        ahead = 0
        large_waits = False  # then what comes after it does not fill up the nodes that it waits for
        while waiting.heap and len(aside) < LOOK_AHEAD and any(spot.room(now, not large_waits) for spot in spots):
            work = waiting.pop()
            if not work.rests:
                continue  # it left
            self._place(work, spots, ahead, now, waiting, small=work.whole and not large_waits)
            if work.rests:
                aside.append(work)
                ahead += work.tokens
                large_waits = large_waits or not work.whole
        if not spots:
            self._give_up_all(waiting)
        for work in aside:
            waiting.push(work)
        if waiting.heap and spots:
            self._look_again(spots)

    def _place(
        self, work: Work, spots: "list[_Spot]", ahead: int, now: float, waiting: "_Waiting", *, small: bool
    ) -> None:
        """Give out as much of one request as should be given now."""
        while work.rests:
            rest = work.rests[0]
            able = [spot for spot in spots if spot.able(work, rest)]
            if not able:
                if all(not _can(node, work, rest) for node in self.registry.ready(work.model_id)):
                    self._give_up(work, waiting)
                return
            spot, tokens_max = self._choose(work, rest, able, ahead, now, small)
            if spot is None:
                return
            part = self._bind(work, rest, spot, tokens_max, now)
            left = rest.places[len(part.places) :]
            work.rests[:1] = [replace(rest, places=left, tokens=rest.tokens - part.tokens)] if left else []
            waiting.tokens -= part.tokens
            waiting.now = max(waiting.now, work.start_tag)
            work.asker.take(part)

    def _choose(
        self, work: Work, rest: Rest, spots: "list[_Spot]", ahead: int, now: float, small: bool
    ) -> "tuple[_Spot | None, int]":
        """Which node, and at most how many tokens of the rest it gets."""
        speed = free_speed = 0.0
        outstanding = 0
        rooms = []
        for spot in spots:
            room = spot.room(now, small)
            rooms.append(room)
            speed += spot.tokens_per_s
            outstanding += spot.node.load.tokens
            free_speed += spot.tokens_per_s if room else 0.0
        if not free_speed:
            return None, 0
        options, limits = [], []
        for spot, room in zip(spots, rooms, strict=True):
            limit = rest.tokens if work.whole else part_tokens_max(rest.tokens, spot.tokens_per_s, free_speed)
            limits.append(limit)
            finish_s = spot.finish_s(min(limit, rest.tokens), work.whole)
            options.append(Option(spot.node, finish_s, room, spot.node.asks.get(work.model_id, 0)))
        horizon_s = (outstanding + ahead + (0 if work.whole else rest.tokens)) / speed
        chosen = self._policy(options, horizon_s, self._dice)
        if chosen is None:
            return None, 0
        at = options.index(chosen)
        return spots[at], limits[at]

    def _bind(self, work: Work, rest: Rest, spot: "_Spot", tokens_max: int, now: float) -> Part:
        node = spot.node
        taken = cut(work.lengths, rest.places, tokens_max, node.inputs_max)
        part = Part(
            node_id=node.node_id,
            places=rest.places[: taken.inputs],
            tokens=taken.tokens,
            expected_s=spot.finish_s(taken.tokens, work.whole),
            ask=node.asks.get(work.model_id, 0),
        )
        work.taken[part] = rest
        self._running[part] = node, not work.whole
        node.load.began(taken.tokens, now, bulk=not work.whole)
        spot.look(now)
        return part

    def _end(self, part: Part, *, well: bool) -> Node:
        node, bulk = self._running.pop(part)
        node.load.ended(part.tokens, self._clock.monotonic(), well=well, bulk=bulk)
        return node

    def _may_try_again(self, work: Work, part: Part, rest: Rest, failure: NodeFailure) -> bool:
        """Whether another node may be asked for what a part asked. Remembers why this one failed."""
        work.last = failure
        tried = Rest(part.places, part.tokens, rest.tried | {part.node_id})
        if all(not _can(node, work, tried) for node in self.registry.ready(work.model_id)):
            return False
        if not _had_begun(failure):
            return rest.refusals + 1 < REFUSALS_MAX
        if rest.attempts + 1 >= ATTEMPTS_MAX:
            return False
        node = self.registry.find(part.node_id)
        lost = node is None or node.state is not NodeState.READY  # with its node: no more than that had in flight
        return lost or self._budget.take()

    def _give_up(self, work: Work, waiting: "_Waiting") -> None:
        waiting.tokens -= work.tokens
        work.rests.clear()
        work.asker.give_up(work.last)

    def _give_up_all(self, waiting: "_Waiting") -> None:
        while waiting.heap:
            work = waiting.pop()
            if work.rests:
                self._give_up(work, waiting)

    def _two_of(self, nodes: Sequence[Node]) -> list[Node]:
        first = int(self._dice.random() * len(nodes))
        second = int(self._dice.random() * (len(nodes) - 1))
        return [nodes[first], nodes[second if second < first else second + 1]]

    def _look_again(self, spots: "list[_Spot]") -> None:
        """Nothing may happen when a node is about to be free, or says nothing: look again by the clock."""
        now = self._clock.monotonic()
        soonest_s = min(spot.room_in_s for spot in spots)
        at = now + min(max(soonest_s, LOOK_AGAIN_MIN_S), LOOK_AGAIN_MAX_S)
        if at >= self._look_again_at > now:
            return
        self._look_again_at = at

        def look() -> None:
            if self._look_again_at == at:
                self._look_again_at = float("inf")
                self.assign()

        self._call_later(at - now, look)


class _Waiting:
    """One model's line."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Work]] = []
        self.tokens = 0
        self.now = 0.0  # how far the line has come: the largest start tag that was served
        self._flows: dict[tuple[str, int], float] = {}  # the finish tag of the last request of each

    def tag(self, work: Work, account_id: str, tokens: int) -> None:
        """A new request's place in the order."""
        flow = (account_id, _digits(tokens))
        work.start_tag = max(self.now, self._flows.get(flow, 0.0))
        work.finish_tag = self._flows[flow] = work.start_tag + REQUEST_TOKENS + tokens

    def push(self, work: Work) -> None:
        """Into the line, or back into its place."""
        heapq.heappush(self.heap, (work.finish_tag, work.number, work))

    def pop(self) -> Work:
        """Whose turn it is."""
        return heapq.heappop(self.heap)[2]


class _Spot:
    """A node as it is looked at during one `assign`."""

    def __init__(self, node: Node, now: float) -> None:
        self.node = node
        self.tokens_per_s = node.load.tokens_per_s
        self._penalty_s = node.penalty_s
        self.look(now)

    def look(self, now: float) -> None:
        """Its load has changed."""
        self._remaining_s = (self.node.load.remaining_s(now), self.node.load.remaining_s(now, small=True))

    def room(self, now: float, small: bool) -> bool:
        return self.node.room(self._remaining_s[small], now, small=small)

    def able(self, work: Work, rest: Rest) -> bool:
        return _can(self.node, work, rest)

    def finish_s(self, tokens: int, small: bool) -> float:
        return self._remaining_s[small] + self.node.load.fixed_s + tokens / self.tokens_per_s + self._penalty_s

    @property
    def room_in_s(self) -> float:
        """When a large part may be sent next, if all goes as expected."""
        return self._remaining_s[False] - self.node.load.fixed_s


def _can(node: Node, work: Work, rest: Rest) -> bool:
    """Whether a node can be asked for these inputs at all."""
    if node.node_id in rest.tried:
        return False
    return not (work.needs_texts if node.reads_ids else work.needs_ids)


def _had_begun(failure: NodeFailure) -> bool:
    """Whether the node may have worked on it."""
    return not isinstance(failure, NodeBusy | NodeUnreachable)


def _digits(tokens: int) -> int:
    digits = 0
    while tokens:
        tokens //= FLOW_BASE
        digits += 1
    return digits
