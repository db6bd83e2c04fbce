"""What interactive work leaves of the nodes: turns for work that can wait.

Work at low priority stands in front of the scheduler, not in its queue, where it would have an account's share. It gets
a turn only while no request waits for a node of its model. How much of it a node may have at one time depends on
whether anybody else has been there lately: then it is a slice so short that a request which comes meanwhile is hardly
delayed, and only while the node has nothing else to do; else as much as keeps the node busy.

Work that is larger than that has its turn for as many tokens as it was given, and waits for its next turn with the
others (see `slices`).

This code never waits: it calls back, and takes time as an argument.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from embedmesh.fleet.look_again import CallLater
from embedmesh.fleet.registry import Node
from embedmesh.fleet.retries import RetryBudget
from embedmesh.fleet.scheduler import Scheduler
from embedmesh.fleet.spread import PART_S, PART_TOKENS_MIN
from embedmesh.rules.embeddings import Counted
from embedmesh.rules.forwarding import Asker, Part, Ticket
from embedmesh.rules.models import Model
from embedmesh.rules.ports import Clock

SLICE_S = (
    0.004  # of a node's time, while others are there, calls' fixed cost included: as long as a short request takes
)
WINDOW_S = 0.1  # of a node's time, while nobody else is there: as the scheduler's own window for short requests
PARTS_SHARE = 0.75  # of the parts that a node may have: the others are for those who come
STARVED_S = 1.0  # without any turn, after which one slice is had though others work: slow is not stuck
NOBODY = "-"  # no account
Queue = tuple[str, str]
"""An account and a model: what waits for one model's nodes is not in the way of what waits for another's."""

GAP_LOOK_S = 0.003  # between two looks for a gap: no event tells that a node's last request has ended


@dataclass(eq=False, slots=True)
class NodeTurn:
    """Some work's turn, which it waits for or has. Call `over` once it is not wanted any more, or the work is done."""

    leftover: "Leftover"
    account_id: str
    model: Model
    tokens: int
    begin: Callable[[], None]
    node_id: str | None = None  # whose time it takes; any node may do the work
    given: int = 0  # for how many of its tokens it is the turn

    def over(self) -> None:
        """The work is done, or is not wanted any more."""
        self.leftover.over(self)


@dataclass(slots=True)
class _Taken:
    """What work at low priority has of one node."""

    turns: int = 0
    tokens: int = 0


