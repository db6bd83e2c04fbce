"""A request in the scheduler's queue, and those of its inputs that no node works on yet."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedmesh.fleet.registry import Node
from embedmesh.rules.errors import NodeFailure
from embedmesh.rules.forwarding import Asker, Part

if TYPE_CHECKING:
    from embedmesh.fleet.scheduler import Scheduler


@dataclass(eq=False, slots=True)
class Remainder:
    """Inputs of a request that no node works on. Nodes in `tried` do not get them."""

    rows: tuple[int, ...]
    tokens: int
    tried: frozenset[str] = frozenset()
    attempts: int = 0
    refusals: int = 0  # by nodes that had not begun: no attempts

    def after(self, part: Part, *, attempts: int = 0, refusals: int = 0) -> "Remainder":
        """The inputs of a part that was cut from this one, for another node than the part's."""
        tried = self.tried | {part.node_id}
        return Remainder(part.rows, part.tokens, tried, self.attempts + attempts, self.refusals + refusals)


@dataclass(eq=False, slots=True)
class QueuedRequest:
    """One request in the queue. Implements the port `Ticket`."""

    scheduler: "Scheduler"
    model_id: str
    account_id: str
    size: int  # see `size_of`
    lengths: Sequence[int]
    asker: Asker
    whole: bool  # whether one node gets all of it
    needs_texts: bool  # whether only nodes that take texts can do it
    needs_ids: bool
    remainders: list[Remainder]
    start_tag: float = 0.0
    finish_tag: float = 0.0
    number: int = 0  # in the order of arrival, which decides where tags are equal
    left: bool = False
    only: str | None = None  # the one node that may have it
    beginning: bytes | None = None  # a hash of how it begins, where its node may have that in a cache
    last: NodeFailure | None = None
    taken: dict[Part, Remainder] = field(default_factory=dict)  # what each running part was cut from

    @property
    def tokens(self) -> int:
        """Of all inputs that no node works on."""
        return sum(remainder.tokens for remainder in self.remainders)

    def ended(self, part: Part, failure: NodeFailure | None) -> bool:
        return self.scheduler.ended(self, part, failure)

    def abandoned(self, part: Part, *, late: bool = False) -> None:
        self.taken.pop(part, None)
        self.scheduler.abandoned(part, late=late)

    def may_ask_another(self, part: Part) -> bool:
        return self.scheduler.retries.may_ask_another(self, part)

    def hedge_after_s(self, part: Part) -> float | None:
        return self.scheduler.retries.hedge_after_s(part)

    def hedge(self, part: Part) -> None:
        self.scheduler.hedge(self, part)

    def leave(self) -> None:
        self.scheduler.leave(self)

    def can(self, node: Node, remainder: Remainder) -> bool:
        """Whether a node may get these inputs at all."""
        if node.node_id in remainder.tried or (self.only is not None and node.node_id != self.only):
            return False
        return not (self.needs_texts if node.reads_ids else self.needs_ids)
