"""Who waits in line, and in which order.

The order is start-time fair queueing (Goyal, Vin and Cheng, 1996), served by finish tags. A *flow* is one account's
requests of like size. A request's start tag is where its flow stands, or where the line stands if the flow was idle;
its finish tag lies its tokens further on. The smallest finish tag is served first, so that short work passes long work
and nobody's many requests keep out another's few (an account that has several flows waiting shares its share among
them); and since the line moves on with all that is served, what has waited
long enough comes first, however large it is.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from embedmesh.fleet.registry import Node
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Asker, Part

REQUEST_TOKENS = 16  # what a request costs besides its tokens, in tokens, so that tiny ones are not free
FLOW_BASE = 2  # requests are of like size when their tokens have as many digits to this base
FLOWS_MAX = 10_000  # remembered while the line is not empty; those that have not asked for long are forgotten first


class Keeper(Protocol):
    """The line that a request stands in."""

    def ended(self, work: "Work", part: Part, failure: NodeFailure | None) -> bool: ...

    def abandoned(self, part: Part, *, late: bool) -> None: ...

    def may_ask_another(self, work: "Work", part: Part) -> bool: ...

    def hedge_after_s(self, part: Part) -> float | None: ...

    def hedge(self, work: "Work", part: Part) -> None: ...

    def leave(self, work: "Work") -> None: ...


@dataclass(eq=False, slots=True)
class Rest:
    """Inputs of a request that nobody is asked for now; `tried` nodes shall not be asked."""

    places: tuple[int, ...]
    tokens: int
    tried: frozenset[str] = frozenset()
    attempts: int = 0
    refusals: int = 0  # by nodes that had not begun: no attempts


@dataclass(eq=False, slots=True)
class Work:
    """One request in line. Implements the port `Place`."""

    line: Keeper
    model_id: str
    account_id: str
    size: int  # see `size_of`
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

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self.taken.pop(part, None)
        self.line.abandoned(part, late=late)

    def may_ask_another(self, part: Part) -> bool:
        return self.line.may_ask_another(self, part)

    def hedge_after_s(self, part: Part) -> float | None:
        return self.line.hedge_after_s(part)

    def hedge(self, part: Part) -> None:
        self.line.hedge(self, part)

    def leave(self) -> None:
        self.line.leave(self)

    def can(self, node: Node, rest: Rest) -> bool:
        """Whether a node can be asked for these inputs at all."""
        if node.node_id in rest.tried:
            return False
        return not (self.needs_texts if node.reads_ids else self.needs_ids)


@dataclass(slots=True)
class Backlog:
    """What one account has in line."""

    rests: int = 0
    tokens: int = 0


class FairQueue:
    """One model's line."""

    def __init__(self) -> None:
        self.heap: list[tuple[float, int, Work]] = []
        self.tokens = 0
        self.rests = 0
        self.now = 0.0  # how far the line has come: the largest start tag that was served
        self._flows: dict[tuple[str, int], float] = {}  # the finish tag of the last request of each
        self._backlogs: dict[str, dict[int, Backlog]] = {}  # by account and size; none that is empty

    def add(self, work: Work, tokens: int) -> None:
        """One rest of a request waits."""
        self.tokens += tokens
        self.rests += 1
        backlog = self._backlogs.setdefault(work.account_id, {}).setdefault(work.size, Backlog())
        backlog.rests += 1
        backlog.tokens += tokens

    def remove(self, work: Work, tokens: int, rests: int) -> None:
        """So many of its tokens, and of its rests, wait no more."""
        self.tokens -= tokens
        self.rests -= rests
        sizes = self._backlogs[work.account_id]
        backlog = sizes[work.size]
        backlog.rests -= rests
        backlog.tokens -= tokens
        if not backlog.rests:
            del sizes[work.size]
            if not sizes:
                del self._backlogs[work.account_id]

    def ahead_of(self, account_id: str, tokens: int) -> Backlog:
        """What an account has in line that a request of so many tokens more would not pass."""
        size = size_of(tokens)
        before = [each for other, each in self._backlogs.get(account_id, {}).items() if other <= size]
        return Backlog(sum(each.rests for each in before), sum(each.tokens for each in before))

    def accounts_with(self, account_id: str) -> int:
        """How many accounts have something in line, once this one has."""
        return len(self._backlogs) + (account_id not in self._backlogs)

    def tag(self, work: Work, tokens: int) -> None:
        """A new request's place in the order; it was added."""
        if len(self._flows) >= FLOWS_MAX:
            self._flows = {flow: tag for flow, tag in self._flows.items() if tag > self.now}
        flow = (work.account_id, work.size)
        cost = (REQUEST_TOKENS + tokens) * len(self._backlogs[work.account_id])
        work.start_tag = max(self.now, self._flows.get(flow, 0.0))
        work.finish_tag = self._flows[flow] = work.start_tag + cost

    def push(self, work: Work) -> None:
        """Into the line, or back into its place."""
        heapq.heappush(self.heap, (work.finish_tag, work.number, work))

    def pop(self) -> Work:
        """Whose turn it is."""
        return heapq.heappop(self.heap)[2]


def size_of(tokens: int) -> int:
    """Requests of the same are of like size."""
    digits = 0
    while tokens:
        tokens //= FLOW_BASE
        digits += 1
    return digits