class Leftover:
    """Gives turns to work at low priority: by accounts and models in turns, and in order within each."""

    def __init__(self, scheduler: Scheduler, clock: Clock, call_later: CallLater) -> None:
        self.scheduler = scheduler
        self._clock = clock
        self._call_later = call_later
        self._waiting: OrderedDict[Queue, deque[NodeTurn]] = OrderedDict()  # the lines of units
        self._taken: dict[str, _Taken] = {}  # by node; none that is empty
        self._own = RetryBudget(clock)  # counts requests of low priority as the scheduler's counts all
        self._last_turn: dict[str, float] = {}  # by model: when work had its last turn, or began to wait
        self._looks = False
        self._giving = False

    def wait(
        self, account_id: str, model: Model, tokens: int, begin: Callable[[], None], *, again: bool = False
    ) -> NodeTurn:
        """Ask for a turn for work of that many tokens. `begin` is called once it may begin, perhaps at once.

        Work that had its turn, and has failed, comes before the account's other work `again`.
        """
        turn = NodeTurn(self, account_id, model, tokens, begin)
        self.join(turn, again=again)
        return turn

    def join(self, turn: NodeTurn, *, again: bool) -> None:
        """Have a turn wait. See `wait`."""
        model_id = turn.model.id
        if not any(queue[1] == model_id for queue in self._waiting):
            self._last_turn[model_id] = self._clock.monotonic()
        turns = self._waiting.setdefault((turn.account_id, model_id), deque())
        if again:
            turns.appendleft(turn)
        else:
            turns.append(turn)
        self._give()

    def over(self, turn: NodeTurn) -> None:
        """A turn is over, or is not waited for any more."""
        if turn.node_id is None:
            queue = turn.account_id, turn.model.id
            turns = self._waiting.get(queue)
            if turns is not None and turn in turns:
                turns.remove(turn)
                if not turns:
                    del self._waiting[queue]
            return
        taken = self._taken[turn.node_id]
        taken.turns -= 1
        taken.tokens -= turn.given
        if not taken.turns:
            del self._taken[turn.node_id]
        turn.node_id = None
        self._give()

    def entered(self) -> None:
        """A request of low priority enters the scheduler: it is not counted as one of those that others send."""
        self._own.request(self._clock.monotonic())

    @property
    def polite(self) -> bool:
        """Whether others have asked for something lately: in the last RETRY_SPAN_S seconds."""
        now = self._clock.monotonic()
        return self.scheduler.retries.budget.recent(now) > self._own.recent(now)

    def _give(self) -> None:
        """Give all turns that can be had now, and look again while some wait."""
        if self._giving:
            return  # a turn's work has begun and ended at once
        self._giving = True
        try:
            vain = 0
            while vain < len(self._waiting):
                queue, turns = self._waiting.popitem(last=False)
                found = self._node_for(turns[0])
                turn = turns.popleft() if found is not None else None
                if turns:
                    self._waiting[queue] = turns
                if turn is None or found is None:
                    vain += 1
                    continue
                vain = 0
                self._take(turn, *found)
        finally:
            self._giving = False
        if self._waiting and not self._looks:
            self._looks = True
            self._call_later(GAP_LOOK_S, self._look)

    def _look(self) -> None:
        self._looks = False
        self._give()

    def _take(self, turn: NodeTurn, node: Node, tokens: int) -> None:
        taken = self._taken.setdefault(node.node_id, _Taken())
        taken.turns += 1
        taken.tokens += tokens
        turn.node_id, turn.given = node.node_id, tokens
        self._last_turn[turn.model.id] = self._clock.monotonic()
        turn.begin()

    def _node_for(self, turn: NodeTurn) -> tuple[Node, int] | None:
        """A node that has time for it now, and for how many of its tokens."""
        scheduler, now = self.scheduler, self._clock.monotonic()
        nodes = scheduler.registry.ready(turn.model.id)
        starved = now - self._last_turn[turn.model.id] > STARVED_S
        if not nodes or (scheduler.others_wait(turn.model, NOBODY) and not starved):
            return None
        polite = self.polite
        ahead_s, node = min(((self._ahead_s(node), node) for node in nodes), key=lambda each: each[0])
        fit, taken = node.load.fit, self._taken.get(node.node_id, _Taken())
        if now < node.paused_until or (node.trial and (taken.turns or node.load.parts)):
            return None
        ahead = max(node.load.tokens, taken.tokens)
        slice_tokens = int(max(SLICE_S - fit.fixed_s, SLICE_S / 2) / fit.per_token_s) - ahead  # that are left of one
        tokens = min(
            turn.tokens, max(1, slice_tokens) if polite else max(PART_TOKENS_MIN, int(PART_S / fit.per_token_s))
        )
        if not taken.turns and (not node.load.parts or starved):
            return node, tokens
        if max(node.load.parts, taken.turns) >= PARTS_SHARE * node.in_flight_max:
            return None
        if polite:  # while nobody else's request is there, what fits the slice with what it has already
            return (node, tokens) if node.load.parts <= taken.turns and turn.tokens <= slice_tokens else None
        limit_s = WINDOW_S if tokens == turn.tokens else 2 * tokens * fit.per_token_s  # one that runs, one that waits
        return (node, tokens) if ahead_s + tokens * fit.per_token_s <= fit.fixed_s + limit_s else None

    def _ahead_s(self, node: Node) -> float:
        """How long a node works on what it has, turns that have just been given included."""
        load, taken = node.load, self._taken.get(node.node_id, _Taken())
        return load.fit.seconds(1, max(load.tokens, taken.tokens))


class PatientFleet:
    """The nodes for work that has its turn. Implements the port `Fleet`: nothing is refused because others wait."""

    def __init__(self, leftover: Leftover) -> None:
        self._leftover = leftover
        self._scheduler = leftover.scheduler
        self.try_now, self.answered_now = self._scheduler.try_now, self._scheduler.answered_now

    def serves(self, model: Model) -> bool:
        """A node may come later."""
        return True

    def may_come(self, model: Model) -> bool:
        return True

    def may_wait(self, model: Model, tokens: int, account_id: str) -> None:
        """It may: it has had its turn."""

    def others_wait(self, model: Model, account_id: str) -> bool:
        return self._scheduler.others_wait(model, account_id)

    def expected_s(self, model: Model, tokens: int) -> float | None:
        """As the scheduler says; without a node, nobody knows."""
        return self._scheduler.expected_s(model, tokens) or 0.0

    def enter(
        self,
        model: Model,
        counted: Counted,
        account_id: str,
        asker: Asker,
        only: str | None = None,
        beginning: bytes | None = None,
    ) -> Ticket:
        self._leftover.entered()
        return self._scheduler.enter(model, counted, account_id, asker, only, beginning)

    def adopt(self, model: Model, counted: Counted, account_id: str, asker: Asker, part: Part) -> Ticket:
        return self._scheduler.adopt(model, counted, account_id, asker, part)

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self._scheduler.abandoned(part, late=late)
